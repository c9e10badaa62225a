// Linear kernels for AVX2 + FMA + F16C: 8 outputs x 4 inputs to a vector.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "linear.h"

namespace bluejay {
namespace {

// Keeps a sum in its register: left alone, GCC gathers the additions behind the multiplications and runs out of them.
#define BLUEJAY_KEEP(value) asm("" : "+x"(value))

enum class Kind { int8, int4, int4_packed };

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Multiply the 4 inputs of one quad by their weights: 8 outputs x 2 sums of 16 bits.
template <int ROWS, bool WIDEN>
inline void add_quad(__m256i (&acc)[ROWS][2], __m256i w0, __m256i w1, const int32_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        const __m256i digit = _mm256_set1_epi32(x[m]);
        const __m256i p0 = _mm256_maddubs_epi16(w0, digit), p1 = _mm256_maddubs_epi16(w1, digit);
        acc[m][0] = WIDEN ? _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(p0, ones)) : _mm256_add_epi16(acc[m][0], p0);
        acc[m][1] = WIDEN ? _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(p1, ones)) : _mm256_add_epi16(acc[m][1], p1);
        BLUEJAY_KEEP(acc[m][0]);
        BLUEJAY_KEEP(acc[m][1]);
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
    if constexpr (KIND == Kind::int4_packed) {
        const __m256i half = _mm256_set1_epi8(15);
#pragma GCC unroll 4
        for (int pair = 0; pair < kGroupQuads / 2; ++pair, weight += 64, x += 2 * ROWS) {
            const __m256i v0 = load(weight), v1 = load(weight + 32);
            add_quad<ROWS, false>(acc, _mm256_and_si256(v0, half), _mm256_and_si256(v1, half), x);
            add_quad<ROWS, false>(acc, _mm256_and_si256(_mm256_srli_epi16(v0, 4), half),
                                  _mm256_and_si256(_mm256_srli_epi16(v1, 4), half), x + ROWS);
        }
    } else {
#pragma GCC unroll 4
        for (int pair = 0; pair < kGroupQuads / 2; ++pair, weight += 128, x += 2 * ROWS) {
            add_quad<ROWS, KIND == Kind::int8>(acc, load(weight), load(weight + 32), x);
            add_quad<ROWS, KIND == Kind::int8>(acc, load(weight + 64), load(weight + 96), x + ROWS);
        }
    }
}

// Outlier features: sum += 128 * (weights · high digits), for the rows that have any. Kept out of the fast loop and its
// registers.
template <int ROWS>
__attribute__((noinline)) void add_high(__m256i (&acc)[ROWS][2], const uint8_t* weight, const int32_t* x,
                                        const int32_t* start, unsigned wide) {
    for (int m = 0; m < ROWS; ++m) {
        if (!(wide >> m & 1)) continue;
        __m256i high[1][2] = {{_mm256_set1_epi32(start[m]), _mm256_set1_epi32(start[m])}};
#pragma GCC unroll 8
        for (int quad = 0; quad < kGroupQuads; ++quad)
            add_quad<1, true>(high, load(weight + 64 * quad), load(weight + 64 * quad + 32), x + quad * ROWS + m);
        for (int n = 0; n < 2; ++n) acc[m][n] = _mm256_add_epi32(acc[m][n], _mm256_slli_epi32(high[0][n], 7));
    }
}

