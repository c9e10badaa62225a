// How a linear layer of float32 is cut into pieces; the pieces themselves are computed by the kernels of an instruction set.
#include "linear_float.h"

#include <algorithm>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kRowsAtOnce = 240;      // whose block of 256 inputs, 240 KiB, stays in half of a second-level cache
constexpr int64_t kPieceProducts = 1 << 18;  // some 5 microseconds
constexpr int64_t kPieceWeights = 1 << 15;   // 128 KiB, some 5 microseconds of a core's share of memory
constexpr int64_t kPiecesPerThread = 4;   // so that threads that are held up cost little at the end
constexpr int64_t kStreamed = 4;          // tiles that few rows meet side by side

const FloatKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return linear_float_avx512;
    if (active() == Isa::avx2) return linear_float_avx2;
#endif
    return linear_float_portable;
}

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

void linear_float32(const FloatArgs& args) {
    const FloatKernels& kernel = kernels();
    const int64_t tiles = parts(args.out_features, kFloatTile), chunks = parts(args.rows, kRowsAtOnce);
    if (args.rows == 0) return;
    // Tiles to a piece: so few that all threads have several, but enough to be worth a turn.
    const int64_t chunk_rows = parts(args.rows, chunks), tile_weights = args.in_features * kFloatTile;
    const int64_t least = std::max(parts(kPieceProducts, tile_weights * chunk_rows), int64_t{1});
    const int64_t worth = std::min(least, parts(kPieceWeights, tile_weights));
    const int64_t fair = tiles * chunks / (kPiecesPerThread * num_threads());
    const int64_t together = parts(std::max(worth, fair), kStreamed) * kStreamed;
    parallel_for(parts(tiles, together) * chunks, [&](int64_t index) {
        const int64_t tile = index / chunks * together, row = index % chunks * chunk_rows;
        kernel.multiply(args, {row, std::min(chunk_rows, args.rows - row), tile, std::min(together, tiles - tile)});
    });
}

}  // namespace bluejay
