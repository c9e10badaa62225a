// The attention kernels, written once for vectors of any size (csrc/vectors.h).
//
// Several queries lie side by side in the lanes of a vector ("a panel", transposed: [head_dim][lanes]). Keys and values
// are widened to float32 once a tile, in their natural layout, and broadcast one number at a time. So both products are
// the same small one, the softmax needs no sums across lanes, and any head_dim works:
//
//   weights [keys][lanes]      = keys   [keys][head_dim] · queries [head_dim][lanes]
//   mixed   [head_dim][lanes] += valuesᵀ [head_dim][keys] · weights [keys][lanes]
#pragma once

#include <cfloat>

#include "attention.h"
#include "vectors.h"

namespace bluejay {
namespace {

typedef uint16_t Halves __attribute__((vector_size(BLUEJAY_VECTOR_BYTES / 2)));
typedef int8_t Quarters __attribute__((vector_size(BLUEJAY_VECTOR_BYTES / 4)));

// The cache's number formats. A float16 without its own instruction: the bits as a float32 are 2^112 times too small,
// whether the number is normal or not; infinities and NaN get the largest exponent instead.
struct Unscaled {  // floats: what multiplies by their scale vanishes when it is compiled
    static constexpr int64_t kScaleBytes = 0;
    static BLUEJAY_INLINE float scale(const void*, int64_t) { return 1; }
};

struct Float32 : Unscaled {
    typedef float Number;
    static BLUEJAY_INLINE Vec widen(const Number* from) { return load(from); }
    static BLUEJAY_INLINE float widen_one(Number x) { return x; }
    static BLUEJAY_INLINE void narrow(Number* to, Vec v) { store(to, v); }
    static BLUEJAY_INLINE Number narrow_one(float x) { return x; }
};

struct BFloat16 : Unscaled {
    typedef uint16_t Number;
    static BLUEJAY_INLINE Vec widen(const Number* from) {
        return as<Vec>(__builtin_convertvector(load<Halves>(from), Bits) << 16);
    }
    static BLUEJAY_INLINE float widen_one(Number x) { return as<float>(uint32_t(x) << 16); }
    static BLUEJAY_INLINE void narrow(Number* to, Vec v) {
        const Bits bits = as<Bits>(v);
        const Bits even = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Bits{} + 0x7fc0;
        const Halves halves = __builtin_convertvector(even, Halves);
        memcpy(to, &halves, sizeof(halves));
    }
    static BLUEJAY_INLINE Number narrow_one(float x) {
        const uint32_t bits = as<uint32_t>(x);
        const uint32_t even = bits + 0x7fff + (bits >> 16 & 1);
        return x != x ? 0x7fc0 : even >> 16;
    }
};

struct Float16 : Unscaled {
    typedef uint16_t Number;
    static BLUEJAY_INLINE Vec widen(const Number* from) {
#if BLUEJAY_VECTOR_BYTES == 64
        return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));  // plain cvtph sets off GCC's warnings
#elif BLUEJAY_VECTOR_BYTES == 32
        return _mm256_cvtph_ps(load<__m128i>(from));
#else
        const Bits half = __builtin_convertvector(load<Halves>(from), Bits);
        const Bits magnitude = (half & 0x7fff) << 13;
        const Vec finite = as<Vec>(magnitude) * 0x1p112f;
        const Bits bits = magnitude >= 0x0f800000 ? magnitude | 0x70000000 : as<Bits>(finite);
        return as<Vec>(bits | (half & 0x8000) << 16);
#endif
    }
    static BLUEJAY_INLINE float widen_one(Number x) {
        const uint32_t magnitude = (x & 0x7fffu) << 13;
        const uint32_t finite = as<uint32_t>(as<float>(magnitude) * 0x1p112f);
        return as<float>((magnitude >= 0x0f800000 ? magnitude | 0x70000000 : finite) | (x & 0x8000u) << 16);
    }
    static BLUEJAY_INLINE void narrow(Number* to, Vec v) {
#if BLUEJAY_VECTOR_BYTES == 64
        const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        memcpy(to, &halves, sizeof(halves));
#elif BLUEJAY_VECTOR_BYTES == 32
        const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        memcpy(to, &halves, sizeof(halves));
#else
        for (int lane = 0; lane < kLanes; ++lane) to[lane] = narrow_one(v[lane]);
#endif
    }
    static BLUEJAY_INLINE Number narrow_one(float x) {
        const uint32_t bits = as<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
        if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65,520 and more round to infinity
        if (magnitude < 0x38800000) {                       // no normal float16: let an addition do the rounding
            return sign | (as<uint32_t>(as<float>(magnitude) + 0.5f) - as<uint32_t>(0.5f));
        }
        return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
};

struct Int8 {  // a head's scale comes after its numbers, not aligned
    typedef int8_t Number;
    static constexpr int64_t kScaleBytes = sizeof(float);
    static BLUEJAY_INLINE float scale(const Number* row, int64_t head_dim) { return load<float>(row + head_dim); }
    static BLUEJAY_INLINE Vec widen(const Number* from) {
#if BLUEJAY_VECTOR_BYTES == 64
        return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from)));
