// The elementwise kernels, written once for vectors of any size (csrc/vectors.h).
#pragma once

#include "elementwise.h"
#include "vectors.h"

namespace bluejay {
namespace {

// (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), and e^(2u) / (1 + e^(2u)) where u < 0: e is only raised to what is not positive.
BLUEJAY_INLINE Vec gelu_new_of(Vec x) {
    const Vec twice = x * multiply_add(x * x, splat(2 * 0.7978845608f * 0.044715f), splat(2 * 0.7978845608f));
    const Vec power = exp_negative(twice < 0 ? twice : -twice);
    return x * ((twice < 0 ? power : splat(1)) / (power + 1));
}

void gelu_new_row(float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, gelu_new_of(load(x + i)));
    if (i == count) return;
    float rest[kLanes] = {};
    memcpy(rest, x + i, (count - i) * sizeof(float));
    store(rest, gelu_new_of(load(rest)));
    memcpy(x + i, rest, (count - i) * sizeof(float));
}

// Multiply complex numbers; neighbours in memory are one.
void rotate_head(float* x, const float* turns, int64_t pairs) {
    for (int64_t i = 0; i < 2 * pairs; i += 2) {
        const float even = x[i], odd = x[i + 1];
        x[i] = even * turns[i] - odd * turns[i + 1];
        x[i + 1] = even * turns[i + 1] + odd * turns[i];
    }
}

// Up to kLanes numbers, and zeros behind them.
BLUEJAY_INLINE Vec load_some(const float* from, int64_t count) {
    float lanes[kLanes] = {};
    memcpy(lanes, from, count * sizeof(float));
    return load(lanes);
}

BLUEJAY_INLINE float sum_of(Vec v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

// The variance of what is left when the mean is gone, not that of the squares: those lose digits where the mean is large. What
// the first mean was off by is the mean of what is left.
void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* out) {
    const int64_t whole = width / kLanes * kLanes;
    const float size = static_cast<float>(width);
    Vec total = load_some(x + whole, width - whole);
    for (int64_t i = 0; i < whole; i += kLanes) total += load(x + i);
    const float near = sum_of(total) / size;
    Vec rests{}, squares{};
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec apart = load(x + i) - near;
        rests += apart;
        squares = multiply_add(apart, apart, squares);
    }
    float rest = sum_of(rests), square = sum_of(squares);
    for (int64_t i = whole; i < width; ++i) {
        rest += x[i] - near;
        square += (x[i] - near) * (x[i] - near);
    }
    const float off = rest / size;
    const float variance = square / size - off * off;  // of equal numbers, rounding may leave it below 0
    const float scale = 1 / __builtin_sqrtf((variance > 0 ? variance : 0) + eps);
    for (int64_t i = 0; i < whole; i += kLanes)
        store(out + i, multiply_add((load(x + i) - near - off) * scale, load(weight + i), load(bias + i)));
    for (int64_t i = whole; i < width; ++i) out[i] = (x[i] - near - off) * scale * weight[i] + bias[i];
}

void add_row(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

}  // namespace
}  // namespace bluejay
