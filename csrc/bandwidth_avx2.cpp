#include <immintrin.h>

#include "bandwidth.h"

namespace bluejay {
namespace {

__m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

}  // namespace

uint64_t part_sum_avx2(const uint8_t* part, int64_t num_bytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 2 * kLine <= num_bytes; i += 2 * kLine) {
        a = _mm256_add_epi64(a, load(part + i));
        b = _mm256_add_epi64(b, load(part + i + 32));
        c = _mm256_add_epi64(c, load(part + i + 64));
        d = _mm256_add_epi64(d, load(part + i + 96));
    }
    a = _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d));
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), a);
    return words[0] + words[1] + words[2] + words[3] + part_sum_portable(part + i, num_bytes - i);
}

}  // namespace bluejay