#elif BLUEJAY_VECTOR_BYTES == 32
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
        return __builtin_convertvector(__builtin_convertvector(load<Quarters>(from), Ints), Vec);
#endif
    }
    static BLUEJAY_INLINE float widen_one(Number x) { return x; }
    // Of numbers that the scale has divided. Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    static BLUEJAY_INLINE void narrow(Number* to, Vec v) {
        const Quarters integers = __builtin_convertvector(as<Ints>(v + 12582912.0f), Quarters);
        memcpy(to, &integers, sizeof(integers));
    }
    static BLUEJAY_INLINE Number narrow_one(float x) { return Number(as<int32_t>(x + 12582912.0f)); }
};

template <typename Format>
constexpr int64_t head_bytes_of(int64_t head_dim) {
    return head_dim * int64_t(sizeof(typename Format::Number)) + Format::kScaleBytes;
}

constexpr int64_t kChunk = 16;  // dims: no vector is longer

// Where a dim of a widened block's first row is.
BLUEJAY_INLINE int64_t at_dim(int64_t i) { return i / kChunk * kChunk * kKeyBlock + i % kChunk; }

// Where each of some keys begins, one pointer to the head's numbers of each.
struct Rows {
    const char* at[kKeyTile];
};

BLUEJAY_INLINE void locate(const CacheView& view, const AttentionArgs& args, const AttentionTile& tile, int64_t head_bytes,
                           int64_t first, int64_t count, Rows& rows) {
    const int32_t* table = args.block_tables + tile.sequence * args.max_blocks;
    int64_t block = first / args.block_size, offset = first % args.block_size;
    for (int64_t j = 0; j < count; ++j) {
        rows.at[j] = view.data + table[block] * view.block_stride + offset * view.token_stride + tile.head * head_bytes;
        if (++offset == args.block_size) ++block, offset = 0;
    }
}

// Widen a block of rows into [dims / 16][kKeyBlock][16], filled up with zeros to eights of rows and dims: what is read
// together lies together, at distances that are known while compiling.
template <typename Format>
void widen_rows(const char* const* rows, int64_t count, int64_t head_dim, float* to) {
    const int64_t padded = padded_dim(head_dim);
    for (int64_t j = 0; j < count; ++j, to += kChunk) {
        const auto* from = reinterpret_cast<const typename Format::Number*>(rows[j]);
        const float scale = Format::scale(from, head_dim);
        int64_t i = 0;
        for (; i + kLanes <= head_dim; i += kLanes) store(to + at_dim(i), Format::widen(from + i) * scale);
        for (; i < head_dim; ++i) to[at_dim(i)] = Format::widen_one(from[i]) * scale;
        for (; i < padded; ++i) to[at_dim(i)] = 0;
    }
    for (int64_t j = count; j % 8 != 0; ++j, to += kChunk) {
        for (int64_t i = 0; i < padded; ++i) to[at_dim(i)] = 0;
    }
}

