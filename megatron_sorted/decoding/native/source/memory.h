// Memory of a pass: aligned to cache lines and not initialised.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

constexpr size_t ALIGNMENT = 64;

struct Freed {
    void operator()(void *memory) const { ::operator delete(memory, std::align_val_t(ALIGNMENT)); }
};

template <class T> using Buffer = std::unique_ptr<T[], Freed>;

// Returns memory for rows * columns numbers; throws std::bad_alloc where there is not enough.
template <class T> static Buffer<T> allocate(size_t rows, size_t columns) {
    size_t count, bytes;
    if (__builtin_mul_overflow(rows, columns, &count) ||
        __builtin_mul_overflow(count, sizeof(T), &bytes))
        throw std::bad_alloc();
    return Buffer<T>(static_cast<T *>(::operator new(bytes, std::align_val_t(ALIGNMENT))));
}
