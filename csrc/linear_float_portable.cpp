// Linear layers of float32 for any processor: 4 numbers to a vector, which SSE2 and NEON have.
#define BLUEJAY_VECTOR_BYTES 16
#include "linear_float_kernels.h"

namespace bluejay {

const FloatKernels linear_float_portable = {multiply_float, kPartRows};

}  // namespace bluejay