// acc[r] += sum over i of a[r * row_step + i * step] * b[i][lanes]
template <int ROWS, int VECS>
BLUEJAY_INLINE void multiply(Vec (&acc)[ROWS][VECS], const float* a, int64_t row_step, int64_t step, const float* b,
                             int64_t count) {
    for (int64_t i = 0; i < count; ++i, a += step, b += VECS * kLanes) {
        Vec right[VECS];
#pragma GCC unroll 4
        for (int c = 0; c < VECS; ++c) right[c] = load(b + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec left = splat(a[r * row_step]);
#pragma GCC unroll 4
            for (int c = 0; c < VECS; ++c) acc[r][c] = multiply_add(left, right[c], acc[r][c]);
        }
    }
}

// VECS * kLanes queries of a head, how far they have come, and what they make of the tile of keys at hand.
struct Panel {
    float* queries;               // [padded_dim][lanes], scaled
    float* mixed;                 // [padded_dim][lanes]: sum of exp(score - largest) * value
    float* weights;               // [kKeyTile][lanes]: scores, then exp(score - largest)
    float* largest;               // [lanes]
    float* sum;                   // [lanes]: sum of exp(score - largest)
    float* factor;                // [lanes]: what earlier sums and results must be multiplied with
    int64_t position;             // the first query's; the others' follow
    int64_t count;                // of the tile's keys, those that any of the queries sees end here
};

// Rows that will be read next, fetched bit by bit while others are worked on: memory and arithmetic take as long here.
struct Ahead {
    const char* const* at;
    int64_t count;
    int64_t bytes;                // of a row
    int64_t byte;

    BLUEJAY_INLINE void fetch(int64_t lines) {
        for (; lines > 0 && count > 0; --lines, byte += 64) {
            if (byte >= bytes) {
                byte = 0, ++at;
                if (--count == 0) return;
            }
            __builtin_prefetch(*at + byte, 0, 2);
        }
    }
    // What of them is fetched beside the block of rows from `first` on.
    Ahead beside(int64_t first) const {
        return {at + first, count - first < kKeyBlock ? count - first : kKeyBlock, bytes, 0};
    }
};

template <int VECS>
void begin(Panel& panel, const AttentionArgs& args, const float* q, int64_t rows) {
    constexpr int64_t lanes = VECS * kLanes;
    memset(panel.queries, 0, padded_dim(args.head_dim) * lanes * sizeof(float));
    memset(panel.mixed, 0, padded_dim(args.head_dim) * lanes * sizeof(float));
    for (int64_t lane = 0; lane < lanes; ++lane) panel.largest[lane] = -FLT_MAX, panel.sum[lane] = 0;
    for (int64_t lane = 0; lane < rows; ++lane, q += args.heads * args.head_dim) {
        for (int64_t i = 0; i < args.head_dim; ++i) panel.queries[i * lanes + lane] = q[i] * args.scale;
    }
}

template <int VECS>
void finish(const Panel& panel, const AttentionArgs& args, float* out, int64_t rows) {
    constexpr int64_t lanes = VECS * kLanes;
    for (int64_t lane = 0; lane < rows; ++lane, out += args.heads * args.head_dim) {
        const float factor = 1.0f / panel.sum[lane];
        for (int64_t i = 0; i < args.head_dim; ++i) out[i] = panel.mixed[i * lanes + lane] * factor;
    }
}

