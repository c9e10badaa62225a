// Linear kernels in plain C++, for any processor. The loops run over outputs side by side, which compilers vectorise.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.h"

namespace bluejay {
namespace {

enum class Kind { int8, int4, int4_packed };

// sum[output] += weights · digits of one quad.
inline void add_quad(int32_t (&sum)[kTileOutputs], const uint8_t* weight, int32_t quad) {
    int8_t x[4];
    std::memcpy(x, &quad, 4);
    for (int o = 0; o < kTileOutputs; ++o)
        for (int i = 0; i < 4; ++i) sum[o] += weight[4 * o + i] * x[i];
}

template <Kind KIND>
inline void add_group(int32_t (&sum)[kTileOutputs], const uint8_t* weight, const int32_t* x, int stride) {
    for (int quad = 0; quad < kGroupQuads; ++quad, x += stride) {
        if constexpr (KIND == Kind::int4_packed) {
            uint8_t half[64];
            for (int i = 0; i < 64; ++i) half[i] = quad % 2 ? weight[i] >> 4 : weight[i] & 15;
            add_quad(sum, half, *x);
            weight += quad % 2 ? 64 : 0;
        } else {
            add_quad(sum, weight, *x);
            weight += 64;
        }
    }
}

template <int ROWS, Kind KIND>
void tile(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums, Ahead) {
    constexpr int kBytes = kTileOutputs * kGroup / (KIND == Kind::int4_packed ? 2 : 1);
    for (int64_t g = 0; g < groups; ++g, weight += kBytes, scales += kTileOutputs) {
        for (int m = 0; m < ROWS; ++m) {
            const int32_t start = digits.low_start[g * ROWS + m];
            int32_t sum[kTileOutputs] = {}, high[kTileOutputs] = {};
            // int4 keeps its start in two halves of 16 bits.
            const int32_t whole = KIND == Kind::int8 ? start : static_cast<int16_t>(start) + static_cast<int16_t>(start >> 16);
            std::fill_n(sum, kTileOutputs, whole);
            add_group<KIND>(sum, weight, digits.low + g * kGroupQuads * ROWS + m, ROWS);
            if (KIND == Kind::int8 && digits.wide[g] >> m & 1) {
                std::fill_n(high, kTileOutputs, digits.high_start[g * ROWS + m]);
                add_group<KIND>(high, weight, digits.high + g * kGroupQuads * ROWS + m, ROWS);
            }
            const float scale = digits.scale[g * ROWS + m];
            for (int o = 0; o < kTileOutputs; ++o)
                sums[m * kTileOutputs + o] += static_cast<float>(sum[o] + 128 * high[o]) * (scale * scales[o]);
        }
    }
}

void unpack_int4(const uint8_t* packed, int64_t pairs, uint8_t* out) {
    for (int64_t pair = 0; pair < pairs; ++pair, packed += 64, out += 128)
        for (int i = 0; i < 64; ++i) {
            out[i] = packed[i] & 15;
            out[64 + i] = packed[i] >> 4;
        }
}

float widen(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31  ? fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity()
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half & 0x8000 ? -size : size;
}

void widen_scales(const uint16_t* scales, int64_t count, int repeat, float* out) {
    for (int64_t g = 0; g < count; ++g)
        for (int o = 0; o < kTileOutputs; ++o) *out++ = widen(scales[g / repeat * kTileOutputs + o]);
}

// One group of up to 32 values; those past `count` are zeros.
void quantize_group(const float* x, int64_t count, int bits, float threshold, int8_t* low, int8_t* high, float* scale,
                    uint8_t* wide) {
    std::fill_n(low, kGroup, int8_t{0});
    std::fill_n(high, kGroup, int8_t{0});
    float top = 0;
    bool broken = false;
    for (int64_t i = 0; i < count; ++i) {
        top = std::max(top, std::fabs(x[i]));
        broken |= !std::isfinite(x[i]);
    }
    if (broken || top < 1e-30f) top = 0;  // below, levels / top would overflow
    *wide = bits == 8 && top > threshold;
    const float levels = bits == 4 ? 127.0f : *wide ? 8192.0f : 73.0f;
    // A NaN or an infinity makes every output of its row NaN, as it would in floating point.
    *scale = broken ? std::numeric_limits<float>::quiet_NaN() : top / levels;
    if (top == 0) return;
    const float factor = levels / top;
    for (int64_t i = 0; i < count; ++i) {
        const int q = static_cast<int>(std::nearbyint(x[i] * factor));
        high[i] = static_cast<int8_t>(*wide ? (q + 64) >> 7 : 0);
        low[i] = static_cast<int8_t>(q - 128 * high[i]);
    }
}

void quantize_row(const float* x, int64_t count, int64_t padded, int bits, int8_t* low, int8_t* high, float* scale,
                  uint8_t* wide) {
    float squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
    const float threshold = 5.0f * std::sqrt(squares / static_cast<float>(count));
    for (int64_t first = 0; first < padded; first += kGroup)
        quantize_group(x + std::min(first, count), std::clamp<int64_t>(count - first, 0, kGroup), bits, threshold, low + first,
                       high + first, scale + first / kGroup, wide + first / kGroup);
}

}  // namespace

#define BLUEJAY_TILES(KIND) {tile<1, KIND>, tile<2, KIND>, tile<3, KIND>, tile<4, KIND>}
const LinearKernels linear_portable = {quantize_row,
                                       widen_scales,
                                       unpack_int4,
                                       BLUEJAY_TILES(Kind::int8),
                                       BLUEJAY_TILES(Kind::int4),
                                       BLUEJAY_TILES(Kind::int4_packed)};

}  // namespace bluejay
