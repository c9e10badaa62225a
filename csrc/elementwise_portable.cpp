// Elementwise kernels for any processor: 4 numbers to a vector, which SSE2 and NEON have.
#define BLUEJAY_VECTOR_BYTES 16
#include "elementwise_kernels.h"

namespace bluejay {

const ElementwiseKernels elementwise_portable = {layer_norm_row, add_row, gelu_new_row, rotate_head};

}  // namespace bluejay