// Turn scores into weights, exp(score - largest), 0 where a query does not see a key.
template <int VECS, bool MASKED>
void softmax(const Panel& panel, int64_t first_key, int64_t window) {
    const int64_t count = panel.count;
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) {
        float* column = panel.weights + c * kLanes;
        Ints age = {};  // keys between a query and the first key: seen are those with 0 <= age < window
        for (int lane = 0; lane < kLanes; ++lane) age[lane] = int32_t(panel.position + c * kLanes + lane - first_key);
        const int32_t oldest = window > 0 ? int32_t(window) : INT32_MAX;
        const Vec before = load(panel.largest + c * kLanes);
        Vec largest = before;
        for (int64_t j = 0; j < count; ++j) {
            const Vec score = load(column + j * VECS * kLanes);
            if constexpr (MASKED) {
                const Ints behind = age - int32_t(j);
                largest = (behind >= 0) & (behind < oldest) ? larger(score, largest) : largest;
            } else {
                largest = larger(score, largest);
            }
        }
        Vec sum = {};
        for (int64_t j = 0; j < count; ++j) {
            Vec weight = exp_negative(load(column + j * VECS * kLanes) - largest);
            if constexpr (MASKED) {
                const Ints behind = age - int32_t(j);
                weight = (behind >= 0) & (behind < oldest) ? weight : Vec{};
            }
            store(column + j * VECS * kLanes, weight);
            sum += weight;
        }
        const Vec factor = exp_negative(before - largest);
        store(panel.factor + c * kLanes, factor);
        store(panel.largest + c * kLanes, largest);
        store(panel.sum + c * kLanes, load(panel.sum + c * kLanes) * factor + sum);
    }
}

// Turn a panel's scores of a tile of keys into weights.
template <int VECS>
void weigh(const Panel& panel, const AttentionArgs& args, int64_t first_key) {
    const int64_t last = panel.position + VECS * kLanes - 1;
    if (panel.count == 0) return;
    if (first_key + panel.count - 1 > panel.position || (args.window > 0 && first_key <= last - args.window)) {
        softmax<VECS, true>(panel, first_key, args.window);
    } else {
        softmax<VECS, false>(panel, first_key, args.window);
    }
}

// How many of `count` keys from first_key on lie before the last that a panel sees; 0 if it sees none of them.
template <int VECS>
int64_t seen(const Panel& panel, int64_t window, int64_t first_key, int64_t count) {
    const int64_t end = panel.position + VECS * kLanes - first_key;
    if (end <= 0 || (window > 0 && first_key + (count < end ? count : end) <= panel.position - window + 1)) return 0;
    return count < end ? count : end;
}

// Lines to be fetched with each `work` of the padded * kKeyBlock numbers of a block.
BLUEJAY_INLINE int64_t lines_beside(const Ahead& ahead, int64_t work, int64_t padded) {
    const int64_t lines = ahead.count * ((ahead.bytes + 63) / 64), times = padded * kKeyBlock / work;
    return (lines + times - 1) / (times > 0 ? times : 1);
}

// Let a panel score a block of keys, from number `first` of the tile on.
template <int VECS, int ROWS>
BLUEJAY_INLINE void score(const Panel& panel, int64_t head_dim, const float* keys, int64_t first, int64_t count, Ahead ahead) {
    constexpr int64_t lanes = VECS * kLanes;
    const int64_t padded = padded_dim(head_dim), lines = lines_beside(ahead, kChunk * ROWS, padded);
    float* weights = panel.weights + first * lanes;
    if (count > panel.count - first) count = panel.count - first;
    for (int64_t j = 0; j < count; j += ROWS) {
        Vec acc[ROWS][VECS] = {};
        for (int64_t i = 0; i < padded; i += kChunk) {
            ahead.fetch(lines);
            multiply<ROWS, VECS>(acc, keys + at_dim(i) + j * kChunk, kChunk, 1, panel.queries + i * lanes,
                                 padded - i < kChunk ? padded - i : kChunk);
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < VECS; ++c) store(weights + (j + r) * lanes + c * kLanes, acc[r][c]);
        }
    }
}

// Let a panel mix a block of values.
template <int VECS, int ROWS>
BLUEJAY_INLINE void mix_block(const Panel& panel, int64_t head_dim, const float* values, int64_t first, int64_t count,
                              Ahead ahead) {
    constexpr int64_t lanes = VECS * kLanes;
    const int64_t padded = padded_dim(head_dim), lines = lines_beside(ahead, kKeyBlock * ROWS, padded);
    const float* weights = panel.weights + first * lanes;
    if (count > panel.count - first) count = panel.count - first;
    if (count <= 0) return;
    Vec factor[VECS];
    for (int c = 0; c < VECS; ++c) factor[c] = first == 0 ? load(panel.factor + c * kLanes) : splat(1);
    for (int64_t i = 0; i < padded; i += ROWS) {
        ahead.fetch(lines);
        float* mixed = panel.mixed + i * lanes;
        Vec acc[ROWS][VECS];
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < VECS; ++c) acc[r][c] = load(mixed + r * lanes + c * kLanes) * factor[c];
        }
        multiply<ROWS, VECS>(acc, values + at_dim(i), 1, kChunk, weights, count);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < VECS; ++c) store(mixed + r * lanes + c * kLanes, acc[r][c]);
        }
    }
}

