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

}  // namespace bluejay
