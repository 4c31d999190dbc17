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
#include <utility>

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
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

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

// Returns the floats that bfloat16 numbers stand for.
static inline Floats load(const uint16_t *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Floats v;
    std::memcpy(&v, &words, sizeof v);
    return v;
}

static inline float to_float(float x) { return x; }
static inline float to_float(uint16_t x) { return from_bf16(x); }

// The product of a vector of floats with one of floats or bfloat16.
template <class T> static inline float dot(const float *a, const T *b, int n) {
    Floats total = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) total = multiply_add(load(a + i), load(b + i), total);
    float result = sum(total);
    for (; i < n; ++i) result = multiply_add(a[i], to_float(b[i]), result);
    return result;
}

// Which lane of a (below LANES) or b (LANES more) goes to `lane` when halves of WIDTH are added.
template <int WIDTH> constexpr int added_lane(int lane, bool upper) {
    const int group = lane / (2 * WIDTH) * 2 * WIDTH, within = lane % WIDTH;
    return group + within + (upper ? WIDTH : 0) + (lane % (2 * WIDTH) < WIDTH ? 0 : LANES);
}

template <int... LANE> static inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, Ints{LANE...});
#endif
}

template <int WIDTH, size_t... LANE>
static inline Floats add_halves(Floats a, Floats b, std::index_sequence<LANE...>) {
    return shuffle<added_lane<WIDTH>(LANE, false)...>(a, b) +
           shuffle<added_lane<WIDTH>(LANE, true)...>(a, b);
}

// Returns the sums of LANES vectors, each added in the order of `sum`.
template <int WIDTH = LANES / 2> static inline Floats sums_of(Floats *vectors) {
    for (int i = 0; i < WIDTH; ++i)
        vectors[i] = add_halves<WIDTH>(vectors[i], vectors[i + WIDTH],
                                       std::make_index_sequence<LANES>());
    if constexpr (WIDTH == 1)
        return vectors[0];
    else
        return sums_of<WIDTH / 2>(vectors);
}

// Returns the products of a vector with LANES vectors that lie one behind the other; each equals
// `dot`, bit for bit.
template <class T> static inline Floats dots(const float *a, const T *b, int n) {
    Floats totals[LANES] = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats vector = load(a + i);
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane)
            totals[lane] = multiply_add(vector, load(b + static_cast<size_t>(lane) * n + i),
                                        totals[lane]);
    }
    Floats result = sums_of(totals);
    for (; i < n; ++i)
        for (int lane = 0; lane < LANES; ++lane)
            result[lane] = multiply_add(
                a[i], to_float(b[static_cast<size_t>(lane) * n + i]), result[lane]);
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
