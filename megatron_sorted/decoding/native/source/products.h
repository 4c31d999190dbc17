// Products of a fixed matrix with a few rows: y = W x + b for every token.
//
// A matrix is packed once in blocks of BLOCK outputs. Within a block the weights of one input stand
// beside each other, one output a lane, so that a product needs no sum across lanes: every output
// of every token adds its terms in the order of the inputs, however many tokens there are.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "pool.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

constexpr int VECTORS = 4;              // of a block
constexpr int BLOCK = VECTORS * LANES;  // outputs of a block
constexpr int GROUP = 64;               // inputs that share a scale in int8
constexpr int TILE = VECTOR_BYTES == 64 ? 6 : 2; // tokens whose sums fit into the registers

struct Matrix {
    int32_t kind, outputs, inputs, unused;
    const void *weights; // packed
    const float *scales; // of int8: [block][group][BLOCK]
    const float *bias;   // [outputs], or null

    int blocks() const { return (outputs + BLOCK - 1) / BLOCK; }
    int groups() const { return (inputs + GROUP - 1) / GROUP; }
};

// A token's input in the form that a kind of matrix needs.
struct Inputs {
    const float *floats;   // float32
    const uint16_t *halves; // bfloat16, an even number of them
    const int8_t *bytes;   // int8, whole groups
    const float *scales;   // int8: scale of each group
    const int32_t *sums;   // int8: 128 times the sum of each group
};

static inline int padded_inputs(int kind, int inputs) {
    if (kind == INT8) return (inputs + GROUP - 1) / GROUP * GROUP;
    return kind == BFLOAT16 ? (inputs + 1) / 2 * 2 : inputs;
}

static inline size_t packed_bytes(int kind, int outputs, int inputs) {
    const size_t blocks = (outputs + BLOCK - 1) / BLOCK;
    return blocks * BLOCK * padded_inputs(kind, inputs) *
           (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
}

static void quantize(const float *x, int n, int8_t *bytes, float *scale) {
    float most = 0.0f;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        const float size = std::fabs(x[i]);
        if (size > most) most = size;
        finite &= size <= std::numeric_limits<float>::max();
    }
    *scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = finite && most > 0.0f ? 127.0f / most : 0.0f;
    for (int i = 0; i < GROUP; ++i) {
        float scaled = i < n && finite ? std::nearbyintf(x[i] * inverse) : 0.0f;
        bytes[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, scaled)));
    }
}

// Packs rows [first, first + count) of one block; rows behind the last output are zero.
static void pack_block(int kind, const float *weights, int outputs, int inputs, int block,
                       void *packed, float *scales) {
    const int padded = padded_inputs(kind, inputs);
    const int groups = (inputs + GROUP - 1) / GROUP;
    for (int lane = 0; lane < BLOCK; ++lane) {
        const int output = block * BLOCK + lane;
        const float *row = output < outputs ? weights + static_cast<size_t>(output) * inputs : nullptr;
        if (kind == FLOAT32) {
            float *to = static_cast<float *>(packed) + static_cast<size_t>(block) * BLOCK * padded;
            for (int k = 0; k < inputs; ++k) to[static_cast<size_t>(k) * BLOCK + lane] = row ? row[k] : 0.0f;
        } else if (kind == BFLOAT16) {
            uint16_t *to = static_cast<uint16_t *>(packed) + static_cast<size_t>(block) * BLOCK * padded;
            for (int k = 0; k < padded; ++k)
                to[(static_cast<size_t>(k / 2) * BLOCK + lane) * 2 + k % 2] =
                    row && k < inputs ? to_bf16(row[k]) : 0;
        } else {
            int8_t *to = static_cast<int8_t *>(packed) + static_cast<size_t>(block) * BLOCK * padded;
            for (int group = 0; group < groups; ++group) {
                int8_t bytes[GROUP] = {};
                float scale = 0.0f;
                const int n = std::min(GROUP, inputs - group * GROUP);
                if (row) quantize(row + group * GROUP, n, bytes, &scale);
                scales[(static_cast<size_t>(block) * groups + group) * BLOCK + lane] = scale;
                for (int k = 0; k < GROUP; ++k) {
                    const size_t four = static_cast<size_t>(group) * (GROUP / 4) + k / 4;
#if defined(__AVX512VNNI__)
                    to[(four * BLOCK + lane) * 4 + k % 4] = static_cast<int8_t>(bytes[k] ^ 0x80);
#else
                    to[(four * BLOCK + lane) * 4 + k % 4] = bytes[k];
#endif
                }
            }
        }
    }
}

