// Threads that wait for work and share it piece by piece.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

class Pool {
public:
    explicit Pool(int threads) : process_(getpid()) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        if (process_ != getpid()) { // a fork has no threads to join
            for (auto &worker : workers_) worker.detach();
            return;
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            stopping_ = true;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int size() const { return static_cast<int>(workers_.size()) + 1; }
    bool is_of_this_process() const { return process_ == getpid(); }

    // Calls body(piece, thread) for every piece, and returns when all are done.
    template <class Body> void run(int pieces, Body &&body) {
        if (workers_.empty() || pieces <= 1) {
            for (int piece = 0; piece < pieces; ++piece) body(piece, 0);
            return;
        }
        body_ = std::ref(body);
        pieces_ = pieces;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        take(0);
        for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins)
            if (spins < SPINS)
                relax();
            else
                std::this_thread::yield();
    }

private:
    static constexpr int SPINS = 20000; // some 50 microseconds: a pass has many short steps

    void take(int thread) {
        for (int piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;)
            body_(piece, thread);
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
                if (spins < SPINS) {
                    relax();
                    continue;
                }
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load(std::memory_order_acquire);
            if (stopping_) return;
            take(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    pid_t process_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::function<void(int, int)> body_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> next_{0}, busy_{0}, sleeping_{0};
    int pieces_ = 0;
    bool stopping_ = false;
};
