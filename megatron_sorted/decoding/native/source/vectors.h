// Vectors of floats of the instruction set that this file is compiled for, and functions on them.
//
// GCC's and Clang's vector extensions make the same code run on AVX512, AVX2, NEON and SSE. Sums
// and fused multiply-adds are written out in the order in which they are computed, and the compiler
// is forbidden to fuse others (-ffp-contract=off) or to reorder any (no -ffast-math). So a token's
// numbers depend neither on how many tokens are in the pass nor on where its memory lies.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

constexpr int LANES = VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

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

// x in every lane. (0 + x would turn -0 into 0.)
static inline Floats all(float x) { return x - Floats{}; }

// a b + c: rounded once where the instruction set can, else two times; the same in every lane.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if VECTOR_BYTES == 64
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VECTOR_BYTES == 32
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline float multiply_add(float a, float b, float c) {
#if VECTOR_BYTES >= 32 || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Rounds to the nearest, ties to even, as torch does; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The sum of all lanes: halves are added until one lane is left.
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
    for (; i + LANES <= n; i += LANES) total = multiply_add(load(a + i), load(b + i), total);
    float result = sum(total);
    for (; i < n; ++i) result = multiply_add(a[i], b[i], result);
    return result;
}

// e^x with a relative error below 2e-7; 0 below -87.3, e^88.3 above 88.3, NaN of NaN.
// The polynomial is that of Cephes (expf) on x - n ln 2.
static inline Floats exponential(Floats x) {
    const Floats low = all(-87.3f), high = all(88.3f);
    const Floats inside = x != x ? Floats{} : x < low ? low : x > high ? high : x;
    const Floats shift = all(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    const Floats n = multiply_add(inside, all(1.44269504f), shift) - shift;
    Floats r = multiply_add(n, all(-0.693359375f), inside);
    r = multiply_add(n, all(2.12194440e-4f), r);
    Floats p = all(1.9875691500e-4f);
    p = multiply_add(p, r, all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23; // 2^n; n is in [-126, 127]
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x != x ? x : x < low ? Floats{} : p * scale;
}

static inline float exponential(float x) { return exponential(all(x))[0]; }
