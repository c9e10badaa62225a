// Linear kernels for AVX-512 with VNNI: one multiply-add for 16 outputs x 4 inputs, summed in 32 bits at once.
#include <immintrin.h>

#include "linear.h"

namespace bluejay {
namespace {

enum class Kind { int8, int4, int4_packed };

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// Two sums for each row, for even and odd quads: one alone would wait for itself.
template <int ROWS>
inline void add_pair(__m512i (&acc)[ROWS][2], __m512i even, __m512i odd, const int32_t* x) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], even, _mm512_set1_epi32(x[m]));
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], odd, _mm512_set1_epi32(x[ROWS + m]));
    }
}

template <int ROWS, Kind KIND>
inline void add_group(__m512i (&acc)[ROWS][2], const uint8_t* weight, const int32_t* x, const int32_t* start) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        // int4 keeps its start in two halves of 16 bits: other instruction sets sum in those.
        const int32_t whole = KIND == Kind::int8 ? start[m] : static_cast<int16_t>(start[m]) + static_cast<int16_t>(start[m] >> 16);
        acc[m][0] = _mm512_set1_epi32(whole);
        acc[m][1] = _mm512_setzero_si512();
    }
    const __m512i half = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int pair = 0; pair < kGroupQuads / 2; ++pair, x += 2 * ROWS) {
        if constexpr (KIND == Kind::int4_packed) {
            const __m512i both = load(weight + 64 * pair);
            add_pair<ROWS>(acc, _mm512_and_si512(both, half), _mm512_and_si512(_mm512_srli_epi16(both, 4), half), x);
        } else {
            add_pair<ROWS>(acc, load(weight + 128 * pair), load(weight + 128 * pair + 64), x);
        }
    }
}

template <Kind KIND>
constexpr int64_t kGroupBytes = kTileOutputs* kGroup / (KIND == Kind::int4_packed ? 2 : 1);

// Multiply group g of the digits by a tile's weights, and add that to the tile's sums [ROWS][16].
template <int ROWS, Kind KIND>
inline void multiply_group(const uint8_t* weight, const Digits& digits, int64_t g, __m512 scales, float* sums) {
    __m512i acc[ROWS][2];
    add_group<ROWS, KIND>(acc, weight, digits.low + g * kGroupQuads * ROWS, digits.low_start + g * ROWS);
    if (KIND == Kind::int8 && digits.wide[g]) {
        for (int m = 0; m < ROWS; ++m) {
            if (!(digits.wide[g] >> m & 1)) continue;
            __m512i high = _mm512_set1_epi32(digits.high_start[g * ROWS + m]);
            const int32_t* x = digits.high + g * kGroupQuads * ROWS + m;
            for (int quad = 0; quad < kGroupQuads; ++quad)
                high = _mm512_dpbusd_epi32(high, load(weight + 64 * quad), _mm512_set1_epi32(x[quad * ROWS]));
            acc[m][0] = _mm512_add_epi32(acc[m][0], _mm512_mullo_epi32(high, _mm512_set1_epi32(kDigitBase)));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(digits.scale[g * ROWS + m]), scales);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[m][0], acc[m][1]));
        float* total = sums + m * kTileOutputs;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(total)));
    }
}

template <int ROWS, Kind KIND>
void tile(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums, Ahead ahead) {
    for (int64_t g = 0; g < groups; ++g, weight += kGroupBytes<KIND>, scales += kTileOutputs) {
        for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T1);
        multiply_group<ROWS, KIND>(weight, digits, g, _mm512_loadu_ps(scales), sums);
    }
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
            const __m512 widened = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
            float* to = sums + t * (full * kTileRows + LAST) * kTileOutputs;
            for (int rows = 0; rows < full; ++rows, to += kTileRows * kTileOutputs)
                multiply_group<kTileRows, KIND>(weight, digits[rows], g, widened, to);
            multiply_group<LAST, KIND>(weight, digits[full], g, widened, to);
        }
    }
}

}  // namespace

// What happens once for a block or a row is AVX2's, which every such processor has.
#define BLUEJAY_ROWS(KERNEL, KIND) {KERNEL<1, KIND>, KERNEL<2, KIND>, KERNEL<3, KIND>, KERNEL<4, KIND>}
const LinearKernels linear_avx512 = {avx2_quantize_row,
                                     avx2_widen_scales,
                                     avx2_unpack_int4,
                                     BLUEJAY_ROWS(tile, Kind::int8),
                                     BLUEJAY_ROWS(tile, Kind::int4),
                                     BLUEJAY_ROWS(stream, Kind::int8),
                                     BLUEJAY_ROWS(stream, Kind::int4_packed)};

}  // namespace bluejay
