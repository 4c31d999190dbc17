// Rotary embedding, KV cache and attention of new tokens, each at its own row and slot.
#pragma once

#include <algorithm>

#include "pool.h"
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

// [from, to) of the text, then nodes of the tree.
struct Seen {
    int from, to, first;
    const uint8_t *nodes;
    const int32_t *levels;
};

static inline Seen seen_by(const Places &places, int token, int window) {
    const int row = places.rows[token], slot = places.slots[token];
    Seen seen = {0, slot + 1, 0, nullptr, nullptr};
    if (places.tree_first && places.tree_size) {
        const int node = slot - places.tree_first[row];
        if (node >= 0 && node < places.tree_size) {
            seen.first = seen.to = places.tree_first[row];
            seen.levels = places.tree_levels + static_cast<size_t>(row) * places.tree_size;
            seen.nodes = places.tree_seen +
                         (static_cast<size_t>(row) * places.tree_size + node) * places.tree_size;
        }
    }
    if (window > 0) seen.from = std::max(0, std::min(seen.to, places.positions[token] - window + 1));
    return seen;
}

// Turns a head in place: x cos + roll(x, size / 2) sin.
static inline void rotate(float *x, const float *cosines, const float *sines, int size) {
    const int half = size / 2;
    for (int i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] + high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

static void attend_head(const float *query, const float *keys, const float *values, int size,
                        const Seen &seen, const Places &places, int token, int window,
                        float *scores, int32_t *slots, float *out) {
    int count = 0;
    for (int slot = seen.from; slot < seen.to; ++slot) slots[count++] = slot;
    for (int node = 0; seen.nodes && node < places.tree_size; ++node)
        if (seen.nodes[node] &&
            (window <= 0 || seen.first + seen.levels[node] - 1 > places.positions[token] - window))
            slots[count++] = seen.first + node;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    float most = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < count; ++i) {
        scores[i] = dot(query, keys + static_cast<size_t>(slots[i]) * size, size) * scale;
        if (!(scores[i] <= most)) most = scores[i];
    }
    float total = 0.0f;
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        store(scores + i, exponential(load(scores + i) - all(most)));
    for (; i < count; ++i) scores[i] = exponential(scores[i] - most);
    for (i = 0; i < count; ++i) total += scores[i];
    std::memset(out, 0, sizeof(float) * size);
    for (i = 0; i < count; ++i) {
        const float weight = scores[i];
        const float *value = values + static_cast<size_t>(slots[i]) * size;
        int d = 0;
        for (; d + LANES <= size; d += LANES) store(out + d, load(out + d) + load(value + d) * weight);
        for (; d < size; ++d) out[d] += value[d] * weight;
    }
    const float inverse = 1.0f / total;
    for (int d = 0; d < size; ++d) out[d] *= inverse;
}
