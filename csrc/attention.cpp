// How attention over a ragged batch is cut into pieces, and how splits are joined.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kPiecesPerThread = 4;  // so that threads that are held up cost little at the end

const AttentionKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return attention_avx512;
    if (active() == Isa::avx2) return attention_avx2;
#endif
    return attention_portable;
}

// Memory of a thread that grows and stays.
float* scratch_of(int64_t floats) {
    struct Free {
        void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset();
        size = 0;
        memory.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
        size = floats;
    }
    return memory.get();
}

// One query and head whose keys are split; its states are `step` apart.
struct Split {
    int64_t row;
    int64_t head;
    int64_t first;
    int64_t step;
    int64_t count;
};

struct Pieces {
    std::vector<AttentionTile> tiles;
    std::vector<Split> splits;
    int64_t partials = 0;
};

int64_t splits_of(const AttentionTile& tile) { return (tile.end_key - tile.first_key + kSplitKeys - 1) / kSplitKeys; }

void cut_one_query(AttentionTile tile, Pieces& pieces) {
    const int64_t count = splits_of(tile);
    for (int64_t h = 0; count > 1 && h < tile.heads; ++h) {
        pieces.splits.push_back({tile.row, tile.head + h, pieces.partials + h, tile.heads, count});
    }
    for (int64_t end = tile.end_key; tile.first_key < end; tile.first_key += kSplitKeys) {
        tile.end_key = std::min(end, tile.first_key + kSplitKeys);
        tile.partial = count > 1 ? pieces.partials : -1;
        if (count > 1) pieces.partials += tile.heads;
        pieces.tiles.push_back(tile);
    }
}

// Tiles of at most tile_rows queries and all heads; the last of a sequence sees most keys and comes first, so that no
// thread begins a long one when the others are done.
std::vector<AttentionTile> tiles_of(const AttentionArgs& args, int64_t tile_rows) {
    std::vector<AttentionTile> tiles;
    for (int64_t s = 0; s < args.sequences; ++s) {
        const int64_t start = args.query_starts[s], rows = args.query_starts[s + 1] - start;
        for (int64_t first = (rows - 1) / tile_rows * tile_rows; rows > 0 && first >= 0; first -= tile_rows) {
            const int64_t count = std::min(tile_rows, rows - first), position = args.context_lens[s] - rows + first;
            const int64_t first_key = args.window > 0 ? std::max<int64_t>(0, position + 1 - args.window) : 0;
            tiles.push_back({s, start + first, count, position, 0, args.heads, first_key, position + count, -1});
        }
    }
    return tiles;
}

bool is_one_query(const AttentionArgs& args, const AttentionTile& tile) {
    return args.query_starts[tile.sequence + 1] - args.query_starts[tile.sequence] == 1;
}

// Cut tiles by heads. The heads of one query, or of few, stay together as long as there are pieces enough for the threads:
// how they are dealt changes nothing in the results.
Pieces cut(const AttentionArgs& args, const std::vector<AttentionTile>& tiles, int64_t lanes) {
    int64_t splits = 0;
    for (const AttentionTile& tile : tiles) splits += is_one_query(args, tile) ? splits_of(tile) : 1;
    int64_t together = args.heads;
    while (together > 1 && splits * (args.heads / together) < kPiecesPerThread * num_threads()) together /= 2;
    Pieces pieces;
    for (AttentionTile tile : tiles) {
        const bool one = is_one_query(args, tile);
        for (tile.head = 0; tile.head < args.heads; tile.head += tile.heads) {
            const int64_t most = one ? together : std::min(together, kPanels / ((tile.rows + lanes - 1) / lanes));
            tile.heads = std::min(most, args.heads - tile.head);
            if (one) cut_one_query(tile, pieces);
            else pieces.tiles.push_back(tile);
        }
    }
    return pieces;
}

float* out_of(const AttentionArgs& args, int64_t row, int64_t head) {
    return args.out + (row * args.heads + head) * args.head_dim;
}

void join(const AttentionArgs& args, const Split& split, const float* partials) {
    const int64_t dim = args.head_dim, step = split.step * state_floats(dim);
    const float* state = partials + split.first * state_floats(dim);
    float* out = out_of(args, split.row, split.head);
    float largest = state[dim], sum = 0;
    for (int64_t i = 1; i < split.count; ++i) largest = std::max(largest, state[i * step + dim]);
    std::fill(out, out + dim, 0.0f);
    for (int64_t i = 0; i < split.count; ++i, state += step) {
        const float factor = std::exp(state[dim] - largest);
        for (int64_t k = 0; k < dim; ++k) out[k] += state[k] * factor;
        sum += state[dim + 1] * factor;
    }
    for (int64_t k = 0; k < dim; ++k) out[k] /= sum;
}

void attend_one(const AttentionKernels& kernel, const AttentionArgs& args, const AttentionTile& tile, float* partials) {
    const int64_t floats = state_floats(args.head_dim);
    if (tile.partial >= 0) return kernel.attend_one(args, tile, partials + tile.partial * floats);
    float* state = scratch_of(tile.heads * floats);
    kernel.attend_one(args, tile, state);
    for (int64_t h = 0; h < tile.heads; ++h, state += floats) {
        float* out = out_of(args, tile.row, tile.head + h);
        for (int64_t k = 0; k < args.head_dim; ++k) out[k] = state[k] / state[args.head_dim + 1];
    }
}

}  // namespace

void paged_attention(const AttentionArgs& args) {
    const AttentionKernels& kernel = kernels();
    const Pieces pieces = cut(args, tiles_of(args, kPanels * kernel.lanes), kernel.lanes);
    std::vector<float> partials(pieces.partials * state_floats(args.head_dim));
    parallel_for(static_cast<int64_t>(pieces.tiles.size()), [&](int64_t index) {
        const AttentionTile& tile = pieces.tiles[index];
        if (is_one_query(args, tile)) attend_one(kernel, args, tile, partials.data());
        else kernel.attend(args, tile, scratch_of(scratch_floats(kernel.lanes, args.head_dim)));
    });
    for (const Split& split : pieces.splits) join(args, split, partials.data());
}

void write_kv(const WriteArgs& args) {
    const AttentionKernels& kernel = kernels();
    const int64_t row = args.heads * args.head_dim;
    const auto write = [&](int64_t token) {
        const int64_t slot = args.slots[token];
        if (slot < 0) return;
        const int64_t block = slot / args.block_size, offset = slot % args.block_size;
        const auto to = [&](const CacheView& view) {
            return view.data + block * view.block_stride + offset * view.token_stride;
        };
        kernel.store(args.k + token * row, to(args.keys), args.type, args.heads, args.head_dim);
        kernel.store(args.v + token * row, to(args.values), args.type, args.heads, args.head_dim);
    };
    if (args.tokens * row < 32768) {  // less than it takes to wake the others
        for (int64_t token = 0; token < args.tokens; ++token) write(token);
    } else {
        parallel_for(args.tokens, write);
    }
}

}  // namespace bluejay
