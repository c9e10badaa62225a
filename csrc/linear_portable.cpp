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

template <Kind KIND>
constexpr int64_t kGroupBytes = kTileOutputs* kGroup / (KIND == Kind::int4_packed ? 2 : 1);

// Multiply group g of the digits by a tile's weights, and add that to the tile's sums [ROWS][16].
template <int ROWS, Kind KIND>
void multiply_group(const uint8_t* weight, const Digits& digits, int64_t g, const float* scales, float* sums) {
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
            sums[m * kTileOutputs + o] += static_cast<float>(sum[o] + kDigitBase * high[o]) * (scale * scales[o]);
    }
}

template <int ROWS, Kind KIND>
void tile(const uint8_t* weight, const Digits& digits, const float* scales, int64_t groups, float* sums, Ahead) {
    for (int64_t g = 0; g < groups; ++g)
        multiply_group<ROWS, KIND>(weight + g * kGroupBytes<KIND>, digits, g, scales + g * kTileOutputs, sums);
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
    for (int64_t g = 0; g < count; ++g, scales += kTileOutputs)
        for (int i = 0; i < repeat; ++i, out += kTileOutputs)
            for (int o = 0; o < kTileOutputs; ++o) out[o] = widen(scales[o]);
}

template <int LAST, Kind KIND>
void stream(const Strip& strip, const Digits* digits, int full, float* sums) {
    const uint8_t* weight = strip.weight;
    const uint16_t* halves = strip.scales;
    for (int t = 0; t < strip.tiles; ++t, sums += (full * kTileRows + LAST) * kTileOutputs)
        for (int64_t g = 0; g < strip.groups; ++g, weight += kGroupBytes<KIND>) {
            float scales[kTileOutputs];
            widen_scales(halves, 1, 1, scales);
            for (int rows = 0; rows < full; ++rows)
                multiply_group<kTileRows, KIND>(weight, digits[rows], g, scales, sums + rows * kTileRows * kTileOutputs);
            multiply_group<LAST, KIND>(weight, digits[full], g, scales, sums + full * kTileRows * kTileOutputs);
            if ((g + 1) % strip.groups_per_scale == 0) halves += kTileOutputs;
        }
}

// The largest sum of one sign over four inputs that meet: two of a quad, and the same two of the next.
float largest_of_four(const float* x) {
    float most = 0;
    for (int i = 0; i < kGroup; i += i % 8 == 0 ? 2 : 6)
        for (float sign : {1.0f, -1.0f}) {
            const auto part = [&](int j) { return std::max(sign * x[i + j], 0.0f); };
            most = std::max(most, (part(0) + part(1)) + (part(4) + part(5)));
        }
    return most;
}

int32_t sum_start(const int8_t* digits, int bits) {
    int32_t front = 0, back = 0;
    for (int i = 0; i < kGroup; i += 4) {
        front += digits[i] + digits[i + 1];
        back += digits[i + 2] + digits[i + 3];
    }
    return packed_start(front, back, bits);
}

void quantize_row(const float* row, int64_t count, int64_t padded, int bits, const RowDigits& out) {
    float squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += row[i] * row[i];
    const float threshold = kOutlier * std::sqrt(squares / static_cast<float>(count));
    for (int64_t g = 0; g < padded / kGroup; ++g) {
        float x[kGroup] = {};
        std::copy_n(row + std::min(g * kGroup, count), std::clamp<int64_t>(count - g * kGroup, 0, kGroup), x);
        float top = 0;
        bool broken = false;
        for (float value : x) {
            top = std::max(top, std::fabs(value));
            broken |= !std::isfinite(value);
        }
        const GroupScale found = group_scale(broken, top, bits == 8 ? largest_of_four(x) : 0.0f, threshold, bits);
        int8_t *low = out.low + g * kGroup, *high = out.high + g * kGroup;
        for (int i = 0; i < kGroup; ++i) {
            const int q = broken ? 0 : static_cast<int>(std::nearbyint(x[i] * found.factor));
            const int upper = found.wide ? static_cast<int>(std::nearbyint(static_cast<float>(q) * (1.0f / kDigitBase))) : 0;
            high[i] = static_cast<int8_t>(upper);
            low[i] = static_cast<int8_t>(q - kDigitBase * upper);
        }
        out.low_start[g] = sum_start(low, bits);
        out.high_start[g] = sum_start(high, bits);
        out.scale[g] = found.scale;
        out.wide[g] = found.wide;
    }
}

}  // namespace

#define BLUEJAY_ROWS(KERNEL, KIND) {KERNEL<1, KIND>, KERNEL<2, KIND>, KERNEL<3, KIND>, KERNEL<4, KIND>}
const LinearKernels linear_portable = {quantize_row,
                                       widen_scales,
                                       unpack_int4,
                                       BLUEJAY_ROWS(tile, Kind::int8),
                                       BLUEJAY_ROWS(tile, Kind::int4),
                                       BLUEJAY_ROWS(stream, Kind::int8),
                                       BLUEJAY_ROWS(stream, Kind::int4_packed)};

}  // namespace bluejay