// Let a head's panels look at a tile of keys. Their rows are widened block by block, to stay in the first-level cache;
// while keys are worked on, the values are fetched, and meanwhile the keys that are `next`.
template <typename Format, int VECS, int ROWS>
__attribute__((noinline)) void look(Panel* panels, int64_t num_panels, const AttentionArgs& args, int64_t first_key,
                                    int64_t count, const Rows& keys, const Rows& values, const Ahead& next, float* block) {
    const int64_t dim = args.head_dim;
    const Ahead nothing{}, ahead{values.at, count, head_bytes_of<Format>(dim), 0};
    for (int64_t p = 0; p < num_panels; ++p) panels[p].count = seen<VECS>(panels[p], args.window, first_key, count);
    for (int64_t first = 0; first < count; first += kKeyBlock) {
        const int64_t some = count - first < kKeyBlock ? count - first : kKeyBlock;
        widen_rows<Format>(keys.at + first, some, dim, block);
        for (int64_t p = 0; p < num_panels; ++p) {
            score<VECS, ROWS>(panels[p], dim, block, first, some, p == 0 ? ahead.beside(first) : nothing);
        }
    }
    for (int64_t p = 0; p < num_panels; ++p) weigh<VECS>(panels[p], args, first_key);
    for (int64_t first = 0; first < count; first += kKeyBlock) {
        const int64_t some = count - first < kKeyBlock ? count - first : kKeyBlock;
        widen_rows<Format>(values.at + first, some, dim, block);
        for (int64_t p = 0; p < num_panels; ++p) {
            mix_block<VECS, ROWS>(panels[p], dim, block, first, some, p == 0 ? next.beside(first) : nothing);
        }
    }
}

// Heads take turns within a tile of keys, as in attend_one_as.
template <typename Format, int VECS, int ROWS>
void look_at_keys(Panel* panels, int64_t num_panels, const AttentionArgs& args, const AttentionTile& tile, float* block) {
    const int64_t head_bytes = head_bytes_of<Format>(args.head_dim);
    Rows keys, values;
    int64_t count = tile.end_key - tile.first_key < kKeyTile ? tile.end_key - tile.first_key : kKeyTile;
    locate(args.keys, args, tile, head_bytes, tile.first_key, count, keys);
    for (int64_t first = tile.first_key; first < tile.end_key; first += kKeyTile) {
        locate(args.values, args, tile, head_bytes, first, count, values);
        const int64_t rest = tile.end_key - first - kKeyTile, behind = rest < 0 ? 0 : rest < kKeyTile ? rest : kKeyTile;
        for (int64_t h = 0; h < tile.heads; ++h) {
            const bool last = h + 1 == tile.heads;
            Rows next = keys;
            if (last) locate(args.keys, args, tile, head_bytes, first + kKeyTile, behind, next);
            else for (int64_t j = 0; j < count; ++j) next.at[j] += head_bytes;
            look<Format, VECS, ROWS>(panels + h * num_panels, num_panels, args, first, count, keys, values,
                                     {next.at, last ? behind : count, head_bytes, 0}, block);
            keys = next;
            for (int64_t j = 0; j < count; ++j) values.at[j] += head_bytes;
        }
        count = behind;
    }
}

