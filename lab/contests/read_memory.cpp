// Reads a buffer once by some threads, in the order of its addresses, and returns a sum of its words.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

std::uint64_t sum_of(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[64] = {};  // enough independent sums for every width of vectors
    for (std::size_t at = 0; at + 64 <= count; at += 64) {
        __builtin_prefetch(words + at + 1024);
        for (int lane = 0; lane < 64; ++lane) sums[lane] += words[at + lane];
    }
    std::uint64_t whole = 0;
    for (std::uint64_t sum : sums) whole += sum;
    return whole;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) std::uint64_t read_words(
    int num_threads, const std::uint64_t* words, std::size_t count) {
    std::vector<std::uint64_t> sums(num_threads);
    std::vector<std::thread> threads;
    const std::size_t share = count / num_threads / 64 * 64;
    for (int index = 1; index < num_threads; ++index)
        threads.emplace_back([=, &sums] { sums[index] = sum_of(words + index * share, share); });
    sums[0] = sum_of(words, share);
    for (std::thread& thread : threads) thread.join();
    std::uint64_t whole = 0;
    for (std::uint64_t sum : sums) whole += sum;
    return whole;
}
