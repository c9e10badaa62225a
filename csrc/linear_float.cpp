// How a linear layer of float32 is cut into pieces; the pieces are computed by the kernels of an instruction set.
#include "linear_float.h"

#include <algorithm>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

// Worked on at a time: a tile's weights, 32 KiB, and the rows, 240 KiB, are in the second-level cache. Blocks half or
// twice as large are as fast; with all inputs at once, rows of 16,384 took a tenth longer.
constexpr int64_t kMostRows = 120;
constexpr int64_t kMostInputs = 512;

// Of a piece of work for one thread, to be worth its turn: some 5 microseconds, by the processor or by memory.
constexpr int64_t kLeastProducts = 1 << 18;
constexpr int64_t kLeastWeights = 1 << 15;

constexpr int64_t kPiecesPerThread = 4;  // so that threads that are held up cost little at the end
constexpr int64_t kMostTiles = 32;       // of a piece, for the same reason

const FloatKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return linear_float_avx512;
    if (active() == Isa::avx2) return linear_float_avx2;
#endif
    return linear_float_portable;
}

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A piece of work for one thread.
struct Piece {
    int64_t row, rows, tile, tiles;
};

// Tiles to a piece: whole groups of those that are met side by side.
int64_t tiles_at_once(const FloatArgs& args, int64_t tiles, int64_t rows, int64_t chunks) {
    const int64_t weights = args.in_features * kFloatTile;
    const int64_t least = std::min(parts(kLeastWeights, weights), parts(kLeastProducts, weights * rows));
    const int64_t fair = tiles * chunks / (kPiecesPerThread * num_threads());
    return parts(std::max(least, std::min(fair, kMostTiles)), kSideBySide) * kSideBySide;
}

// A few rows: weights are read once, from end to end. More: some inputs at a time; sums rest in `out` between them.
void multiply(const FloatKernels& kernel, const FloatArgs& args, const Piece& piece) {
    const int64_t first_output = piece.tile * kFloatTile, tile_step = args.in_features * kFloatTile;
    const int64_t outputs = std::min(piece.tiles * kFloatTile, args.out_features - first_output);
    const int64_t depth = piece.rows <= kernel.rows ? args.in_features : kMostInputs;
    const float* x = args.x + piece.row * args.in_features;
    const float* weight = args.weight + piece.tile * tile_step;
    float* out = args.out + piece.row * args.out_features + first_output;
    const float* start = args.bias ? args.bias + first_output : nullptr;
    int64_t start_step = 0;
    for (int64_t first = 0; first < args.in_features; first += depth) {
        kernel.multiply({x + first, args.in_features, piece.rows, std::min(depth, args.in_features - first),
                         weight + first * kFloatTile, tile_step, start, start_step, out, args.out_features, outputs});
        start = out;
        start_step = args.out_features;
    }
}

}  // namespace

void linear_float32(const FloatArgs& args) {
    if (args.rows == 0) return;
    const FloatKernels& kernel = kernels();
    const int64_t tiles = parts(args.out_features, kFloatTile), chunks = parts(args.rows, kMostRows);
    const int64_t rows = parts(args.rows, chunks), together = tiles_at_once(args, tiles, rows, chunks);
    // Pieces of the same weights come one after the other.
    parallel_for(parts(tiles, together) * chunks, [&](int64_t index) {
        const int64_t tile = index / chunks * together, row = index % chunks * rows;
        multiply(kernel, args, {row, std::min(rows, args.rows - row), tile, std::min(together, tiles - tile)});
    });
}

}  // namespace bluejay
