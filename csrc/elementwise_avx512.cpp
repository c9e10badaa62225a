// Elementwise kernels for AVX-512F.
#define BLUEJAY_VECTOR_BYTES 64
#include "elementwise_kernels.h"

namespace bluejay {

const ElementwiseKernels elementwise_avx512 = {layer_norm_row, add_row, gelu_new_row, rotate_head};

}  // namespace bluejay
