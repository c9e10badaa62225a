// Linear layers with int8 or int4 weights: out = x · weightᵀ + bias.
//
// Numbers. Each group of 32 inputs of a row becomes small integers ("digits") with one float scale; each group of 32 or
// 64 weights of an output has one float16 scale. Within a group everything is integer and exact; groups are added in
// float32, in order. So a row's result depends on nothing but the row: not on the other rows, not on the threads.
//
//   int8: weight w in [-112, 112], stored as w + 112; digit in [-73, 73]. Two products of an unsigned weight and a signed
//         digit fit 16 bits (224 * 73 * 2 = 32,704): the one multiply-add that AVX2 has for bytes, vpmaddubsw, needs that.
//         A group that stands out of its row (an outlier feature) gets two digits, value = 128 * high + low.
//   int4: weight w in [-8, 7], stored as w + 8; digit in [-127, 127]. Eight such sums fit 16 bits.
//
// The stored offset (112 or 8) is taken out by where a group's sum starts: at -offset * (sum of its digits).
//
// Weights lie in tiles of 16 outputs, 4 inputs ("a quad") beside one another, as the multiply-add reads them:
//
//   int8   quad j: | o0: i0 i1 i2 i3 | o1: i0 i1 i2 i3 | … | o15 |          64 bytes, inputs 4j … 4j+3
//   int4   pair j: the same 64 bytes, low halves quad 2j, high halves quad 2j+1
#pragma once

#include <cstdint>

namespace bluejay {

constexpr int kTileOutputs = 16;
constexpr int kTileRows = 4;      // 4 rows x 16 outputs: 8 sums, the weights and one digit fit AVX2's 16 registers
constexpr int kGroup = 32;        // inputs that share one scale of the activations
constexpr int kGroupQuads = kGroup / 4;

struct LinearArgs {
    int bits;                     // 8 or 4
    int group_size;               // weights to a scale: 32 or 64
    const float* x;               // [rows, in_features]
    int64_t rows;
    int64_t in_features;
    int64_t padded_in;            // in_features rounded up to group_size
    const uint8_t* weight;        // [tiles, padded_in / (4 or 8), 64]
    const uint16_t* scales;       // [tiles, padded_in / group_size, 16] float16
    const float* bias;            // [out_features], or nullptr
    float* out;                   // [rows, out_features]
    int64_t out_features;
};

// Compute out. Several threads of the program may call at once.
void linear(const LinearArgs& args);

// One block of inputs of up to four rows, as the tile kernels read them: [.][rows], the rows of the tile side by side.
struct Digits {
    const int32_t* low;           // [quads][rows], each four int8
    const int32_t* high;          // the same; read only where wide is set
    const int32_t* low_start;     // [groups][rows]: -offset * sum of the low digits (int4: two int16 that add up to it)
    const int32_t* high_start;
    const float* scale;           // [groups][rows]
    const uint8_t* wide;          // [groups]: a bit for each row that has high digits there
};

// Memory to be fetched while a tile is worked on: so many cache lines with each of its groups.
struct Ahead {
    const uint8_t* from;
    int lines;
    bool once;                    // it will be read once: past the caches, which hold the program and its data meanwhile
};

// What one instruction set has to offer. `sums` is [rows][16], added to; `scales` are float32, one for every 32 inputs,
// [groups][16].
struct LinearKernels {
    void (*quantize_row)(const float* x, int64_t count, int64_t padded, int bits, int8_t* low, int8_t* high, float* scale,
                         uint8_t* wide);
    void (*widen_scales)(const uint16_t* scales, int64_t count, int repeat, float* out);
    void (*unpack_int4)(const uint8_t* packed, int64_t pairs, uint8_t* out);
    using Tile = void (*)(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums,
                          Ahead ahead);
    Tile int8[kTileRows];         // for 1, 2, 3, 4 rows
    Tile int4[kTileRows];         // weights already unpacked, one byte each
    Tile int4_packed[kTileRows];
};

// AVX2's, for AVX-512 to use as well.
void avx2_quantize_row(const float* x, int64_t count, int64_t padded, int bits, int8_t* low, int8_t* high, float* scale,
                       uint8_t* wide);
void avx2_widen_scales(const uint16_t* scales, int64_t count, int repeat, float* out);
void avx2_unpack_int4(const uint8_t* packed, int64_t pairs, uint8_t* out);

extern const LinearKernels linear_portable;
extern const LinearKernels linear_avx2;
extern const LinearKernels linear_avx512;

}  // namespace bluejay
