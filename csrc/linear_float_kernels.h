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
constexpr int kPartRows = kSums / kTileVectors < 6 ? kSums / kTileVectors : 6;

// Tiles that so many rows meet side by side. A sum waits for its last addition: eight of them keep the processor busy.
constexpr int tiles_of(int rows) {
    int tiles = kSideBySide;
    while (tiles > 1 && rows * tiles * kTileVectors > kSums) tiles /= 2;
    return tiles;
}

// Inputs between two looks ahead; and how far these go along a single tile that is read from memory, 1 KiB: a Zen 3
// then reads 20 GB/s instead of 17. Of two tiles side by side it sees itself what comes next, and reads 25 without.
constexpr int64_t kLook = 8;
constexpr int64_t kShortly = 16 * kFloatTile;

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

// Where in a block: a row, and a tile of outputs.
struct Place {
    int64_t row, tile;
};

// Weights to be fetched on the way: so many inputs of each tile for each kLook that are worked on. nullptr: those that
// are read next. Fetching reads nothing, so that what lies behind the end does no harm.
struct FloatAhead {
    const float* weight;
    int64_t inputs;
};

template <int ROWS, int TILES>
using Sums = Vec[ROWS][TILES][kTileVectors];

// Add the products of one input.
template <int ROWS, int TILES>
BLUEJAY_INLINE void add_input(Sums<ROWS, TILES>& sums, const float* x, int64_t x_step, const float* weight,
                              int64_t tile_step) {
    Vec right[TILES][kTileVectors];
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) right[t][v] = load(weight + t * tile_step + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        const Vec left = splat(x[r * x_step]);
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) sums[r][t][v] = multiply_add(left, right[t][v], sums[r][t][v]);
    }
}

template <int ROWS, int TILES>
BLUEJAY_INLINE void add_inputs(Sums<ROWS, TILES>& sums, const FloatBlock& block, Place at, FloatAhead ahead) {
    const float* x = block.x + at.row * block.x_step;
    const float* weight = block.weight + at.tile * block.tile_step;
    if (!ahead.weight) ahead = {weight + kShortly, TILES == 1 ? kLook : 0};
    int64_t k = 0;
    for (; k + kLook <= block.depth; k += kLook) {
        for (int64_t i = 0; i < ahead.inputs; ++i, ahead.weight += kFloatTile)
            for (int t = 0; t < TILES; ++t) __builtin_prefetch(ahead.weight + t * block.tile_step, 0, 2);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLook; ++i)
            add_input<ROWS, TILES>(sums, x + k + i, block.x_step, weight + (k + i) * kFloatTile, block.tile_step);
    }
    for (; k < block.depth; ++k)
        add_input<ROWS, TILES>(sums, x + k, block.x_step, weight + k * kFloatTile, block.tile_step);
}

template <int ROWS, int TILES>
void multiply_tiles(const FloatBlock& block, Place at, FloatAhead ahead) {
    Sums<ROWS, TILES> sums = {};
    const int64_t first = at.tile * kFloatTile;
    const auto outputs = [&](int t) {
        const int64_t rest = block.outputs - first - t * kFloatTile;
        return rest < kFloatTile ? rest : kFloatTile;
    };
    if (block.start) {
        const float* start = block.start + at.row * block.start_step + first;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < TILES; ++t)
                load_outputs(start + r * block.start_step + t * kFloatTile, outputs(t), sums[r][t]);
    }
    add_inputs<ROWS, TILES>(sums, block, at, ahead);
    float* out = block.out + at.row * block.out_step + first;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
            store_outputs(out + r * block.out_step + t * kFloatTile, outputs(t), sums[r][t]);
}

// The same for up to kSideBySide tiles.
template <int ROWS>
void multiply_rows(const FloatBlock& block, Place at, int64_t tiles, FloatAhead ahead) {
    constexpr int kTogether = tiles_of(ROWS);
    for (; tiles >= kTogether; tiles -= kTogether, at.tile += kTogether)
        multiply_tiles<ROWS, kTogether>(block, at, ahead);
    for (; tiles > 0; --tiles, ++at.tile) multiply_tiles<ROWS, 1>(block, at, ahead);
}

using MultiplyRows = void (*)(const FloatBlock&, Place, int64_t, FloatAhead);
constexpr MultiplyRows kMultiplyRows[6] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                           multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};

// Rows in parts of nearly the same size, as small ones take nearly as long. A tile's weights stay in the caches for all
// of them, and the next tile's are fetched meanwhile, evenly.
void multiply_float(const FloatBlock& block) {
    const int64_t parts = (block.rows + kPartRows - 1) / kPartRows;
    const int64_t tiles = (block.outputs + kFloatTile - 1) / kFloatTile;
    const int64_t together = parts == 1 ? kSideBySide : tiles_of(kPartRows);
    const int64_t inputs = (kLook + parts - 1) / parts;
    for (Place at{0, 0}; at.tile < tiles; at.tile += together) {
        const int64_t rest = tiles - at.tile, some = rest < together ? rest : together;
        const float* next = block.weight + (at.tile + together) * block.tile_step;
        at.row = 0;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t rows = block.rows / parts + (part < block.rows % parts);
            const bool fetch = rest >= 2 * together && part * inputs < kLook;
            const FloatAhead ahead{next + part * inputs * (block.depth / kLook) * kFloatTile, fetch ? inputs : 0};
            kMultiplyRows[rows - 1](block, at, some, parts == 1 ? FloatAhead{nullptr, 0} : ahead);
            at.row += rows;
        }
    }
}

}  // namespace
}  // namespace bluejay