template <int ROWS, Kind KIND>
void tile(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums,
          Ahead ahead) {
    constexpr int kBytes = kTileOutputs * kGroup / (KIND == Kind::int4_packed ? 2 : 1);
    const __m256i ones = _mm256_set1_epi16(1);
    const int32_t* x = digits.low;
    for (int64_t g = 0; g < groups; ++g, weight += kBytes, x += kGroupQuads * ROWS, scales += kTileOutputs) {
        for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) {
            if (ahead.once) _mm_prefetch(ahead.from, _MM_HINT_NTA);
            else _mm_prefetch(ahead.from, _MM_HINT_T1);
        }
        __m256i acc[ROWS][2];
        add_group<ROWS, KIND>(acc, weight, x, digits.low_start + g * ROWS);
        if (KIND == Kind::int8 && digits.wide[g]) {
            __m256i copy[ROWS][2];
            std::memcpy(copy, acc, sizeof acc);
            add_high<ROWS>(copy, weight, digits.high + g * kGroupQuads * ROWS, digits.high_start + g * ROWS,
                           digits.wide[g]);
            std::memcpy(acc, copy, sizeof acc);
        }
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
            const __m256 row_scale = _mm256_set1_ps(digits.scale[g * ROWS + m]);
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) {
                const __m256i sum = KIND == Kind::int8 ? acc[m][n] : _mm256_madd_epi16(acc[m][n], ones);
                const __m256 scale = _mm256_mul_ps(row_scale, _mm256_loadu_ps(scales + 8 * n));
                float* total = sums + m * kTileOutputs + 8 * n;
                _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(total)));
            }
        }
        asm volatile("" ::: "memory");  // totals stay in memory between groups; registers belong to the sums
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
    for (int64_t g = 0; g < count; ++g, out += kTileOutputs)
        for (int n = 0; n < kTileOutputs; n += 8) {
            const void* from = scales + g / repeat * kTileOutputs + n;
            _mm256_storeu_ps(out + n, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))));
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

float largest(const __m256 (&v)[4]) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 a = _mm256_max_ps(_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1]));
    const __m256 b = _mm256_max_ps(_mm256_andnot_ps(sign, v[2]), _mm256_andnot_ps(sign, v[3]));
    const __m256 c = _mm256_max_ps(a, b);
    __m128 d = _mm_max_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    d = _mm_max_ps(d, _mm_movehl_ps(d, d));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
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

}  // namespace

void avx2_quantize_row(const float* x, int64_t count, int64_t padded, int bits, int8_t* low, int8_t* high, float* scale,
                  uint8_t* wide) {
    const float squares = sum_of_squares(x, count);
    const float threshold = 5.0f * std::sqrt(squares / static_cast<float>(count));
    const bool finite = std::isfinite(squares);
    for (int64_t first = 0; first < padded; first += kGroup, low += kGroup, high += kGroup, ++scale, ++wide) {
        alignas(32) float rest[kGroup] = {};
        const float* from = x + first;
        if (first + kGroup > count) {
            if (first < count) std::memcpy(rest, from, (count - first) * sizeof(float));
            from = rest;
        }
        __m256 v[4];
        for (int n = 0; n < 4; ++n) v[n] = _mm256_loadu_ps(from + 8 * n);
        float top = largest(v);
        const bool broken = !finite && !all_finite(from);
        if (broken || top < 1e-30f) top = 0;  // below, levels / top would overflow
        const bool two = bits == 8 && top > threshold;
        const float levels = bits == 4 ? 127.0f : two ? 8192.0f : 73.0f;
        const __m256 factor = _mm256_set1_ps(top > 0 ? levels / top : 0.0f);
        __m256i q[4], h[4] = {};
        for (int n = 0; n < 4; ++n) {
            q[n] = broken ? _mm256_setzero_si256() : _mm256_cvtps_epi32(_mm256_mul_ps(v[n], factor));
            if (!two) continue;
            h[n] = _mm256_srai_epi32(_mm256_add_epi32(q[n], _mm256_set1_epi32(64)), 7);
            q[n] = _mm256_sub_epi32(q[n], _mm256_slli_epi32(h[n], 7));
        }
        store_bytes(q, low);
        store_bytes(h, high);
        // A NaN or an infinity makes every output of its row NaN, as it would in floating point.
        *scale = broken ? std::numeric_limits<float>::quiet_NaN() : top / levels;
        *wide = two;
    }
}

#define BLUEJAY_TILES(KIND) {tile<1, KIND>, tile<2, KIND>, tile<3, KIND>, tile<4, KIND>}
const LinearKernels linear_avx2 = {avx2_quantize_row,
                                   avx2_widen_scales,
                                   avx2_unpack_int4,
                                   BLUEJAY_TILES(Kind::int8),
                                   BLUEJAY_TILES(Kind::int4),
                                   BLUEJAY_TILES(Kind::int4_packed)};

}  // namespace bluejay
