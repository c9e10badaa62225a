// Reading memory as fast as the machine can: what decoding is held against.
#pragma once

#include <cstdint>

namespace bluejay {

constexpr int64_t kLine = 64;  // bytes of a cache line

// The sum of a buffer's 64-bit words, read once by all threads of the pool; num_bytes is a multiple of kLine.
uint64_t read_sum(const uint8_t* buffer, int64_t num_bytes);

// The same of one thread's part.
uint64_t part_sum_portable(const uint8_t* part, int64_t num_bytes);
uint64_t part_sum_avx2(const uint8_t* part, int64_t num_bytes);

}  // namespace bluejay
