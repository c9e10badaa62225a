// Linear kernels for AVX2 + FMA + F16C: 8 outputs x 4 inputs to a vector.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "linear.h"

namespace bluejay {
namespace {

// Keeps a sum in its register: left alone, GCC gathers the additions behind the multiplications and runs out of them.
#define BLUEJAY_KEEP(value) asm("" : "+x"(value))

enum class Kind { int8, int4, int4_packed };

template <Kind KIND>
constexpr int64_t kGroupBytes = kTileOutputs* kGroup / (KIND == Kind::int4_packed ? 2 : 1);

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Multiply two quads by their weights, 8 outputs to each of two vectors. int8: the four products that meet in 16 bits fit
// them, and are widened; int4: the sums stay in 16 bits.
template <int ROWS, Kind KIND>
inline void add_pair(__m256i (&acc)[ROWS][2], const __m256i (&w)[2][2], const int32_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        const __m256i first = _mm256_set1_epi32(x[m]), second = _mm256_set1_epi32(x[ROWS + m]);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
            __m256i sum = _mm256_maddubs_epi16(w[0][n], first);
            if (KIND != Kind::int8) sum = _mm256_add_epi16(acc[m][n], sum);
            BLUEJAY_KEEP(sum);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[1][n], second));
            acc[m][n] = KIND == Kind::int8 ? _mm256_add_epi32(acc[m][n], _mm256_madd_epi16(sum, ones)) : sum;
            BLUEJAY_KEEP(acc[m][n]);
        }
    }
}

// Sum one group of 32 inputs: of int8 in 32 bits, of int4 in two halves of 16 bits.
template <int ROWS, Kind KIND>
inline void add_group(__m256i (&acc)[ROWS][2], const uint8_t* weight, const int32_t* x, const int32_t* start) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
        for (__m256i& sum : acc[m]) {
            sum = _mm256_set1_epi32(start[m]);
            BLUEJAY_KEEP(sum);
        }
#pragma GCC unroll 4
    for (int pair = 0; pair < kGroupQuads / 2; ++pair, x += 2 * ROWS) {
        __m256i w[2][2];
        if constexpr (KIND == Kind::int4_packed) {
            const __m256i half = _mm256_set1_epi8(15);
            for (int n = 0; n < 2; ++n) {
                const __m256i both = load(weight + 64 * pair + 32 * n);
                w[0][n] = _mm256_and_si256(both, half);
                w[1][n] = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
            }
        } else {
            for (int n = 0; n < 4; ++n) w[n / 2][n % 2] = load(weight + 128 * pair + 32 * n);
        }
        add_pair<ROWS, KIND>(acc, w, x);
    }
}

// Outlier features: sum += 91 * (weights · high digits), for the rows that have any. Kept out of the fast loop and its
// registers. High digits reach 90, so that only two products fit 16 bits.
template <int ROWS>
__attribute__((noinline)) void add_high(__m256i (&acc)[ROWS][2], const uint8_t* weight, const int32_t* x,
                                        const int32_t* start, unsigned wide) {
    const __m256i ones = _mm256_set1_epi16(1), base = _mm256_set1_epi32(kDigitBase);
    for (int m = 0; m < ROWS; ++m) {
        if (!(wide >> m & 1)) continue;
        __m256i high[2] = {_mm256_set1_epi32(start[m]), _mm256_set1_epi32(start[m])};
        for (int quad = 0; quad < kGroupQuads; ++quad)
            for (int n = 0; n < 2; ++n) {
                const __m256i w = load(weight + 64 * quad + 32 * n);
                const __m256i products = _mm256_maddubs_epi16(w, _mm256_set1_epi32(x[quad * ROWS + m]));
                high[n] = _mm256_add_epi32(high[n], _mm256_madd_epi16(products, ones));
            }
        for (int n = 0; n < 2; ++n) acc[m][n] = _mm256_add_epi32(acc[m][n], _mm256_mullo_epi32(high[n], base));
    }
}

