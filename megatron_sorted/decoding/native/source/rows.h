// Steps on every token by itself: norms, sums, SwiGLU, and products of a matrix with all rows.
#pragma once

#include "memory.h"
#include "products.h"

// Calls body(t) for every token; in parallel where they are many.
template <class Body> static void each(Pool &pool, int count, Body &&body) {
    if (count >= 8)
        pool.run(count, [&](int64_t t, int) { body(static_cast<int>(t)); });
    else
        for (int t = 0; t < count; ++t) body(t);
}

// RMSNorm; y may be x.
static inline void normalize(const float *x, const float *weight, float epsilon, int n, float *y) {
    const float scale = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + epsilon);
    for (int i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

static inline void normalize_all(Pool &pool, int n, const float *x, const float *weight,
                                 float epsilon, int size, float *y) {
    each(pool, n, [&](int t) {
        const size_t at = static_cast<size_t>(t) * size;
        normalize(x + at, weight, epsilon, size, y + at);
    });
}

static inline void add(Pool &pool, int n, float *to, const float *what, int size) {
    each(pool, n, [&](int t) {
        float *x = to + static_cast<size_t>(t) * size;
        const float *y = what + static_cast<size_t>(t) * size;
        for (int i = 0; i < size; ++i) x[i] += y[i];
    });
}

// both[i] = silu(both[i]) * both[i + n]
static inline void swiglu(float *both, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats gate = load(both + i);
        store(both + i, gate / (exponential(-gate) + 1.0f) * load(both + n + i));
    }
    for (; i < n; ++i) both[i] = both[i] / (exponential(-both[i]) + 1.0f) * both[n + i];
}

// The rows of a pass, brought into the form that a kind of matrix needs once for all outputs.
class Rows {
public:
    Rows(Pool &pool, int count, int most_inputs)
        : pool_(pool), count_(count), inputs_(allocate<Inputs>(count, 1)),
          targets_(allocate<float *>(count, 1)),
          converted_(allocate<float>(count, padded_inputs(INT8, most_inputs))),
          scales_(allocate<float>(count, padded_inputs(INT8, most_inputs) / GROUP)),
          sums_(allocate<int32_t>(count, padded_inputs(INT8, most_inputs) / GROUP)) {}

    // y = W x + b, row by row; x and y have these distances between rows.
    void multiply(const Matrix &m, const float *x, size_t x_stride, float *y, size_t y_stride) {
        each(pool_, count_, [&](int t) {
            inputs_[t] = convert(m, x + t * x_stride, t);
            targets_[t] = y + t * y_stride;
        });
        ::multiply(pool_, m, count_, inputs_.get(), targets_.get());
    }

private:
    Inputs convert(const Matrix &m, const float *row, int t) {
        Inputs in = {row, nullptr, nullptr, nullptr, nullptr};
        const int padded = m.padded(), groups = m.groups();
        const size_t before = static_cast<size_t>(t) * padded;
        if (m.kind == BFLOAT16) {
            float *floats = converted_.get() + before;
            uint16_t *halves = reinterpret_cast<uint16_t *>(converted_.get()) + before;
            for (int k = 0; k < padded; ++k) {
                const uint16_t half = k < m.inputs ? to_bf16(row[k]) : 0;
                if (PAIRS)
                    halves[k] = half;
                else
                    floats[k] = from_bf16(half);
            }
            in.floats = floats, in.halves = halves;
        } else if (m.kind == INT8) {
            int8_t *bytes = reinterpret_cast<int8_t *>(converted_.get()) + before;
            float *scales = scales_.get() + static_cast<size_t>(t) * groups;
            int32_t *sums = sums_.get() + static_cast<size_t>(t) * groups;
            for (int group = 0; group < groups; ++group) {
                const int first = group * GROUP, n = std::min(GROUP, m.inputs - first);
                quantize(row + first, n, bytes + first, scales + group);
                int32_t sum = 0;
                for (int k = 0; k < GROUP; ++k) sum += bytes[first + k];
                sums[group] = 128 * sum;
            }
            in.bytes = bytes, in.scales = scales, in.sums = sums;
        }
        return in;
    }

    Pool &pool_;
    const int count_;
    Buffer<Inputs> inputs_;
    Buffer<float *> targets_;
    Buffer<float> converted_; // or bfloat16, or bytes: no two kinds at once
    Buffer<float> scales_;
    Buffer<int32_t> sums_;
};
