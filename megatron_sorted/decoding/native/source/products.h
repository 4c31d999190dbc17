// Products of a packed matrix with rows: y = W x + b for every token.
//
// Every output of every token adds its terms in the order of the inputs, however many tokens there
// are and however the work is divided: n tokens at once equal n tokens one by one, bit for bit.
#pragma once

#include <algorithm>

#include "packing.h"
#include "pool.h"

// Tokens of a tile: their sums (TILE * VECTORS) and the operands fit into 32 registers of AVX512
// and NEON, or 16 of AVX2 and SSE.
#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int TILE = 6;
#elif VECTOR_BYTES == 32
constexpr int TILE = 3;
#else
constexpr int TILE = 2;
#endif
// From this number of tokens on, inputs are divided into chunks whose weights fit into the first
// cache. Sums between chunks are kept in y; storing and loading them changes no bit.
constexpr int MANY = 4 * TILE;
constexpr int CHUNK_BYTES = 32768;
constexpr int SPAN = 96; // tokens of a piece of work then

static inline void prefetch(const void *address) { __builtin_prefetch(address, 0, 3); }
constexpr int AHEAD = 8192; // bytes

// Inputs [from, to), each a multiple of GROUP or the end.
struct Range {
    int from, to;
};

template <int T>
static inline void add_float32(const Matrix &m, int block, Range range, const Inputs *x,
                               Floats sums[T][VECTORS]) {
    const float *w = static_cast<const float *>(m.weights) + m.weights_before(block) +
                     static_cast<size_t>(range.from) * BLOCK;
    for (int k = range.from; k < range.to; ++k, w += BLOCK) {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            if (j * VECTOR_BYTES % 64 == 0)
                prefetch(reinterpret_cast<const char *>(w + j * LANES) + AHEAD);
            const Floats weights = load(w + j * LANES);
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t)
                sums[t][j] = multiply_add(weights, all(x[t].floats[k]), sums[t][j]);
        }
    }
}

template <int T>
static inline void add_bfloat16(const Matrix &m, int block, Range range, const Inputs *x,
                                Floats sums[T][VECTORS]) {
    const uint16_t *w = static_cast<const uint16_t *>(m.weights) + m.weights_before(block) +
                        static_cast<size_t>(range.from) * BLOCK;
    for (int k = range.from; k < range.to; k += 2, w += 2 * BLOCK) {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            if (j * VECTOR_BYTES % 64 == 0)
                prefetch(reinterpret_cast<const char *>(w + 2 * j * LANES) + AHEAD);
            const Words both = load_words(w + 2 * j * LANES);
#if VECTOR_BYTES == 64 && defined(__AVX512BF16__) // PAIRS
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                int32_t pair;
                std::memcpy(&pair, x[t].halves + k, 4);
                sums[t][j] = (Floats)_mm512_dpbf16_ps((__m512)sums[t][j], (__m512bh)both,
                                                      (__m512bh)_mm512_set1_epi32(pair));
            }
#else
            const Words low = both << 16, high = both & 0xffff0000u;
            Floats even, odd;
            std::memcpy(&even, &low, sizeof even);
            std::memcpy(&odd, &high, sizeof odd);
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                sums[t][j] = multiply_add(even, all(x[t].floats[k]), sums[t][j]);
                sums[t][j] = multiply_add(odd, all(x[t].floats[k + 1]), sums[t][j]);
            }
#endif
        }
    }
}

// Adds to every lane the exact sum of four products of bytes.
//
// AVX2 and AVX512BW add pairs of products in 16 bits, which saturate. They multiply |x| by w with
// the sign of x; both are at most 127 (`quantize`), so a pair is at most 2 * 127 * 127.
static_assert(2 * 127 * 127 <= 32767, "pairs of products do not saturate");

static inline Ints add_products(Ints sum, Words weights, int32_t four) {
#if VECTOR_BYTES == 64 && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
#elif VECTOR_BYTES == 64
    const __m512i x = _mm512_set1_epi32(four), w = (__m512i)weights;
    const __m512i turned =
        _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), turned);
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif VECTOR_BYTES == 32
    const __m256i x = _mm256_set1_epi32(four), w = (__m256i)weights;
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    const uint32_t x = static_cast<uint32_t>(four);
    for (int i = 0; i < 4; ++i) {
        const Ints w = (Ints)(weights << (24 - 8 * i)) >> 24;
        sum += w * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * i)));
    }
    return sum;
#endif
}

