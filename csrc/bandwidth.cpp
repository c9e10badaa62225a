#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kPart = 4 << 20;  // long enough that the processor's own prefetching runs ahead, short enough to share

uint64_t word(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace

uint64_t part_sum_portable(const uint8_t* part, int64_t num_bytes) {
    // Four sums that do not wait for one another; GCC would copy an array of words to the stack first.
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (const uint8_t* line = part; line < part + num_bytes; line += kLine) {
        a += word(line) + word(line + 32);
        b += word(line + 8) + word(line + 40);
        c += word(line + 16) + word(line + 48);
        d += word(line + 24) + word(line + 56);
    }
    return a + b + c + d;
}

uint64_t read_sum(const uint8_t* buffer, int64_t num_bytes) {
    auto part_sum = &part_sum_portable;
#ifdef BLUEJAY_X86
    if (active() != Isa::portable) part_sum = &part_sum_avx2;  // wider loads would read memory no faster
#endif
    std::atomic<uint64_t> sum{0};
    parallel_for((num_bytes + kPart - 1) / kPart, [&](int64_t index) {
        const int64_t first = index * kPart;
        sum.fetch_add(part_sum(buffer + first, std::min(kPart, num_bytes - first)), std::memory_order_relaxed);
    });
    return sum.load();
}

}  // namespace bluejay
