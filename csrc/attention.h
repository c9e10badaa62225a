// Paged attention, softmax(scale · q kᵀ) v, over keys and values that lie in blocks, and the writing of them.
//
// A sequence's queries are its last tokens; a query sees the keys up to its own position, with a window only the last
// `window` of these. The batch is cut into pieces by shape alone, each piece is computed by one thread, and what must be
// added up is added in order: results do not depend on the number of threads.
//
//   several queries   a tile of queries of one head runs over all keys it sees, with an online softmax; few queries do so
//                     for several heads, whose rows are then read in turn
//   one query         the keys are cut into splits of kSplitKeys, which are joined at the end
//
// Source: Dao 2023 (arXiv:2307.08691) for the online softmax over tiles; Kwon et al. 2023 (arXiv:2309.06180) for blocks.
#pragma once

#include <cstdint>

namespace bluejay {

enum class KvType { float32, float16, bfloat16, int8 };

// Keys or values [blocks, block_size, heads, head_dim]; of int8 [..., head_dim + 4], each head's numbers and then its
// scale, a float32. The last two dims are contiguous. Strides in bytes.
struct CacheView {
    char* data;
    int64_t block_stride;
    int64_t token_stride;
};

struct AttentionArgs {
    const float* q;               // [tokens, heads, head_dim]
    float* out;                   // the same
    int64_t heads;
    int64_t head_dim;
    KvType type;
    CacheView keys;
    CacheView values;
    int64_t block_size;
    const int32_t* block_tables;  // [sequences, max_blocks]
    int64_t max_blocks;
    const int32_t* context_lens;  // [sequences]
    const int32_t* query_starts;  // [sequences + 1]
    int64_t sequences;
    float scale;
    int64_t window;               // 0: none
};

struct WriteArgs {
    const float* k;               // [tokens, heads, head_dim]
    const float* v;
    int64_t tokens;
    int64_t heads;
    int64_t head_dim;
    KvType type;
    CacheView keys;
    CacheView values;
    int64_t block_size;
    const int64_t* slots;         // [tokens], -1 skips
};

// Both trust their arguments. Several threads of the program may call at once.
void paged_attention(const AttentionArgs& args);
void write_kv(const WriteArgs& args);

constexpr int64_t kSplitKeys = 512;  // for one query: enough work for a thread, and parts for many threads
constexpr int64_t kKeyTile = 64;     // keys whose scores are held at once
constexpr int64_t kKeyBlock = 16;    // keys or values that are widened at once, for the first-level cache
constexpr int64_t kPanels = 4;       // panels of queries that a piece holds: of one head, or of several if they are few

// Some queries of one sequence and some heads, and the keys to look at.
struct AttentionTile {
    int64_t sequence;
    int64_t row;                  // of q, the first query's
    int64_t rows;
    int64_t position;             // the first query's
    int64_t head;                 // the first
    int64_t heads;
    int64_t first_key;
    int64_t end_key;
    int64_t partial;              // where a split leaves its states; -1: it is the only one
};

// What one instruction set has to offer. Scratch: scratch_floats(lanes, head_dim), aligned to 64 bytes.
struct AttentionKernels {
    int64_t lanes;                // queries in a panel: a tile has at most kPanels * lanes rows
    void (*attend)(const AttentionArgs& args, const AttentionTile& tile, float* scratch);
    // One query. For each head a state, state_floats(head_dim): [head_dim] sum(exp(score - largest) * value), then the
    // largest score, then sum(exp(score - largest)).
    void (*attend_one)(const AttentionArgs& args, const AttentionTile& tile, float* states);
    void (*store)(const float* from, void* to, KvType type, int64_t heads, int64_t head_dim);
};

constexpr int64_t state_floats(int64_t head_dim) { return head_dim + 2; }

constexpr int64_t padded_dim(int64_t head_dim) { return (head_dim + 7) / 8 * 8; }

constexpr int64_t scratch_floats(int64_t lanes, int64_t head_dim) {
    const int64_t panel = (2 * padded_dim(head_dim) + kKeyTile + 3) * lanes;  // queries, results, weights, three numbers
    return kPanels * panel + kKeyBlock * (padded_dim(head_dim) + 8);
}

extern const AttentionKernels attention_portable;
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;

}  // namespace bluejay
