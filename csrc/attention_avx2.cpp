// Attention kernels for AVX2 + FMA + F16C.
#define BLUEJAY_VECTOR_BYTES 32
#include "attention_kernels.h"

namespace bluejay {

const AttentionKernels attention_avx2 = {3 * kLanes, attend, attend_one, store_heads};

}  // namespace bluejay
