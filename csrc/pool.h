// One pool of threads for all kernels.
//
// A step of decoding runs some hundred kernels, microseconds to a millisecond long, with work of one thread between them: of
// small kernels, and of Python where a step is not recorded. So workers wait for the next kernel awake for a moment before
// they sleep, and nobody waits for a worker that has not come yet: a job is over when its indices are done and those who
// joined it have left.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bluejay {

constexpr int kMaxThreads = 1024;

// The threads that work on a kernel, the caller among them.
int num_threads();

// Change their number, for kernels that begin from now on. With `spin` false workers sleep at once: right where they would
// take the processor from one another, having fewer of them. std::invalid_argument outside of 1 … kMaxThreads.
void set_num_threads(int count, bool spin = true);

// Implementation of parallel_for.
void run_parallel(int64_t count, void (*call)(void* body, int64_t index), void* body);

// Call body(index) for each index in [0, count), in any order, on several threads; returns when all are done.
//
// Indices are handed out one by one, so that a thread which is held up costs one index of work. An index should be worth
// 5 microseconds or more. A call within a body, and a second caller while the pool is busy, work alone. The first
// exception of a body reaches the caller, and indices that have not begun are then left out.
template <class Body>
void parallel_for(int64_t count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_parallel(
        count, [](void* object, int64_t index) { (*static_cast<Plain*>(object))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace bluejay
