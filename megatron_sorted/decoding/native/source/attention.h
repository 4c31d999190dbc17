// Rotary embedding, KV cache and attention of new tokens, each at its own row and slot.
#pragma once

#include <algorithm>

#include "vectors.h"

// Keys and values of a layer: [rows][groups][capacity][head_size].
struct Cache {
    float *keys, *values;
};

// New tokens, and what each may attend to: slots up to its own, or in a draft tree its ancestors.
struct Places {
    int32_t count, capacity, tree_size, unused;
    const int32_t *rows, *slots, *positions; // [count]
    const float *cosines, *sines;            // [capacity][head_size]; half of the sines are negated
    const int32_t *tree_first;               // [rows]: slot of node 0; null without a tree
    const int32_t *tree_levels;              // [rows][tree_size]
    const uint8_t *tree_seen;                // [rows][tree_size][tree_size]
};

// What a token attends to: slots [from, to) of the text, then nodes of a tree.
struct Seen {
    int from, to, num_nodes;
    const int32_t *nodes; // their slots, increasing

    int count() const { return to - from + num_nodes; }
    size_t slot(int i) const {
        const int text = to - from;
        return static_cast<size_t>(i < text ? from + i : nodes[i - text]);
    }
};

// Returns what a token attends to; `nodes` has place for tree_size slots.
static inline Seen seen_by(const Places &places, int token, int window, int32_t *nodes) {
    const int row = places.rows[token], slot = places.slots[token];
    const int64_t oldest = window > 0 ? int64_t{places.positions[token]} - window + 1 : 0;
    Seen seen = {0, slot + 1, 0, nodes};
    const int node = places.tree_first ? slot - places.tree_first[row] : -1;
    if (node >= 0 && node < places.tree_size) {
        const int first = seen.to = places.tree_first[row];
        const size_t before = static_cast<size_t>(row) * places.tree_size;
        const int32_t *levels = places.tree_levels + before;
        const uint8_t *is_seen = places.tree_seen + (before + node) * places.tree_size;
        for (int i = 0; i < places.tree_size; ++i)
            if (is_seen[i] && int64_t{first} + levels[i] - 1 >= oldest)
                nodes[seen.num_nodes++] = first + i;
    }
    seen.from = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(seen.to, oldest)));
    return seen;
}

// Turns a head in place: x cos + roll(x, size / 2) sin.
static inline void rotate(float *x, const float *cosines, const float *sines, int size) {
    const int half = size / 2;
    for (int i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = multiply_add(low, cosines[i], high * sines[i]);
        x[i + half] = multiply_add(high, cosines[i + half], low * sines[i + half]);
    }
}

// Adds the values, J vectors of each from number `at` on, times their weights.
template <int J>
static inline void add_values(const float *values, int size, int at, const Seen &seen,
                              const float *weights, float scale, float *out) {
    Floats sums[J] = {};
    for (int i = 0, count = seen.count(); i < count; ++i) {
        const float *value = values + seen.slot(i) * size + at;
        for (int j = 0; j < J; ++j)
            sums[j] = multiply_add(load(value + j * LANES), all(weights[i]), sums[j]);
    }
    for (int j = 0; j < J; ++j) store(out + at + j * LANES, sums[j] * scale);
}

// Attention of one head of one token. `scores` has place for seen.count() numbers.
//
// A node of a tree sees the same keys and values in the same order as the same token of a plain
// text, so that its numbers are the same.
static void attend(const float *query, const float *keys, const float *values, int size,
                   const Seen &seen, float *scores, float *out) {
    const int count = seen.count();
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int i = 0; i < count; ++i) {
        scores[i] = dot(query, keys + seen.slot(i) * size, size) * scale;
        most = scores[i] <= most ? most : scores[i];
    }
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        store(scores + i, exponential(load(scores + i) - most));
    for (; i < count; ++i) scores[i] = exponential(scores[i] - most);
    for (i = 0; i < count; ++i) total += scores[i];
    const float inverse = 1.0f / total;
    int at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES)
        add_values<4>(values, size, at, seen, scores, inverse, out);
    for (; at + LANES <= size; at += LANES)
        add_values<1>(values, size, at, seen, scores, inverse, out);
    for (; at < size; ++at) {
        float sum = 0.0f;
        for (i = 0; i < count; ++i)
            sum = multiply_add(values[seen.slot(i) * size + at], scores[i], sum);
        out[at] = sum * inverse;
    }
}