template <typename Format, int VECS, int ROWS>
void attend_panels(const AttentionArgs& args, const AttentionTile& tile, float* scratch) {
    constexpr int64_t lanes = VECS * kLanes;
    const int64_t panel_floats = padded_dim(args.head_dim) * lanes, num_panels = (tile.rows + lanes - 1) / lanes;
    Panel panels[kPanels];
    const auto each = [&](auto call) {  // of its number, where its first query lies, and how many it has
        for (int64_t i = 0; i < tile.heads * num_panels; ++i) {
            const int64_t head = tile.head + i / num_panels, row = i % num_panels * lanes;
            call(panels[i], ((tile.row + row) * args.heads + head) * args.head_dim, row,
                 tile.rows - row < lanes ? tile.rows - row : lanes);
        }
    };
    each([&](Panel& panel, int64_t start, int64_t row, int64_t rows) {
        float* weights = scratch + 2 * panel_floats;
        float* largest = weights + kKeyTile * lanes;
        panel = {scratch,         scratch + panel_floats, weights, largest, largest + lanes, largest + 2 * lanes,
                 tile.position + row, 0};
        scratch = largest + 3 * lanes;
        begin<VECS>(panel, args, args.q + start, rows);
    });
    look_at_keys<Format, VECS, ROWS>(panels, num_panels, args, tile, scratch);
    each([&](Panel& panel, int64_t start, int64_t, int64_t rows) { finish<VECS>(panel, args, args.out + start, rows); });
}

// 4 x 3 (8 x 1) sums, 3 (1) vectors of queries and one broadcast number: what 16 registers hold.
template <typename Format>
void attend_as(const AttentionArgs& args, const AttentionTile& tile, float* scratch) {
    if (tile.rows <= kLanes) {
        attend_panels<Format, 1, 8>(args, tile, scratch);
    } else {
        attend_panels<Format, 3, 4>(args, tile, scratch);
    }
}

void attend(const AttentionArgs& args, const AttentionTile& tile, float* scratch) {
    switch (args.type) {
        case KvType::float32: return attend_as<Float32>(args, tile, scratch);
        case KvType::float16: return attend_as<Float16>(args, tile, scratch);
        case KvType::bfloat16: return attend_as<BFloat16>(args, tile, scratch);
        case KvType::int8: return attend_as<Int8>(args, tile, scratch);
    }
}

// to[r] = sum of the lanes of acc[r]
BLUEJAY_INLINE void sum_lanes(const Vec (&acc)[4], float* to) {
#if BLUEJAY_VECTOR_BYTES > 16
    __m128 quarter[4];
    for (int r = 0; r < 4; ++r) {
        __m128 parts[kLanes / 4];
        memcpy(parts, &acc[r], sizeof(parts));
        quarter[r] = parts[0];
        for (int i = 1; i < kLanes / 4; ++i) quarter[r] = quarter[r] + parts[i];
    }
    const __m128 low = _mm_hadd_ps(quarter[0], quarter[1]), high = _mm_hadd_ps(quarter[2], quarter[3]);
    _mm_storeu_ps(to, _mm_hadd_ps(low, high));
#else
    for (int r = 0; r < 4; ++r) {
        to[r] = 0;
        for (int lane = 0; lane < kLanes; ++lane) to[r] += acc[r][lane];
    }
#endif
}

// Fetch the cache line that begins at byte `at` of a row, if one does.
BLUEJAY_INLINE void fetch(const char* row, int64_t at) {
    if (at % 64 == 0) __builtin_prefetch(row + at, 0, 2);
}

// Fetch the cache line that a head's scale is in, if it has one: it may lie past those that begin among its numbers.
template <typename Format>
BLUEJAY_INLINE void fetch_scale(const char* row, int64_t head_dim) {
    if (Format::kScaleBytes > 0) __builtin_prefetch(row + head_bytes_of<Format>(head_dim) - 1, 0, 2);
}

