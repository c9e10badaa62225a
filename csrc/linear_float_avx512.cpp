// Linear layers of float32 for AVX-512F.
#define BLUEJAY_VECTOR_BYTES 64
#include "linear_float_kernels.h"

namespace bluejay {

const FloatKernels linear_float_avx512 = {multiply_float, kPartRows};

}  // namespace bluejay