// Multiply group g of the digits by a tile's weights, and add that to the tile's sums [ROWS][16]. `scales(n)` are those of
// the outputs of vector n; asked for in the end, they take no register from the sums.
template <int ROWS, Kind KIND, class Scales>
__attribute__((always_inline)) inline void multiply_group(const uint8_t* weight, const Digits& digits, int64_t g, Scales scales,
                                                          float* sums) {
    __m256i acc[ROWS][2];
    add_group<ROWS, KIND>(acc, weight, digits.low + g * kGroupQuads * ROWS, digits.low_start + g * ROWS);
    if (KIND == Kind::int8 && digits.wide[g]) {
        __m256i copy[ROWS][2];
        std::memcpy(copy, acc, sizeof acc);
        add_high<ROWS>(copy, weight, digits.high + g * kGroupQuads * ROWS, digits.high_start + g * ROWS, digits.wide[g]);
        std::memcpy(acc, copy, sizeof acc);
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256 column_scales[2] = {scales(0), scales(1)};
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        const __m256 row_scale = _mm256_set1_ps(digits.scale[g * ROWS + m]);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
            const __m256i sum = KIND == Kind::int8 ? acc[m][n] : _mm256_madd_epi16(acc[m][n], ones);
            float* total = sums + m * kTileOutputs + 8 * n;
            const __m256 scale = _mm256_mul_ps(row_scale, column_scales[n]);
            _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(total)));
        }
    }
    asm volatile("" ::: "memory");  // totals stay in memory between groups; registers belong to the sums
}

template <int ROWS, Kind KIND>
void tile(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums, Ahead ahead) {
    for (int64_t g = 0; g < groups; ++g, weight += kGroupBytes<KIND>, scales += kTileOutputs) {
        for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T1);
        multiply_group<ROWS, KIND>(weight, digits, g, [=](int n) { return _mm256_loadu_ps(scales + 8 * n); }, sums);
    }
}

inline __m256 widened(const uint16_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

template <int LAST, Kind KIND>
void stream(const Strip& strip, const Digits* digits, int full, float* sums) {
    const int64_t tile_bytes = strip.groups * kGroupBytes<KIND>;
    const int64_t tile_scales = strip.groups / strip.groups_per_scale * kTileOutputs;
    for (int64_t g = 0; g < strip.groups; ++g) {
        const uint16_t* scales = strip.scales + (g >> (strip.groups_per_scale - 1)) * kTileOutputs;  // no division
        for (int t = 0; t < strip.tiles; ++t, scales += tile_scales) {
            const uint8_t* weight = strip.weight + t * tile_bytes + g * kGroupBytes<KIND>;
            // Once read, weights are not needed again: past the caches, which hold the program and its data meanwhile.
            const uint8_t* ahead = shortly(strip, t, g * kGroupBytes<KIND>, tile_bytes);
            for (int64_t line = 0; line < kGroupBytes<KIND>; line += 64) _mm_prefetch(ahead + line, _MM_HINT_NTA);
            const auto widened_scales = [=](int n) { return widened(scales + 8 * n); };
            float* to = sums + t * (full * kTileRows + LAST) * kTileOutputs;
            for (int rows = 0; rows < full; ++rows, to += kTileRows * kTileOutputs)
                multiply_group<kTileRows, KIND>(weight, digits[rows], g, widened_scales, to);
            multiply_group<LAST, KIND>(weight, digits[full], g, widened_scales, to);
        }
    }
}

}  // namespace

void avx2_unpack_int4(const uint8_t* packed, int64_t pairs, uint8_t* out) {
    const __m256i half = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < pairs; ++i, packed += 64, out += 128)
        for (int n = 0; n < 64; n += 32) {
            const __m256i both = load(packed + n);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + n), _mm256_and_si256(both, half));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64 + n), _mm256_and_si256(_mm256_srli_epi16(both, 4), half));
        }
}

void avx2_widen_scales(const uint16_t* scales, int64_t count, int repeat, float* out) {
    for (int64_t g = 0; g < count; ++g, scales += kTileOutputs) {
        const __m256 first = widened(scales), second = widened(scales + 8);
        for (int i = 0; i < repeat; ++i, out += kTileOutputs) {
            _mm256_storeu_ps(out, first);
            _mm256_storeu_ps(out + 8, second);
        }
    }
}

namespace {

float sum_of_squares(const float* x, int64_t count) {
    __m256 total[4] = {};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int n = 0; n < 4; ++n) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * n);
            total[n] = _mm256_fmadd_ps(v, v, total[n]);
        }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(_mm256_add_ps(total[0], total[1]), _mm256_add_ps(total[2], total[3])));
    float sum = 0;
    for (float lane : lanes) sum += lane;
    for (; i < count; ++i) sum += x[i] * x[i];
    return sum;
}

