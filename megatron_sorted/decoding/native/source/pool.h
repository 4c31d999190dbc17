// Threads that wait for work and share it piece by piece.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

// Waits for a condition; returns false after some 50 microseconds: a pass has many short steps, but
// idle threads must not keep a core busy.
template <class Condition> static bool spin_until(Condition &&condition) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(50);
    do {
        for (int i = 0; i < 16; ++i) {
            if (condition()) return true;
            relax();
        }
    } while (Clock::now() < end);
    return false;
}

class Pool {
public:
    // Where the system allows fewer threads than requested, those that it allows do the work.
    explicit Pool(int threads) : requested_(threads), process_(getpid()) {
        workers_.reserve(threads > 1 ? threads - 1 : 0);
        sigset_t every, before;
        sigfillset(&every); // signals are for the threads of Python
        pthread_sigmask(SIG_SETMASK, &every, &before);
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error &) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    // Ends the threads. Never call it in a fork of the process that made it: they are not there.
    ~Pool() {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            stopping_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int size() const { return static_cast<int>(workers_.size()) + 1; }
    int requested() const { return requested_; }
    bool is_of_this_process() const { return process_ == getpid(); }

    // Calls body(piece, thread) for every piece, and returns when all are done. The body must not
    // throw. A thread that sleeps takes part once it is awake; the others do not wait for it.
    template <class Body> void run(int64_t pieces, Body &&body) {
        if (workers_.empty() || pieces <= 1) {
            for (int64_t piece = 0; piece < pieces; ++piece) body(piece, 0);
            return;
        }
        body_ = std::ref(body);
        pieces_ = pieces;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            generation_.fetch_add(1);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        take(0);
        // A worker counts itself before it looks at open_, and this thread closes before it counts:
        // so either the worker stays out, or it is waited for.
        open_.store(false);
        const auto are_done = [&] { return busy_.load() == 0; };
        while (!spin_until(are_done)) std::this_thread::yield();
    }

private:
    void take(int thread) {
        for (int64_t piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;)
            body_(piece, thread);
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            if (!spin_until([&] { return generation_.load() != seen; })) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load();
            if (stopping_.load()) return;
            busy_.fetch_add(1);
            if (open_.load()) take(thread);
            busy_.fetch_sub(1);
        }
    }

    const int requested_;
    const pid_t process_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::function<void(int64_t, int)> body_;
    int64_t pieces_ = 0;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> busy_{0}, sleeping_{0};
    std::atomic<bool> open_{false}, stopping_{false};
    std::vector<std::thread> workers_; // last: their work uses all of the above
};
