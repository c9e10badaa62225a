// Linear layers with float32 weights: out = x · weightᵀ + bias.
//
// Numbers. An output is one sum: first the bias, then input by input in order, product and sum rounded at once where
// the instruction set can. However the work is cut, that order stays: a row's result depends on nothing but the row,
// not on the other rows, not on the threads. What runs side by side is several rows and outputs.
//
// Weights lie in tiles of 16 outputs, the 16 of one input beside one another, zeros behind the last output:
//
//   input k of a tile: | o0 | o1 | … | o15 |          64 bytes
#pragma once

#include <cstdint>

namespace bluejay {

constexpr int64_t kFloatTile = 16;  // outputs that lie together: two vectors of AVX2, one of AVX-512
constexpr int kSideBySide = 4;      // tiles that few rows meet at once

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

// Some rows, some tiles of outputs, and some of their inputs. Sums begin with what lies at `start` and end at `out`.
struct FloatBlock {
    const float* x;               // [rows, depth], rows x_step apart
    int64_t x_step, rows, depth;
    const float* weight;          // [tiles, depth, 16], tiles tile_step apart
    int64_t tile_step;
    const float* start;           // [rows, outputs], rows start_step apart; nullptr for zeros
    int64_t start_step;
    float* out;                   // [rows, outputs], rows out_step apart
    int64_t out_step, outputs;
};

// What one instruction set has to offer.
struct FloatKernels {
    void (*multiply)(const FloatBlock& block);
    int64_t rows;                 // that a block may have for its weights to be read from end to end
};

extern const FloatKernels linear_float_portable;
extern const FloatKernels linear_float_avx2;
extern const FloatKernels linear_float_avx512;

}  // namespace bluejay
