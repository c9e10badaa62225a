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

// Call piece(i) for each i in [0, count), with all threads if the work is worth waking them.
template <class Piece>
void share(int64_t count, int64_t numbers, Piece&& piece) {
    if (numbers <= 4 * kPiece) {
        for (int64_t i = 0; i < count; ++i) piece(i);
    } else {
        parallel_for(count, piece);
    }
}

// Call part(first, count) for pieces of so many numbers.
template <class Part>
void share_numbers(int64_t count, Part&& part) {
    share((count + kPiece - 1) / kPiece, count, [&](int64_t i) { part(i * kPiece, std::min(kPiece, count - i * kPiece)); });
}

}  // namespace

void gelu_new(float* x, int64_t count) {
    const ElementwiseKernels& kernel = kernels();
    share_numbers(count, [&](int64_t first, int64_t some) { kernel.gelu_new(x + first, some); });
}

void rotate(float* x, const float* turns, int64_t tokens, int64_t heads, int64_t head_dim, int64_t pairs) {
    const ElementwiseKernels& kernel = kernels();
    share(tokens, tokens * heads * pairs, [&](int64_t token) {
        for (int64_t head = 0; head < heads; ++head)
            kernel.rotate_head(x + (token * heads + head) * head_dim, turns + token * 2 * pairs, pairs);
    });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t width, float* out) {
    const ElementwiseKernels& kernel = kernels();
    share(rows, rows * width,
          [&](int64_t row) { kernel.layer_norm_row(x + row * width, weight, bias, eps, width, out + row * width); });
}

void add(float* x, const float* y, int64_t count) {
    const ElementwiseKernels& kernel = kernels();
    share_numbers(count, [&](int64_t first, int64_t some) { kernel.add_row(x + first, y + first, some); });
}

}  // namespace bluejay
