// Vectors of floats of the instruction set that this file is compiled for, and functions on them.
//
// GCC's and Clang's vector extensions make the same code run on AVX512, AVX2, NEON and SSE. Nothing
// here may be reordered by the compiler: every sum is written in the order in which it is computed,
// so that a token's numbers do not depend on how many other tokens are in the pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

constexpr int LANES = VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

static inline Floats load(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline Words load_words(const void *from) {
    Words v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }

static inline Floats all(float x) { return Floats{} + x; }

// Rounds to the nearest, ties to even, as torch does; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float from_bf16(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The sum of all lanes, always in the same order.
static inline float sum(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

static inline float dot(const float *a, const float *b, int n) {
    Floats total = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < n; ++i) result += a[i] * b[i];
    return result;
}

// e^x with a relative error below 2e-7. The polynomial is that of Cephes (expf) on x - n ln 2.
static inline Floats exponential(Floats x) {
    const Floats low = all(-87.3f), high = all(88.3f);
    const Floats inside = x < low ? low : x > high ? high : x;
    const Floats shift = all(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    const Floats n = (inside * 1.44269504f + shift) - shift;
    Floats r = inside - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    const Floats result = p * scale;
    return x != x ? x : x < low ? all(0.0f) : result;
}

static inline float exponential(float x) { return exponential(all(x))[0]; }