static inline void prefetch(const void *address) { __builtin_prefetch(address, 0, 3); }
constexpr int AHEAD = 4096; // bytes

template <int T>
static inline void block_float32(const Matrix &m, int block, const Inputs *x, Floats sums[T][VECTORS]) {
    const float *w = static_cast<const float *>(m.weights) + static_cast<size_t>(block) * BLOCK * m.inputs;
    for (int k = 0; k < m.inputs; ++k, w += BLOCK) {
        for (int j = 0; j < VECTORS; ++j) {
            if (VECTOR_BYTES == 64 || j % 2 == 0) prefetch(reinterpret_cast<const char *>(w + j * LANES) + AHEAD);
            const Floats weights = load(w + j * LANES);
            for (int t = 0; t < T; ++t) sums[t][j] += weights * x[t].floats[k];
        }
    }
}

template <int T>
static inline void block_bfloat16(const Matrix &m, int block, const Inputs *x, Floats sums[T][VECTORS]) {
    const int padded = padded_inputs(BFLOAT16, m.inputs);
    const uint16_t *w = static_cast<const uint16_t *>(m.weights) + static_cast<size_t>(block) * BLOCK * padded;
    for (int k = 0; k < padded; k += 2, w += 2 * BLOCK) {
        for (int j = 0; j < VECTORS; ++j) {
            prefetch(reinterpret_cast<const char *>(w + 2 * j * LANES) + AHEAD);
            const Words both = load_words(w + 2 * j * LANES);
#if defined(__AVX512BF16__)
            for (int t = 0; t < T; ++t) {
                int32_t pair;
                std::memcpy(&pair, x[t].halves + k, 4);
                sums[t][j] = reinterpret_cast<Floats>(_mm512_dpbf16_ps(
                    reinterpret_cast<__m512>(sums[t][j]),
                    (__m512bh)reinterpret_cast<__m512i>(both),
                    (__m512bh)_mm512_set1_epi32(pair)));
            }
#else
            const Words low = both << 16, high = both & 0xffff0000u;
            Floats even, odd;
            std::memcpy(&even, &low, sizeof even);
            std::memcpy(&odd, &high, sizeof odd);
            for (int t = 0; t < T; ++t) {
                sums[t][j] += even * from_bf16(x[t].halves[k]);
                sums[t][j] += odd * from_bf16(x[t].halves[k + 1]);
            }
#endif
        }
    }
}

// Adds to every lane the exact sum of four products of bytes.
static inline Ints add_products(Ints sum, Words weights, int32_t four) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights), _mm512_set1_epi32(four)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // |x| and w with the sign of x: both stay within 127, so that no pair overflows 16 bits
    const __m256i x = _mm256_set1_epi32(four), w = reinterpret_cast<__m256i>(weights);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    Ints w;
    std::memcpy(&w, &weights, sizeof w);
    for (int i = 0; i < 4; ++i) {
        const int32_t x = static_cast<int8_t>(static_cast<uint32_t>(four) >> (8 * i));
        sum += (w << (24 - 8 * i) >> 24) * x;
    }
    return sum;
#endif
}

