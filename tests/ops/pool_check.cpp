// What csrc/pool promises, checked without Python between, so that ThreadSanitizer can look on. test_pool.py runs it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/pool.h"

using namespace bluejay;

namespace {

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("not so: %s\n", what);
    std::exit(1);
}

// Every index is called once, and what bodies wrote is there when the call returns.
void each_index_once() {
    for (int threads : {1, 2, 3, 8}) {
        for (bool spin : {true, false}) {
            set_num_threads(threads, spin);
            for (int round = 0; round < 300; ++round) {
                std::vector<int> calls(static_cast<size_t>(round % 67), 0);
                parallel_for(static_cast<int64_t>(calls.size()), [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
                for (int count : calls) expect(count == 1, "each index is called once");
                // Now and then long enough for the workers to have gone to sleep.
                if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        }
    }
}

void work_is_shared() {
    set_num_threads(2);
    std::atomic<int> there{0};
    parallel_for(2, [&](int64_t) {
        ++there;
        while (there < 2) std::this_thread::yield();  // ends only if two threads are at it
    });
}

void exceptions_reach_the_caller() {
    set_num_threads(4);
    for (int round = 0; round < 200; ++round) {
        bool caught = false;
        try {
            parallel_for(100, [](int64_t i) {
                if (i % 10 == 3) throw std::runtime_error("index " + std::to_string(i));
            });
        } catch (const std::runtime_error& error) {
            caught = std::string(error.what()).rfind("index ", 0) == 0;
        }
        expect(caught, "an exception of a body reaches the caller");
        std::atomic<int> calls{0};
        parallel_for(50, [&](int64_t) { ++calls; });
        expect(calls == 50, "the pool goes on after an exception");
    }
}

void calls_may_nest() {
    set_num_threads(3);
    std::atomic<int> calls{0};
    parallel_for(8, [&](int64_t) { parallel_for(8, [&](int64_t) { ++calls; }); });
    expect(calls == 64, "a call within a body does all of its work");
}

void callers_may_be_many() {
    set_num_threads(3);
    std::atomic<int> calls{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) parallel_for(20, [&](int64_t) { ++calls; });
        });
    }
    for (int round = 0; round < 20; ++round) {  // while they are at it
        set_num_threads(1 + round % 4, round % 2 == 0);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
    for (std::thread& caller : callers) caller.join();
    expect(calls == 4 * 200 * 20, "callers at the same time, and a changing number of threads");
}

void wrong_numbers_are_refused() {
    for (int wrong : {-1, 0, kMaxThreads + 1}) {
        bool caught = false;
        try {
            set_num_threads(wrong);
        } catch (const std::invalid_argument&) {
            caught = true;
        }
        expect(caught, "a wrong number of threads is refused");
    }
}

void a_child_has_a_pool_of_its_own() {
    set_num_threads(2);
    parallel_for(2, [](int64_t) {});
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        work_is_shared();
        _exit(0);
    }
    int status = 0;
    expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
           "a child that was forked works with threads of its own");
    work_is_shared();  // and the parent goes on with its own
}

}  // namespace

int main(int argc, char**) {
    each_index_once();
    work_is_shared();
    exceptions_reach_the_caller();
    calls_may_nest();
    callers_may_be_many();
    wrong_numbers_are_refused();
    // ThreadSanitizer does not follow threads that a child of a threaded program starts: any argument leaves that out.
    if (argc == 1) a_child_has_a_pool_of_its_own();
    std::printf("all held\n");
    return 0;  // with workers asleep: the end must not wait for them
}
