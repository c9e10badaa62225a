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

// One query whose keys are split: a row of results for each split, [head_dim] and the largest score and the sum.
struct Split {
    int64_t row;
    int64_t head;
    int64_t first;
    int64_t count;
};

struct Pieces {
    std::vector<AttentionTile> tiles;
    std::vector<Split> splits;
    int64_t partials = 0;
};

void cut_one_query(AttentionTile tile, Pieces& pieces) {
    const int64_t count = (tile.end_key - tile.first_key + kSplitKeys - 1) / kSplitKeys;
    if (count > 1) pieces.splits.push_back({tile.row, tile.head, pieces.partials, count});
    for (int64_t end = tile.end_key; tile.first_key < end; tile.first_key += kSplitKeys) {
        tile.end_key = std::min(end, tile.first_key + kSplitKeys);
        tile.partial = count > 1 ? pieces.partials++ : -1;
        pieces.tiles.push_back(tile);
    }
}

Pieces cut(const AttentionArgs& args, int64_t tile_rows) {
    Pieces pieces;
    for (int64_t s = 0; s < args.sequences; ++s) {
        const int64_t start = args.query_starts[s], rows = args.query_starts[s + 1] - start;
        const int64_t position = args.context_lens[s] - rows;
        // The last tile sees most keys: it goes first, so that no thread begins a long one when the others are done.
        for (int64_t first = (rows - 1) / tile_rows * tile_rows; rows > 0 && first >= 0; first -= tile_rows) {
            const int64_t count = std::min(tile_rows, rows - first);
            const int64_t first_key = args.window > 0 ? std::max<int64_t>(0, position + first + 1 - args.window) : 0;
            for (int64_t head = 0; head < args.heads; ++head) {
                const AttentionTile tile{s,         head, start + first, count, position + first, first_key,
                                         position + first + count, -1};
                if (rows == 1) cut_one_query(tile, pieces);
                else pieces.tiles.push_back(tile);
            }
        }
    }
    return pieces;
}

void join(const AttentionArgs& args, const Split& split, const float* partials) {
    const int64_t stride = args.head_dim + 2;
    float* out = args.out + (split.row * args.heads + split.head) * args.head_dim;
    float largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < split.count; ++i) {
        largest = std::fmax(largest, partials[(split.first + i) * stride + args.head_dim]);
    }
    std::fill(out, out + args.head_dim, 0.0f);
    for (int64_t i = 0; i < split.count; ++i) {
        const float* partial = partials + (split.first + i) * stride;
        const float factor = std::exp(partial[args.head_dim] - largest);
        for (int64_t k = 0; k < args.head_dim; ++k) out[k] += partial[k] * factor;
        sum += partial[args.head_dim + 1] * factor;
    }
    for (int64_t k = 0; k < args.head_dim; ++k) out[k] /= sum;
}

}  // namespace

void paged_attention(const AttentionArgs& args) {
    const AttentionKernels& kernel = kernels();
    const Pieces pieces = cut(args, kPanels * kernel.lanes);
    std::vector<float> partials(pieces.partials * (args.head_dim + 2));
    parallel_for(static_cast<int64_t>(pieces.tiles.size()), [&](int64_t index) {
        const AttentionTile& tile = pieces.tiles[index];
        float* out = args.out + (tile.row * args.heads + tile.head) * args.head_dim;
        if (tile.partial >= 0) {
            float* partial = partials.data() + tile.partial * (args.head_dim + 2);
            kernel.attend_one(args, tile, partial, partial + args.head_dim, partial + args.head_dim + 1);
        } else if (args.query_starts[tile.sequence + 1] - args.query_starts[tile.sequence] == 1) {
            float largest, sum;
            kernel.attend_one(args, tile, out, &largest, &sum);
            for (int64_t k = 0; k < args.head_dim; ++k) out[k] /= sum;
        } else {
            kernel.attend(args, tile, scratch_of(scratch_floats(kernel.lanes, args.head_dim)));
        }
    });
    for (const Split& split : pieces.splits) join(args, split, partials.data());
}

void write_kv(const WriteArgs& args) {
    const AttentionKernels& kernel = kernels();
    const auto write = [&](int64_t token) {
        const int64_t slot = args.slots[token];
        if (slot < 0) return;
        const int64_t block = slot / args.block_size, offset = slot % args.block_size;
        const auto to = [&](const CacheView& view) {
            return view.data + block * view.block_stride + offset * view.token_stride;
        };
        kernel.store(args.k + token * args.row, to(args.keys), args.type, args.row);
        kernel.store(args.v + token * args.row, to(args.values), args.type, args.row);
    };
    if (args.tokens * args.row < 32768) {  // less than it takes to wake the others
        for (int64_t token = 0; token < args.tokens; ++token) write(token);
    } else {
        parallel_for(args.tokens, write);
    }
}

}  // namespace bluejay
