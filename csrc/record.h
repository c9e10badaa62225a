// Calls of kernels that can be repeated: what a step of decoding does is the same each time, only numbers in memory change.
//
// Between two kernels Python and PyTorch take some 50 microseconds to say what comes next: 15 % of a step of GPT-J-6B, as
// the weights that stream through the caches take their code along.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <utility>
#include <vector>

namespace bluejay {

using Recording = std::vector<std::function<void()>>;

// The recording that this thread's calls are added to, or nullptr.
inline Recording*& open_recording() {
    thread_local Recording* recording = nullptr;
    return recording;
}

// Run a kernel, without holding Python's lock; if a recording is open, keep it too. What it reads through pointers is read
// anew each time, so numbers that come from memory must be checked within.
template <class Work>
void submit(Work work) {
    {
        const nanobind::gil_scoped_release released;
        work();
    }
    if (open_recording()) open_recording()->emplace_back(std::move(work));
}

}  // namespace bluejay