// J vectors of a block, from vector `at` on.
template <int T, int J>
static inline void part_int8(const Matrix &m, int block, int at, const Inputs *x, Floats sums[T][J]) {
    const int groups = m.groups();
    const int8_t *w = static_cast<const int8_t *>(m.weights) +
                      static_cast<size_t>(block) * BLOCK * groups * GROUP + at * VECTOR_BYTES;
    const float *scales = m.scales + static_cast<size_t>(block) * groups * BLOCK + at * LANES;
    for (int group = 0; group < groups; ++group, scales += BLOCK) {
        Ints exact[T][J] = {};
        for (int k = 0; k < GROUP; k += 4, w += 4 * BLOCK) {
            for (int j = 0; j < J; ++j) {
                prefetch(w + j * VECTOR_BYTES + AHEAD);
                const Words weights = load_words(w + j * VECTOR_BYTES);
                for (int t = 0; t < T; ++t) {
                    int32_t four;
                    std::memcpy(&four, x[t].bytes + group * GROUP + k, 4);
                    exact[t][j] = add_products(exact[t][j], weights, four);
                }
            }
        }
        for (int t = 0; t < T; ++t) {
#if defined(__AVX512VNNI__)
            const int32_t surplus = x[t].sums[group]; // of the 128 added to every weight
#else
            const int32_t surplus = 0;
#endif
            for (int j = 0; j < J; ++j)
                sums[t][j] += __builtin_convertvector(exact[t][j] - surplus, Floats) *
                              (load(scales + j * LANES) * x[t].scales[group]);
        }
    }
}

template <int T>
static inline void block_int8(const Matrix &m, int block, const Inputs *x, Floats sums[T][VECTORS]) {
    constexpr int J = T == 1 ? VECTORS : T <= 3 && VECTOR_BYTES == 64 ? VECTORS : T <= 2 ? 2 : 2;
    for (int at = 0; at < VECTORS; at += J) {
        Floats part[T][J] = {};
        part_int8<T, J>(m, block, at, x, part);
        for (int t = 0; t < T; ++t)
            for (int j = 0; j < J; ++j) sums[t][at + j] = part[t][j];
    }
}

// Writes T tokens' outputs of one block, and never behind the last output.
template <int T>
static void multiply_block(const Matrix &m, int block, const Inputs *x, float *const *to) {
    Floats sums[T][VECTORS] = {};
    if (m.kind == FLOAT32)
        block_float32<T>(m, block, x, sums);
    else if (m.kind == BFLOAT16)
        block_bfloat16<T>(m, block, x, sums);
    else
        block_int8<T>(m, block, x, sums);
    const int first = block * BLOCK, count = std::min(BLOCK, m.outputs - first);
    for (int t = 0; t < T; ++t) {
        float *outputs = to[t] + first;
        if (count == BLOCK) {
            for (int j = 0; j < VECTORS; ++j)
                store(outputs + j * LANES,
                      m.bias ? sums[t][j] + load(m.bias + first + j * LANES) : sums[t][j]);
        } else {
            float whole[BLOCK];
            for (int j = 0; j < VECTORS; ++j) store(whole + j * LANES, sums[t][j]);
            for (int i = 0; i < count; ++i)
                outputs[i] = m.bias ? whole[i] + m.bias[first + i] : whole[i];
        }
    }
}

template <int T>
static void multiply_tile(const Matrix &m, int block, int tokens, const Inputs *x, float *const *to) {
    if constexpr (T == 1)
        multiply_block<1>(m, block, x, to);
    else if (tokens == T)
        multiply_block<T>(m, block, x, to);
    else
        multiply_tile<T - 1>(m, block, tokens, x, to);
}

// y[t] = W x[t] + b for n tokens: the blocks are shared among the threads; each is read once.
static void multiply(Pool &pool, const Matrix &m, int n, const Inputs *x, float *const *to) {
    const int tiles = (n + TILE - 1) / TILE;
    const int blocks = m.blocks();
    const int pieces = std::min(blocks, pool.size() == 1 ? 1 : pool.size() * 4);
    pool.run(pieces, [&](int piece, int) {
        const int begin = static_cast<int>(static_cast<int64_t>(blocks) * piece / pieces);
        const int end = static_cast<int>(static_cast<int64_t>(blocks) * (piece + 1) / pieces);
        for (int block = begin; block < end; ++block)
            for (int tile = 0; tile < tiles; ++tile) {
                const int first = static_cast<int>(static_cast<int64_t>(n) * tile / tiles);
                const int last = static_cast<int>(static_cast<int64_t>(n) * (tile + 1) / tiles);
                multiply_tile<TILE>(m, block, last - first, x + first, to + first);
            }
    });
}