// scores[j] = q · key j, four keys at a time. `ahead` are rows that will be read next.
template <typename Format>
BLUEJAY_INLINE void score_keys(const float* q, const Rows& rows, const Rows& ahead, int64_t count, int64_t head_dim,
                               float* scores) {
    typedef typename Format::Number Number;
    for (int64_t j = 0; j < count; j += 4) {
        const Number* key[4];
        const char* next[4];
        for (int r = 0; r < 4; ++r) {
            const int64_t row = j + r < count ? j + r : count - 1;
            key[r] = reinterpret_cast<const Number*>(rows.at[row]);
            next[r] = ahead.at[row];
        }
        Vec acc[4] = {};
        int64_t i = 0;
        for (; i + kLanes <= head_dim; i += kLanes) {
            const Vec query = load(q + i);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                acc[r] = multiply_add(query, Format::widen(key[r] + i), acc[r]);
                fetch(next[r], i * sizeof(Number));
            }
        }
        sum_lanes(acc, scores + j);
        for (; i < head_dim; ++i) {
            for (int r = 0; r < 4; ++r) scores[j + r] += q[i] * Format::widen_one(key[r][i]);
        }
        for (int r = 0; r < 4; ++r) {
            scores[j + r] *= Format::scale(key[r], head_dim);
            fetch_scale<Format>(next[r], head_dim);
        }
    }
}

// mixed = mixed * factor + sum of weights[j] * value j, over COUNT values.
template <typename Format, int COUNT>
BLUEJAY_INLINE void mix(const float* weights, const char* const* rows, const char* const* ahead, int64_t head_dim,
                        float factor, float* mixed) {
    typedef typename Format::Number Number;
    const Number* value[COUNT];
    float weight[COUNT];
    for (int r = 0; r < COUNT; ++r) {
        value[r] = reinterpret_cast<const Number*>(rows[r]);
        weight[r] = weights[r] * Format::scale(value[r], head_dim);
        fetch_scale<Format>(ahead[r], head_dim);
    }
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
        Vec sum = load(mixed + i) * factor;
#pragma GCC unroll 4
        for (int r = 0; r < COUNT; ++r) {
            sum = multiply_add(splat(weight[r]), Format::widen(value[r] + i), sum);
            fetch(ahead[r], i * sizeof(Number));
        }
        store(mixed + i, sum);
    }
    for (; i < head_dim; ++i) {
        float sum = mixed[i] * factor;
        for (int r = 0; r < COUNT; ++r) sum += weight[r] * Format::widen_one(value[r][i]);
        mixed[i] = sum;
    }
}

// The same over any number of values, four at a time.
template <typename Format>
BLUEJAY_INLINE void mix_values(const float* weights, const Rows& rows, const Rows& ahead, int64_t count,
                               int64_t head_dim, float factor, float* mixed) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4, factor = 1) {
        mix<Format, 4>(weights + j, rows.at + j, ahead.at + j, head_dim, factor, mixed);
    }
    for (; j < count; ++j, factor = 1) mix<Format, 1>(weights + j, rows.at + j, ahead.at + j, head_dim, factor, mixed);
}

// Join `count` scores, already in `scores`, and their values to what is known of one head.
template <typename Format>
BLUEJAY_INLINE void join_values(float* scores, const AttentionArgs& args, const Rows& values, const Rows& ahead,
                                int64_t count, float* state) {
    float* largest = state + args.head_dim;
    float* sum = largest + 1;
    float top = *largest;
    for (int64_t j = 0; j < count; ++j) {
        scores[j] *= args.scale;
        top = scores[j] > top ? scores[j] : top;
    }
    for (int64_t j = 0; j < count; j += kLanes) store(scores + j, exp_negative(load(scores + j) - top));
    const float factor = exp_negative(splat(*largest - top))[0];
    float added = 0;
    for (int64_t j = 0; j < count; ++j) added += scores[j];
    *sum = *sum * factor + added;
    *largest = top;
    mix_values<Format>(scores, values, ahead, count, args.head_dim, factor, state);
}

