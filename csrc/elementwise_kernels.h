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

}  // namespace
}  // namespace bluejay
