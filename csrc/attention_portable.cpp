// Attention kernels for any processor: 4 numbers to a vector, which SSE2 and NEON have.
#define BLUEJAY_VECTOR_BYTES 16
#include "attention_kernels.h"

namespace bluejay {

const AttentionKernels attention_portable = {3 * kLanes, attend, attend_one, store_heads};

}  // namespace bluejay