// One query is bound by memory: while keys are read, the values are fetched, and while these are read, the next keys.
// Heads take turns within a round, as pages are larger than a head's row: else each row costs a search for its page.
template <typename Format>
void attend_one_as(const AttentionArgs& args, const AttentionTile& tile, float* states) {
    constexpr int64_t round = 32;  // keys: 16 KiB of keys and 16 KiB of values with 256 dims of 16 bits
    const int64_t dim = args.head_dim, head_bytes = head_bytes_of<Format>(dim);
    const float* q = args.q + (tile.row * args.heads + tile.head) * dim;
    float scores[round + kLanes] = {};
    Rows keys, values;
    memset(states, 0, tile.heads * (dim + 2) * sizeof(float));
    for (int64_t h = 0; h < tile.heads; ++h) states[h * (dim + 2) + dim] = -FLT_MAX;
    int64_t count = tile.end_key - tile.first_key < round ? tile.end_key - tile.first_key : round;
    locate(args.keys, args, tile, head_bytes, tile.first_key, count, keys);
    for (int64_t first = tile.first_key; first < tile.end_key; first += round) {
        locate(args.values, args, tile, head_bytes, first, count, values);
        const int64_t rest = tile.end_key - first - round, next = rest < 0 ? 0 : rest < round ? rest : round;
        for (int64_t h = 0; h < tile.heads; ++h) {
            score_keys<Format>(q + h * dim, keys, values, count, dim, scores);
            if (h + 1 < tile.heads) {
                for (int64_t j = 0; j < count; ++j) keys.at[j] += head_bytes;
            } else {
                locate(args.keys, args, tile, head_bytes, first + round, next, keys);
            }
            join_values<Format>(scores, args, values, keys, count, states + h * (dim + 2));
            for (int64_t j = 0; j < count; ++j) values.at[j] += head_bytes;
        }
        count = next;
    }
}

void attend_one(const AttentionArgs& args, const AttentionTile& tile, float* states) {
    switch (args.type) {
        case KvType::float32: return attend_one_as<Float32>(args, tile, states);
        case KvType::float16: return attend_one_as<Float16>(args, tile, states);
        case KvType::bfloat16: return attend_one_as<BFloat16>(args, tile, states);
        case KvType::int8: return attend_one_as<Int8>(args, tile, states);
    }
}

template <typename Format>
void store_as(const float* from, void* to, int64_t count) {
    auto* numbers = static_cast<typename Format::Number*>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Format::narrow(numbers + i, load(from + i));
    for (; i < count; ++i) numbers[i] = Format::narrow_one(from[i]);
}

// The largest magnitude of some numbers; NaN if one of them is: as an integer it is more than infinity.
float largest_of(const float* from, int64_t count) {
    Ints lanes = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Ints magnitude = load<Ints>(from + i) & 0x7fffffff;
        lanes = magnitude > lanes ? magnitude : lanes;
    }
    int32_t largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    for (; i < count; ++i) {
        const int32_t magnitude = as<int32_t>(from[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return as<float>(largest);
}

void store_int8(const float* from, int8_t* to, int64_t head_dim) {
    const float largest = largest_of(from, head_dim);
    float scale = largest / 127.0f;
    if (largest < 1e-30f || !(largest <= FLT_MAX)) {  // no scale to divide by
        scale = largest < 1e-30f ? 0.0f : __builtin_nanf("");
        memset(to, 0, head_dim);
    } else {
        int64_t i = 0;
        for (; i + kLanes <= head_dim; i += kLanes) Int8::narrow(to + i, load(from + i) / scale);
        for (; i < head_dim; ++i) to[i] = Int8::narrow_one(from[i] / scale);
    }
    memcpy(to + head_dim, &scale, sizeof(scale));
}

void store_int8_heads(const float* from, void* to, int64_t heads, int64_t head_dim) {
    auto* numbers = static_cast<int8_t*>(to);
    for (int64_t h = 0; h < heads; ++h) {
        store_int8(from + h * head_dim, numbers + h * head_bytes_of<Int8>(head_dim), head_dim);
    }
}

void store_heads(const float* from, void* to, KvType type, int64_t heads, int64_t head_dim) {
    switch (type) {
        case KvType::float32: return store_as<Float32>(from, to, heads * head_dim);
        case KvType::float16: return store_as<Float16>(from, to, heads * head_dim);
        case KvType::bfloat16: return store_as<BFloat16>(from, to, heads * head_dim);
        case KvType::int8: return store_int8_heads(from, to, heads, head_dim);
    }
}

}  // namespace
}  // namespace bluejay
