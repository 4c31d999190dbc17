// Matrices packed once for products with a few rows, and rows in the form that a kind needs.
//
// A matrix is packed in blocks of BLOCK outputs. Within a block the weights of one input stand
// beside each other, one output a lane, so that a product needs no sum across lanes.
#pragma once

#include <algorithm>

#include "vectors.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

constexpr int VECTORS = 4;             // of a block
constexpr int BLOCK = VECTORS * LANES; // outputs of a block
constexpr int GROUP = 64;              // inputs that share a scale in int8

// With VNNI, products are of unsigned weights and signed inputs: 128 is added to every weight.
#if VECTOR_BYTES == 64 && defined(__AVX512VNNI__)
constexpr bool UNSIGNED_WEIGHTS = true;
#else
constexpr bool UNSIGNED_WEIGHTS = false;
#endif

// One instruction multiplies pairs of bfloat16; without it inputs are rounded and stay floats.
#if VECTOR_BYTES == 64 && defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

static inline int padded_inputs(int kind, int inputs) {
    const int whole = kind == INT8 ? GROUP : kind == BFLOAT16 ? 2 : 1;
    return (inputs + whole - 1) / whole * whole;
}

// A packed matrix. Float32: [block][input][BLOCK]. Bfloat16: [block][pair of inputs][BLOCK][2].
// Int8: [block][four inputs][BLOCK][4]. Outputs and inputs behind the last are zero.
struct Matrix {
    int32_t kind, outputs, inputs, unused;
    const void *weights;
    const float *scales; // int8: [block][group][BLOCK]
    const float *bias;   // [outputs], or null

    int blocks() const { return (outputs + BLOCK - 1) / BLOCK; }
    int groups() const { return (inputs + GROUP - 1) / GROUP; }
    int padded() const { return padded_inputs(kind, inputs); }
    size_t weights_before(int block) const { // in all blocks before this one
        return static_cast<size_t>(block) * BLOCK * padded();
    }
};

// A token's input in the form that a kind of matrix needs.
struct Inputs {
    const float *floats;    // float32, or rounded for bfloat16 without PAIRS
    const uint16_t *halves; // bfloat16 with PAIRS, an even number of them
    const int8_t *bytes;    // int8, whole groups
    const float *scales;    // int8: scale of each group
    const int32_t *sums;    // int8: 128 times the sum of each group
};

static inline size_t packed_bytes(int kind, int outputs, int inputs) {
    const size_t blocks = (static_cast<size_t>(outputs) + BLOCK - 1) / BLOCK;
    return blocks * BLOCK * padded_inputs(kind, inputs) *
           (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
}

// Quantises up to GROUP numbers: x = scale * bytes, bytes in [-127, 127]; bytes behind n are 0.
//
// Numbers all below 1e-30 become 0: the inverse of their scale would overflow. With NaN or infinity
// among the numbers the scale is NaN, and so is every product with the group.
static inline void quantize(const float *x, int n, int8_t *bytes, float *scale) {
    alignas(64) float group[GROUP] = {};
    std::memcpy(group, x, sizeof(float) * n);
    Floats most = {};
    Ints finite = Ints{} - 1; // a mask
    for (int i = 0; i < GROUP; i += LANES) {
        const Floats v = load(group + i), size = v < Floats{} ? -v : v;
        finite &= size <= all(std::numeric_limits<float>::max());
        most = size > most ? size : most;
    }
    float largest = 0.0f;
    bool all_finite = true;
    for (int lane = 0; lane < LANES; ++lane) {
        largest = std::max(largest, most[lane]);
        all_finite &= finite[lane] != 0;
    }
    if (!all_finite || largest < 1e-30f) {
        *scale = all_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::memset(bytes, 0, GROUP);
        return;
    }
    *scale = largest / 127.0f;
    const Floats inverse = all(127.0f / largest);
    const Floats shift = all(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    for (int i = 0; i < GROUP; i += LANES) {
        const Floats whole = (load(group + i) * inverse + shift) - shift;
        const Bytes narrow = __builtin_convertvector(whole, Bytes);
        std::memcpy(bytes + i, &narrow, sizeof narrow);
    }
}

// Packs one block of a matrix [outputs][inputs].
static void pack_block(const Matrix &m, const float *matrix, int block, void *packed,
                       float *scales) {
    const int padded = m.padded(), groups = m.groups();
    const size_t before = m.weights_before(block);
    for (int lane = 0; lane < BLOCK; ++lane) {
        const int output = block * BLOCK + lane;
        const bool is_real = output < m.outputs;
        const float *row = matrix + static_cast<size_t>(is_real ? output : 0) * m.inputs;
        if (m.kind == FLOAT32) {
            float *to = static_cast<float *>(packed) + before + lane;
            for (int k = 0; k < padded; ++k)
                to[static_cast<size_t>(k) * BLOCK] = is_real ? row[k] : 0.0f;
        } else if (m.kind == BFLOAT16) {
            uint16_t *to = static_cast<uint16_t *>(packed) + before + lane * 2;
            for (int k = 0; k < padded; ++k)
                to[static_cast<size_t>(k / 2) * BLOCK * 2 + k % 2] =
                    is_real && k < m.inputs ? to_bf16(row[k]) : 0;
        } else {
            int8_t *to = static_cast<int8_t *>(packed) + before + lane * 4;
            float *to_scales = scales + static_cast<size_t>(block) * groups * BLOCK + lane;
            for (int group = 0; group < groups; ++group) {
                int8_t bytes[GROUP] = {};
                float scale = 0.0f;
                const int first = group * GROUP, n = std::min(GROUP, m.inputs - first);
                if (is_real) quantize(row + first, n, bytes, &scale);
                to_scales[static_cast<size_t>(group) * BLOCK] = scale;
                for (int k = 0; k < GROUP; ++k) {
                    const size_t four = static_cast<size_t>(first + k) / 4;
                    const int byte = UNSIGNED_WEIGHTS ? bytes[k] ^ 0x80 : bytes[k];
                    to[four * BLOCK * 4 + k % 4] = static_cast<int8_t>(byte);
                }
            }
        }
    }
}
