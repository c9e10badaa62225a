// Linear layers with int8 or int4 weights: out = x · weightᵀ + bias.
//
// Numbers. Each group of 32 inputs of a row becomes small integers ("digits") with one float scale; each group of 32 or
// 64 weights of an output has one float16 scale. Within a group everything is integer and exact; groups are added in
// float32, in order. So a row's result depends on nothing but the row: not on the other rows, not on the threads.
//
//   int8: weight w in [-90, 90], stored as w + 90. Digits are such that of 4 inputs whose products meet in one lane of 16
//         bits, the positive ones add up to 182 at most, and so do the negative ones: 180 * 182 = 32,760 fits. A group of
//         inputs that stands out of its row (an outlier feature) gets two digits, value = 91 * high + low. Weight bytes
//         beyond 180, which Bluejay does not write, give wrong sums, and not the same ones on all processors.
//   int4: weight w in [-8, 7], stored as w + 8; digit in [-127, 127]. Sixteen such products fit 16 bits.
//
// The stored offset (90 or 8) is taken out by where a group's sum starts: at -offset * (sum of its digits).
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

// Of int8 weights and of activations; see ops/reference.py.
constexpr int kOffset8 = 90, kOffset4 = 8;
constexpr float kMost = 127;            // the largest digit
constexpr float kMostOfFour = 180;      // what four digits of one sign may add up to, before they are rounded
constexpr int kDigitBase = 91;
constexpr float kMostWide = 90 * 91;    // the largest value of two digits
constexpr float kOutlier = 6;           // root mean squares of a row, beyond which a group gets two

// Tiles that are read side by side. Two cores of a Zen 3 read 24 GB/s of memory's 29 along one sequence of addresses each,
// all of them along two; four are no faster, and eight slower.
constexpr int kStreams = 2;
constexpr int64_t kShortly = 1024;      // bytes that each asks for ahead; 512 to 2,048 make no difference

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

// One row's digits as they are made: for each group 32 inputs, where its sums start, its scale, and whether it has two.
// int8 starts are whole numbers; int4's two int16 in one, for the first and the second half of each quad.
struct RowDigits {
    int8_t *low, *high;
    int32_t *low_start, *high_start;
    float* scale;
    uint8_t* wide;
};

// Inputs of up to four rows, as the kernels read them: [.][rows], the rows side by side.
struct Digits {
    const int32_t* low;           // [quads][rows], each four int8
    const int32_t* high;          // the same; read only where wide is set
    const int32_t* low_start;     // [groups][rows]
    const int32_t* high_start;
    const float* scale;           // [groups][rows]
    const uint8_t* wide;          // [groups]: a bit for each row that has high digits there
};

// Memory to be fetched while a tile is worked on: so many cache lines with each of its groups.
struct Ahead {
    const uint8_t* from;
    int lines;
};

// Some tiles of outputs, one behind the other as they are stored, with all their inputs.
struct Strip {
    const uint8_t* weight;
    const uint16_t* scales;
    int64_t groups;               // of 32 inputs
    int groups_per_scale;         // 1 or 2
    int tiles;                    // 1 to kStreams
    const uint8_t* end;           // of all weights
};

// The functions here are static: compiled for one instruction set, they must not be kept by the linker for another one.

// What of a strip is fetched while the group at this byte of its tile t is worked on: the same tile's next ones, and behind
// its end those of the next strip.
static inline const uint8_t* shortly(const Strip& strip, int t, int64_t byte, int64_t tile_bytes) {
    const int64_t tile = byte + kShortly < tile_bytes ? t : t + strip.tiles - 1;
    const uint8_t* ahead = strip.weight + tile * tile_bytes + byte + kShortly;
    return ahead < strip.end ? ahead : strip.weight;
}

// How a group of activations becomes digits: value * factor, rounded.
struct GroupScale {
    float factor, scale;
    bool wide;
};

// Args: whether the group holds NaN or infinity, its largest magnitude, for int8 the largest sum of one sign over four
// inputs that meet, and the magnitude from which on a group holds outliers.
static inline GroupScale group_scale(bool broken, float top, float of_four, float threshold, int bits) {
    // A NaN or an infinity makes every output of its row NaN, as it would in floating point.
    if (broken) return {0, __builtin_nanf(""), false};
    if (top < 1e-30f) return {0, 0, false};  // most / top would overflow
    const bool wide = bits == 8 && top > threshold;
    const float most = wide ? kMostWide : kMost;
    const float fours = of_four * (kMost / kMostOfFour);
    const float reach = bits == 8 && !wide && fours > top ? fours : top;
    return {most / reach, reach / most, wide};
}

// Where a group's sum starts, by the sums of its digits: of inputs 0 and 1 of all quads, and of inputs 2 and 3.
static inline int32_t packed_start(int32_t front, int32_t back, int bits) {
    if (bits == 8) return -kOffset8 * (front + back);
    return static_cast<int32_t>(static_cast<uint32_t>(-kOffset4 * back) << 16 | static_cast<uint16_t>(-kOffset4 * front));
}

// What one instruction set has to offer. `sums` is [rows][16] for each tile of outputs, added to.
struct LinearKernels {
    void (*quantize_row)(const float* x, int64_t count, int64_t padded, int bits, const RowDigits& out);
    // [count][16] float16 to [count * repeat][16] float32.
    void (*widen_scales)(const uint16_t* scales, int64_t count, int repeat, float* out);
    void (*unpack_int4)(const uint8_t* packed, int64_t pairs, uint8_t* out);
    // For 1, 2, 3, 4 rows. A block of inputs that is in the caches, its weights one byte each; `scales` are float32, one for
    // every 32 inputs, [groups][16].
    using Tile = void (*)(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums,
                          Ahead ahead);
    Tile int8[kTileRows];
    Tile int4[kTileRows];
    // The same, weights and scales as they are stored, from memory: the tiles of a strip are read side by side. So many
    // `full` tiles of rows come before that of 1, 2, 3, 4 rows, each with its digits.
    using Stream = void (*)(const Strip& strip, const Digits* digits, int full, float* sums);
    Stream int8_stream[kTileRows];
    Stream int4_stream[kTileRows];
};

// AVX2's, for AVX-512 to use as well.
void avx2_quantize_row(const float* x, int64_t count, int64_t padded, int bits, const RowDigits& out);
void avx2_widen_scales(const uint16_t* scales, int64_t count, int repeat, float* out);
void avx2_unpack_int4(const uint8_t* packed, int64_t pairs, uint8_t* out);

extern const LinearKernels linear_portable;
extern const LinearKernels linear_avx2;
extern const LinearKernels linear_avx512;

}  // namespace bluejay
