// Elementwise kernels for AVX2 + FMA + F16C.
#define BLUEJAY_VECTOR_BYTES 32
#include "elementwise_kernels.h"

namespace bluejay {

const ElementwiseKernels elementwise_avx2 = {layer_norm_row, add_row, gelu_new_row, rotate_head};

}  // namespace bluejay
