// Attention kernels for AVX-512F.
#define BLUEJAY_VECTOR_BYTES 64
#include "attention_kernels.h"

namespace bluejay {

const AttentionKernels attention_avx512 = {3 * kLanes, attend, attend_one, store_heads};

}  // namespace bluejay
