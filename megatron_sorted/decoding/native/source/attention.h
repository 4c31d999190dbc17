// Rotary embedding, KV cache and attention of new tokens, each at its own row and slot.
#pragma once

#include <algorithm>

#include "vectors.h"

// Keys and values of a text in a layer, float32 or bfloat16: [groups][capacity][head_size].
struct Cache {
    void *keys, *values;
};

// The memory of a text in a segment, and the draft tree behind it. Texts of a pass may lie
// anywhere, each with a capacity of its own.
struct Text {
    const int64_t *tokens; // [capacity]
    const float *source;   // [capacity][hidden_size], or null: the embedding of the tokens
    float *target;         // [capacity][hidden_size]
    const Cache *caches;   // of each layer
    int32_t capacity;
    int32_t tree_first;         // slot of node 0
    int32_t tree_size, unused;  // 0 without a tree
    const int32_t *tree_levels; // [tree_size]
    const uint8_t *tree_seen;   // [tree_size][tree_size]
};

// New tokens, and what each may attend to: slots up to its own, or in a draft tree its ancestors.
struct Places {
    int32_t count, unused;
    const int32_t *rows, *slots, *positions; // [count]; rows are numbers of texts
    const float *cosines, *sines; // [position][head_size]; half of the sines are negated
    const Text *texts;

    const Text &text(int token) const { return texts[rows[token]]; }
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

// Returns what a token attends to; `nodes` has place for the nodes of the text's tree.
static inline Seen seen_by(const Places &places, int token, int window, int32_t *nodes) {
    const Text &text = places.text(token);
    const int slot = places.slots[token], node = slot - text.tree_first;
    const int64_t oldest = window > 0 ? int64_t{places.positions[token]} - window + 1 : 0;
    Seen seen = {0, slot + 1, 0, nodes};
    if (node >= 0 && node < text.tree_size) {
        const int first = seen.to = text.tree_first;
        const uint8_t *is_seen = text.tree_seen + static_cast<size_t>(node) * text.tree_size;
        for (int i = 0; i < text.tree_size; ++i)
            if (is_seen[i] && int64_t{first} + text.tree_levels[i] - 1 >= oldest)
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

// Puts a new key or value into the cache.
static inline void keep(const float *from, int size, float *to) {
    std::memcpy(to, from, sizeof(float) * size);
}

static inline void keep(const float *from, int size, uint16_t *to) {
    for (int i = 0; i < size; ++i) to[i] = to_bf16(from[i]);
}

constexpr int MAX_QUERIES = 8; // that read a block of keys together

// A head of a new token: its query, what it attends to, its output, and room for as many scores as
// it attends to and LANES more.
struct Query {
    const float *query;
    Seen seen;
    float *scores, *out;
};

// Slots whose keys or values are read once for all queries of a tile.
constexpr int KEYS = 32;

// Writes the scores of the slots [from, to) of the text; behind them some without a meaning.
template <class T>
static void score(const Query &q, const T *keys, int size, int capacity, float scale, int from,
                  int to) {
    from = std::max(from, q.seen.from), to = std::min(to, q.seen.to);
    int slot = from;
    for (; slot < to && slot + LANES <= capacity; slot += LANES)
        store(q.scores + slot - q.seen.from,
              dots(q.query, keys + static_cast<size_t>(slot) * size, size) * scale);
    for (; slot < to; ++slot)
        q.scores[slot - q.seen.from] =
            dot(q.query, keys + static_cast<size_t>(slot) * size, size) * scale;
}

// Adds values times their weights to the output, J vectors of each from number `at` on; numbers
// [first, last) of what the query attends to.
template <int J, class T>
static inline void add_values(const Query &q, const T *values, int size, int at, int first,
                              int last) {
    Floats sums[J];
    for (int j = 0; j < J; ++j) sums[j] = load(q.out + at + j * LANES);
    for (int i = first; i < last; ++i) {
        const T *value = values + q.seen.slot(i) * size + at;
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
            sums[j] = multiply_add(load(value + j * LANES), all(q.scores[i]), sums[j]);
    }
    for (int j = 0; j < J; ++j) store(q.out + at + j * LANES, sums[j]);
}

template <class T>
static void add_values(const Query &q, const T *values, int size, int first, int last) {
    int at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES)
        add_values<4>(q, values, size, at, first, last);
    for (; at + LANES <= size; at += LANES) add_values<1>(q, values, size, at, first, last);
    for (; at < size; ++at)
        for (int i = first; i < last; ++i)
            q.out[at] = multiply_add(to_float(values[q.seen.slot(i) * size + at]), q.scores[i],
                                     q.out[at]);
}

// Turns scores into weights that are not yet divided by their sum; returns the sum. Behind the last
// there is room for LANES scores, which become 0.
static float exponentiate(float *scores, int count) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    for (int i = count; i < count + LANES; ++i) scores[i] = LOWEST;
    Floats highest = all(LOWEST), total = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats v = load(scores + i);
        highest = v <= highest ? highest : v;
    }
    float most = LOWEST;
    for (int lane = 0; lane < LANES; ++lane)
        most = highest[lane] <= most ? most : highest[lane];
    for (int i = 0; i < count; i += LANES) {
        const Floats v = exponential(load(scores + i) - most);
        total += v;
        store(scores + i, v);
    }
    return sum(total);
}

// Attention of queries of one text on the same group of keys and values.
//
// Keys and values are read in blocks for all queries. Each query sees its own in the order of their
// slots, whatever the other queries are; a node of a tree sees the same as the same token of a
// plain text. So its numbers are the same, bit for bit.
template <class T>
static void attend(const Query *queries, int count, const T *keys, const T *values, int size,
                   int capacity) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    int begin = queries[0].seen.from, end = queries[0].seen.to;
    for (const Query *q = queries; q < queries + count; ++q) {
        begin = std::min(begin, q->seen.from), end = std::max(end, q->seen.to);
        std::memset(q->out, 0, sizeof(float) * size);
    }
    for (int slot = begin; slot < end; slot += KEYS)
        for (const Query *q = queries; q < queries + count; ++q)
            score(*q, keys, size, capacity, scale, slot, slot + KEYS);
    float totals[MAX_QUERIES];
    for (int i = 0; i < count; ++i) {
        const Query &q = queries[i];
        for (int number = q.seen.to - q.seen.from; number < q.seen.count(); ++number)
            q.scores[number] = dot(q.query, keys + q.seen.slot(number) * size, size) * scale;
        totals[i] = exponentiate(q.scores, q.seen.count());
    }
    for (int slot = begin; slot < end; slot += KEYS)
        for (const Query *q = queries; q < queries + count; ++q) {
            const Seen &seen = q->seen;
            add_values(*q, values, size, std::max(slot, seen.from) - seen.from,
                       std::min(slot + KEYS, seen.to) - seen.from);
        }
    for (int i = 0; i < count; ++i) {
        const Query &q = queries[i];
        add_values(q, values, size, q.seen.to - q.seen.from, q.seen.count());
        const float inverse = 1.0f / totals[i];
        for (int j = 0; j < size; ++j) q.out[j] *= inverse;
    }
}
