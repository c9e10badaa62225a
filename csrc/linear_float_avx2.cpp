// Linear layers of float32 for AVX2 + FMA.
#define BLUEJAY_VECTOR_BYTES 32
#include "linear_float_kernels.h"

namespace bluejay {

const FloatKernels linear_float_avx2 = {multiply_float, kPartRows};

}  // namespace bluejay