inline float largest_lane(__m128 v) {
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

float largest(const __m256 (&v)[4]) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 a = _mm256_max_ps(_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1]));
    const __m256 b = _mm256_max_ps(_mm256_andnot_ps(sign, v[2]), _mm256_andnot_ps(sign, v[3]));
    const __m256 c = _mm256_max_ps(a, b);
    return largest_lane(_mm_max_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
}

// The largest sum of one sign over four inputs that meet: two of a quad, and the same two of the next.
float largest_of_four(const __m256 (&v)[4]) {
    __m128 most = _mm_setzero_ps();
    for (const __m256& eight : v) {
        const __m256 positive = _mm256_max_ps(eight, _mm256_setzero_ps()), negative = _mm256_sub_ps(positive, eight);
        const __m256 twos = _mm256_hadd_ps(positive, negative);
        most = _mm_max_ps(most, _mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
    }
    return largest_lane(most);
}

bool all_finite(const float* x) {
    for (int i = 0; i < kGroup; ++i)
        if (!std::isfinite(x[i])) return false;
    return true;
}

// Four vectors of whole numbers within int8 to 32 bytes, in order.
void store_bytes(const __m256i (&q)[4], int8_t* out) {
    const __m256i a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
}

// Where the sum of a group with these digits starts.
int32_t sum_start(const __m256i (&q)[4], int bits) {
    const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_hadd_epi32(four, four);
    return packed_start(_mm_cvtsi128_si32(two), _mm_extract_epi32(two, 1), bits);
}

}  // namespace

void avx2_quantize_row(const float* x, int64_t count, int64_t padded, int bits, const RowDigits& out) {
    const float squares = sum_of_squares(x, count);
    const float threshold = kOutlier * std::sqrt(squares / static_cast<float>(count));
    const bool finite = std::isfinite(squares);
    for (int64_t g = 0; g < padded / kGroup; ++g) {
        alignas(32) float rest[kGroup] = {};
        const float* from = x + g * kGroup;
        if ((g + 1) * kGroup > count) {
            if (g * kGroup < count) std::memcpy(rest, from, (count - g * kGroup) * sizeof(float));
            from = rest;
        }
        __m256 v[4];
        for (int n = 0; n < 4; ++n) v[n] = _mm256_loadu_ps(from + 8 * n);
        const bool broken = !finite && !all_finite(from);
        const float top = largest(v);
        const GroupScale found = group_scale(broken, top, bits == 8 ? largest_of_four(v) : 0.0f, threshold, bits);
        __m256i q[4], h[4] = {};
        for (int n = 0; n < 4; ++n) {
            const __m256 value = _mm256_mul_ps(v[n], _mm256_set1_ps(found.factor));
            q[n] = broken ? _mm256_setzero_si256() : _mm256_cvtps_epi32(value);
            if (!found.wide) continue;
            h[n] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(q[n]), _mm256_set1_ps(1.0f / kDigitBase)));
            q[n] = _mm256_sub_epi32(q[n], _mm256_mullo_epi32(h[n], _mm256_set1_epi32(kDigitBase)));
        }
        store_bytes(q, out.low + g * kGroup);
        out.low_start[g] = sum_start(q, bits);
        out.scale[g] = found.scale;
        out.wide[g] = found.wide;
        if (!found.wide) continue;
        store_bytes(h, out.high + g * kGroup);
        out.high_start[g] = sum_start(h, bits);
    }
}

#define BLUEJAY_ROWS(KERNEL, KIND) {KERNEL<1, KIND>, KERNEL<2, KIND>, KERNEL<3, KIND>, KERNEL<4, KIND>}
const LinearKernels linear_avx2 = {avx2_quantize_row,
                                   avx2_widen_scales,
                                   avx2_unpack_int4,
                                   BLUEJAY_ROWS(tile, Kind::int8),
                                   BLUEJAY_ROWS(tile, Kind::int4),
                                   BLUEJAY_ROWS(stream, Kind::int8),
                                   BLUEJAY_ROWS(stream, Kind::int4_packed)};

}  // namespace bluejay
