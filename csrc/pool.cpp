#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace bluejay {
namespace {

// Where a step is not recorded, Python works for some 50 microseconds between two kernels, and a token is chosen in some
// 500. To wake a thread that sleeps takes as long, on virtual machines several times that: 3 % of a step of GPT-J-6B.
constexpr std::chrono::microseconds kSpin{1000};

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Wait awake until `ready()`, for at most kSpin; whether it came.
template <class Ready>
bool spin_until(bool spin, Ready ready) {
    if (ready()) return true;
    if (!spin) return false;
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            relax();
            if (ready()) return true;
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

thread_local bool inside = false;  // whether this thread runs a body

// The state of a job is one word, so that joining, closing and leaving are one atomic step each:
//
//     | number of the job: 32 bits | open | caller sleeps | 14 bits unused | threads that joined: 16 bits |
constexpr uint64_t kJob = uint64_t{1} << 32;
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kCallerSleeps = uint64_t{1} << 30;
constexpr uint64_t kJoined = 0xffff;

class Pool {
public:
    Pool(int threads, bool spin) : spin_(spin) {
        for (int i = 1; i < threads; ++i) {
            try {
                workers_.emplace_back([this] { work(); });
            } catch (const std::system_error&) {
                break;  // no more threads to be had: fewer do the same, later
            }
        }
    }

    ~Pool() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_.store(true);
        }
        opened_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    // Whether the pool took the job: not while it has another one.
    bool run(int64_t count, void (*call)(void*, int64_t), void* body) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        open(count, call, body);
        take_indices();
        close();
        if (failure_) {
            std::exception_ptr failure;
            std::swap(failure, failure_);
            std::rethrow_exception(failure);
        }
        return true;
    }

private:
    void open(int64_t count, void (*call)(void*, int64_t), void* body) {
        count_ = count;
        call_ = call;
        body_ = body;
        failed_.store(false, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        const uint64_t number = (state_.load(std::memory_order_relaxed) & ~(kJob - 1)) + kJob;
        // Sequentially consistent, as is the sleeper's count: either we see it, or it sees the job.
        state_.store(number | kOpen);
        if (sleepers_.load() > 0) {
            { const std::lock_guard<std::mutex> lock(mutex_); }
            opened_.notify_all();
        }
    }

    void close() {
        uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
        const auto all_left = [&] { return (state_.load(std::memory_order_acquire) & kJoined) == 0; };
        if ((state & kJoined) == 0 || spin_until(spin_, all_left)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        state_.fetch_or(kCallerSleeps, std::memory_order_acq_rel);
        left_.wait(lock, all_left);
    }

    void take_indices() {
        inside = true;
        try {
            for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(body_, i);
        } catch (...) {
            next_.store(count_, std::memory_order_relaxed);
            if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
        }
        inside = false;
    }

    void work() {
        uint64_t seen = 0;  // the last job that this worker knows
        while (wait_for_job(seen)) {
            uint64_t state = state_.load(std::memory_order_relaxed);
            bool joined = false;
            while ((state & kOpen) && !joined) {
                joined = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
            }
            seen = state & ~(kJob - 1);
            if (!joined) continue;
            take_indices();
            state = state_.fetch_sub(1, std::memory_order_acq_rel) - 1;
            if ((state & kCallerSleeps) && (state & kJoined) == 0) {
                { const std::lock_guard<std::mutex> lock(mutex_); }
                left_.notify_one();
            }
        }
    }

    // Wait for a job other than `seen`; false when the pool ends.
    bool wait_for_job(uint64_t seen) {
        const auto news = [&] { return stop_.load() || (state_.load() & ~(kJob - 1)) != seen; };
        if (!spin_until(spin_, news)) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1);
            opened_.wait(lock, news);
            sleepers_.fetch_sub(1);
        }
        return !stop_.load();
    }

    const bool spin_;
    int64_t count_ = 0;
    void (*call_)(void*, int64_t) = nullptr;
    void* body_ = nullptr;
    std::exception_ptr failure_;
    std::atomic<bool> failed_{false};
    std::atomic<bool> stop_{false};
    std::atomic<int> sleepers_{0};
    std::mutex turn_;   // whose job it is
    std::mutex mutex_;  // for sleeping only
    std::condition_variable opened_;
    std::condition_variable left_;
    alignas(64) std::atomic<uint64_t> state_{0};  // lines of their own: all threads write here
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::vector<std::thread> workers_;
};

// Never destroyed: at the program's end workers may still sleep in it, and are best left alone.
struct Shared {
    std::mutex mutex;  // held to change what follows
    int threads = 0;
    bool spin = true;
    std::shared_ptr<Pool> pool;  // made when first needed

#if defined(__unix__) || defined(__APPLE__)
    Shared() { pthread_atfork(before_fork, after_fork, in_child); }
    static void before_fork();
    static void after_fork();
    static void in_child();
#endif
};

Shared& shared() {
    static Shared* const instance = new Shared;
    return *instance;
}

#if defined(__unix__) || defined(__APPLE__)
void Shared::before_fork() { shared().mutex.lock(); }
void Shared::after_fork() { shared().mutex.unlock(); }
void Shared::in_child() {
    // The child has none of the workers. What they left behind is dropped unseen; its own pool is made when needed.
    new std::shared_ptr<Pool>(std::move(shared().pool));
    inside = false;
    shared().mutex.unlock();
}
#endif

int count_of(Shared& state) {
    if (state.threads == 0) state.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    return state.threads;
}

std::shared_ptr<Pool> current_pool() {
    Shared& state = shared();
    const std::lock_guard<std::mutex> lock(state.mutex);
    const int threads = count_of(state);
    if (threads > 1 && !state.pool) state.pool = std::make_shared<Pool>(threads, state.spin);
    return state.pool;
}

}  // namespace

int num_threads() {
    const std::lock_guard<std::mutex> lock(shared().mutex);
    return count_of(shared());
}

void set_num_threads(int count, bool spin) {
    if (count < 1 || count > kMaxThreads) {
        throw std::invalid_argument("threads is " + std::to_string(count) + ", expected 1 to " + std::to_string(kMaxThreads));
    }
    std::shared_ptr<Pool> old;  // ends outside of the lock; if a kernel still runs on it, with that one's end
    const std::lock_guard<std::mutex> lock(shared().mutex);
    if (shared().threads == count && shared().spin == spin) return;
    shared().threads = count;
    shared().spin = spin;
    std::swap(old, shared().pool);
}

void run_parallel(int64_t count, void (*call)(void*, int64_t), void* body) {
    if (count > 1 && !inside) {
        const std::shared_ptr<Pool> pool = current_pool();
        if (pool && pool->run(count, call, body)) return;
    }
    for (int64_t i = 0; i < count; ++i) call(body, i);
}

}  // namespace bluejay
