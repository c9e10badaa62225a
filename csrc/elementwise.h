// What lies between the linear layers and is worth all threads.
#pragma once

#include <cstdint>

namespace bluejay {

// x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), in place. Results do not depend on the number of threads.
void gelu_new(float* x, int64_t count);

struct ElementwiseKernels {
    void (*gelu_new)(float* x, int64_t count);
};

extern const ElementwiseKernels elementwise_portable;
extern const ElementwiseKernels elementwise_avx2;
extern const ElementwiseKernels elementwise_avx512;

}  // namespace bluejay
