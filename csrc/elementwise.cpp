#include "elementwise.h"

#include <algorithm>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kPiece = 4096;  // numbers: some 2 microseconds, and a page boundary for most

const ElementwiseKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return elementwise_avx512;
    if (active() == Isa::avx2) return elementwise_avx2;
#endif
    return elementwise_portable;
}

}  // namespace

void gelu_new(float* x, int64_t count) {
    const ElementwiseKernels& kernel = kernels();
    const int64_t pieces = (count + kPiece - 1) / kPiece;
    const auto one = [&](int64_t i) { kernel.gelu_new(x + i * kPiece, std::min(kPiece, count - i * kPiece)); };
    if (pieces <= 4) {  // less than it takes to wake the others
        for (int64_t i = 0; i < pieces; ++i) one(i);
    } else {
        parallel_for(pieces, one);
    }
}

void rotate(float* x, const float* turns, int64_t tokens, int64_t heads, int64_t head_dim, int64_t pairs) {
    const ElementwiseKernels& kernel = kernels();
    const auto one = [&](int64_t token) {
        for (int64_t head = 0; head < heads; ++head)
            kernel.rotate_head(x + (token * heads + head) * head_dim, turns + token * 2 * pairs, pairs);
    };
    if (tokens * heads * pairs <= 4 * kPiece) {
        for (int64_t token = 0; token < tokens; ++token) one(token);
    } else {
        parallel_for(tokens, one);
    }
}

}  // namespace bluejay
