// Linear layers with float32 weights: out = x · weightᵀ + bias.
//
// Numbers. An output is one sum: first the bias, then input by input in order, product and sum rounded at once where the
// instruction set can. However the work is cut, that order stays: a row's result depends on nothing but the row, not on the
// other rows, not on the threads. What runs side by side is several rows and outputs.
//
// Weights lie in tiles of 16 outputs, the 16 of one input beside one another, zeros behind the last output:
//
//   input k of a tile: | o0 | o1 | … | o15 |          64 bytes
#pragma once

#include <cstdint>

namespace bluejay {

constexpr int64_t kFloatTile = 16;  // outputs that lie together: two vectors of AVX2, one of AVX-512

struct FloatArgs {
    const float* x;               // [rows, in_features]
    int64_t rows;
    int64_t in_features;
    const float* weight;          // [tiles, in_features, 16]
    const float* bias;            // [out_features], or nullptr
    float* out;                   // [rows, out_features]
    int64_t out_features;
};

// Compute out. Several threads of the program may call at once.
void linear_float32(const FloatArgs& args);

// Some rows and tiles of outputs.
struct FloatPiece {
    int64_t first_row, rows;
    int64_t first_tile, tiles;
};

// What one instruction set has to offer.
struct FloatKernels {
    void (*multiply)(const FloatArgs& args, const FloatPiece& piece);
};

extern const FloatKernels linear_float_portable;
extern const FloatKernels linear_float_avx2;
extern const FloatKernels linear_float_avx512;

}  // namespace bluejay