// Only the exact sums of a group are kept in registers: `sums` is loaded and stored once a group.
template <int T>
static inline void add_int8(const Matrix &m, int block, Range range, const Inputs *x,
                            Floats sums[T][VECTORS]) {
    const int8_t *w = static_cast<const int8_t *>(m.weights) + m.weights_before(block) +
                      static_cast<size_t>(range.from) * BLOCK;
    const float *scales = m.scales + static_cast<size_t>(block) * m.groups() * BLOCK;
    for (int group = range.from / GROUP; group * GROUP < range.to; ++group) {
        Ints exact[T][VECTORS];
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                exact[t][j] = Ints{} - (UNSIGNED_WEIGHTS ? x[t].sums[group] : 0);
        for (int k = 0; k < GROUP; k += 4, w += 4 * BLOCK) {
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) {
                if (j * VECTOR_BYTES % 64 == 0) prefetch(w + j * VECTOR_BYTES + AHEAD);
                const Words weights = load_words(w + j * VECTOR_BYTES);
#pragma GCC unroll 6
                for (int t = 0; t < T; ++t) {
                    int32_t four;
                    std::memcpy(&four, x[t].bytes + group * GROUP + k, 4);
                    exact[t][j] = add_products(exact[t][j], weights, four);
                }
            }
        }
        Floats scale[VECTORS];
        for (int j = 0; j < VECTORS; ++j)
            scale[j] = load(scales + static_cast<size_t>(group) * BLOCK + j * LANES);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) {
                const Floats whole = __builtin_convertvector(exact[t][j], Floats);
                sums[t][j] = multiply_add(whole, scale[j] * x[t].scales[group], sums[t][j]);
            }
    }
}

// Loads BLOCK numbers of which only `count` exist.
static inline void load_block(const float *from, int count, Floats to[VECTORS]) {
    float whole[BLOCK] = {};
    if (count < BLOCK) std::memcpy(whole, from, sizeof(float) * count);
    for (int j = 0; j < VECTORS; ++j) to[j] = load((count < BLOCK ? whole : from) + j * LANES);
}

// Stores the first `count` of BLOCK numbers.
static inline void store_block(const Floats from[VECTORS], int count, float *to) {
    if (count == BLOCK) {
        for (int j = 0; j < VECTORS; ++j) store(to + j * LANES, from[j]);
        return;
    }
    float whole[BLOCK];
    for (int j = 0; j < VECTORS; ++j) store(whole + j * LANES, from[j]);
    std::memcpy(to, whole, sizeof(float) * count);
}

// T tokens, one block, a range of inputs: continues the sums in y, and adds the bias at the end.
template <int T>
static void multiply_block(const Matrix &m, int block, Range range, const Inputs *x,
                           float *const *to) {
    const int first = block * BLOCK, count = std::min(BLOCK, m.outputs - first);
    Floats sums[T][VECTORS] = {};
    if (range.from > 0)
        for (int t = 0; t < T; ++t) load_block(to[t] + first, count, sums[t]);
    if (m.kind == FLOAT32) {
        add_float32<T>(m, block, range, x, sums);
    } else if (m.kind == BFLOAT16) {
        add_bfloat16<T>(m, block, range, x, sums);
    } else {
        add_int8<T>(m, block, range, x, sums);
    }
    if (m.bias && range.to == m.padded()) {
        Floats bias[VECTORS];
        load_block(m.bias + first, count, bias);
        for (int t = 0; t < T; ++t)
            for (int j = 0; j < VECTORS; ++j) sums[t][j] += bias[j];
    }
    for (int t = 0; t < T; ++t) store_block(sums[t], count, to[t] + first);
}

template <int T>
static void multiply_tile(const Matrix &m, int block, Range range, int tokens, const Inputs *x,
                          float *const *to) {
    if constexpr (T == 1)
        multiply_block<1>(m, block, range, x, to);
    else if (tokens == T)
        multiply_block<T>(m, block, range, x, to);
    else
        multiply_tile<T - 1>(m, block, range, tokens, x, to);
}

// y[t] = W x[t] + b for n tokens. A piece of work has several blocks of outputs and all tokens;
// with many tokens it has one block and a span of them. Pieces of a block follow each other.
static void multiply(Pool &pool, const Matrix &m, int n, const Inputs *x, float *const *to) {
    const int padded = m.padded();
    const bool is_many = n >= MANY;
    const int size = m.kind == FLOAT32 ? 4 : m.kind == BFLOAT16 ? 2 : 1;
    const int chunk = is_many ? CHUNK_BYTES / (BLOCK * size) : std::max(padded, 1);
    const int spans = is_many ? (n + SPAN - 1) / SPAN : 1;
    const int shares =
        is_many ? m.blocks() : std::min(m.blocks(), pool.size() > 1 ? 4 * pool.size() : 1);
    pool.run(static_cast<int64_t>(shares) * spans, [&](int64_t piece, int) {
        const int64_t share = piece / spans, span = piece % spans;
        const int begin = static_cast<int>(m.blocks() * share / shares);
        const int end = static_cast<int>(m.blocks() * (share + 1) / shares);
        const int first = static_cast<int>(n * span / spans);
        const int count = static_cast<int>(n * (span + 1) / spans) - first;
        const int tiles = (count + TILE - 1) / TILE;
        for (int block = begin; block < end; ++block) {
            int from = 0;
            do { // once for a matrix without inputs
                const Range range = {from, std::min(padded, from + chunk)};
                for (int tile = 0; tile < tiles; ++tile) {
                    const int64_t at = static_cast<int64_t>(count) * tile / tiles;
                    const int64_t next = static_cast<int64_t>(count) * (tile + 1) / tiles;
                    multiply_tile<TILE>(m, block, range, static_cast<int>(next - at),
                                        x + first + at, to + first + at);
                }
                from += chunk;
            } while (from < padded);
        }
    });
}
