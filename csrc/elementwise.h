// What lies between the linear layers and is worth all threads.
#pragma once

#include <cstdint>

namespace bluejay {

// x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), in place. Results do not depend on the number of threads.
void gelu_new(float* x, int64_t count);

// Turn the first `pairs` pairs of each head, in place: x [tokens, heads, head_dim] float32; turns [tokens, pairs], each the
// cosine and the sine of an angle.
void rotate(float* x, const float* turns, int64_t tokens, int64_t heads, int64_t head_dim, int64_t pairs);

// out = (x - mean) / sqrt(variance + eps) * weight + bias for each row of x [rows, width]; out may be x.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t width, float* out);

// x += y.
void add(float* x, const float* y, int64_t count);

struct ElementwiseKernels {
    void (*layer_norm_row)(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* out);
    void (*add_row)(float* x, const float* y, int64_t count);
    void (*gelu_new)(float* x, int64_t count);
    void (*rotate_head)(float* x, const float* turns, int64_t pairs);
};

extern const ElementwiseKernels elementwise_portable;
extern const ElementwiseKernels elementwise_avx2;
extern const ElementwiseKernels elementwise_avx512;

}  // namespace bluejay
