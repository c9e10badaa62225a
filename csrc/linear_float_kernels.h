// The kernels of linear layers of float32, written once for vectors of any size (csrc/vectors.h).
#pragma once

#include "linear_float.h"
#include "vectors.h"

namespace bluejay {
namespace {

constexpr int kTileVectors = kFloatTile / kLanes;

// Vectors of sums that fit the registers beside the weights and an input: of 16 registers, or of 32.
#if BLUEJAY_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif
constexpr int kBlockRows = kSums / kTileVectors < 6 ? kSums / kTileVectors : 6;
constexpr int kMostTiles = 4;

// 16 KiB of a tile's weights, half of a first-level cache, for all rows of a piece.
constexpr int64_t kDepth = 256;

// Tiles that so many rows meet side by side. Each sum waits for its last addition: eight at least keep the processor busy.
constexpr int tiles_of(int rows) {
    int tiles = kMostTiles;
    while (tiles > 1 && rows * tiles * kTileVectors > kSums) tiles /= 2;
    return tiles;
}

BLUEJAY_INLINE int64_t outputs_of(const FloatArgs& args, int64_t tile) {
    const int64_t rest = args.out_features - tile * kFloatTile;
    return rest < kFloatTile ? rest : kFloatTile;
}

BLUEJAY_INLINE void load_outputs(const float* from, int64_t count, Vec* to) {
    float some[kFloatTile] = {};
    if (count < kFloatTile) memcpy(some, from, count * sizeof(float));
    for (int v = 0; v < kTileVectors; ++v) to[v] = load((count < kFloatTile ? some : from) + v * kLanes);
}

BLUEJAY_INLINE void store_outputs(float* to, int64_t count, const Vec* from) {
    float some[kFloatTile];
    for (int v = 0; v < kTileVectors; ++v) store((count < kFloatTile ? some : to) + v * kLanes, from[v]);
    if (count < kFloatTile) memcpy(to, some, count * sizeof(float));
}

// Some rows, some tiles of outputs and the inputs from `first` on: sums begin with the bias, or go on from `out`.
template <int ROWS, int TILES>
void multiply_block(const FloatArgs& args, int64_t row, int64_t tile, int64_t first, int64_t count) {
    Vec sums[ROWS][TILES][kTileVectors];
    float* out = args.out + row * args.out_features + tile * kFloatTile;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t) {
            const float* from = first > 0 ? out + r * args.out_features : args.bias ? args.bias + tile * kFloatTile : nullptr;
            if (from) load_outputs(from + t * kFloatTile, outputs_of(args, tile + t), sums[r][t]);
            else for (Vec& sum : sums[r][t]) sum = Vec{};
        }
    }
    const float* x = args.x + row * args.in_features + first;
    const float* weight = args.weight + (tile * args.in_features + first) * kFloatTile;
    const int64_t row_step = args.in_features, tile_step = args.in_features * kFloatTile;
    for (int64_t k = 0; k < count; ++k, weight += kFloatTile) {
        Vec right[TILES][kTileVectors];
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) right[t][v] = load(weight + t * tile_step + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec left = splat(x[r * row_step + k]);
#pragma GCC unroll 4
            for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
                for (int v = 0; v < kTileVectors; ++v) sums[r][t][v] = multiply_add(left, right[t][v], sums[r][t][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
            store_outputs(out + r * args.out_features + t * kFloatTile, outputs_of(args, tile + t), sums[r][t]);
}

// The same for up to kMostTiles tiles.
template <int ROWS>
void multiply_rows(const FloatArgs& args, int64_t row, int64_t tile, int64_t tiles, int64_t first, int64_t count) {
    constexpr int kTogether = tiles_of(ROWS);
    for (; tiles >= kTogether; tiles -= kTogether, tile += kTogether)
        multiply_block<ROWS, kTogether>(args, row, tile, first, count);
    for (; tiles > 0; --tiles, ++tile) multiply_block<ROWS, 1>(args, row, tile, first, count);
}

using MultiplyRows = void (*)(const FloatArgs&, int64_t, int64_t, int64_t, int64_t, int64_t);
constexpr MultiplyRows kMultiplyRows[6] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                           multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};

// Rows in blocks of nearly the same size, as small ones take nearly as long. A block of weights stays in the caches for all of
// them; for one block of rows, weights are read once, and from end to end.
void multiply_float(const FloatArgs& args, const FloatPiece& piece) {
    const int64_t blocks = (piece.rows + kBlockRows - 1) / kBlockRows;
    const int64_t depth = blocks == 1 ? args.in_features : kDepth;
    const int64_t together = blocks == 1 ? kMostTiles : tiles_of(kBlockRows);
    const int64_t end = piece.first_tile + piece.tiles;
    for (int64_t first = 0; first < args.in_features; first += depth) {
        const int64_t count = args.in_features - first < depth ? args.in_features - first : depth;
        for (int64_t tile = piece.first_tile; tile < end; tile += together) {
            const int64_t tiles = end - tile < together ? end - tile : together;
            int64_t row = piece.first_row;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t rows = piece.rows / blocks + (block < piece.rows % blocks);
                kMultiplyRows[rows - 1](args, row, tile, tiles, first, count);
                row += rows;
            }
        }
    }
}

}  // namespace
}  // namespace bluejay
