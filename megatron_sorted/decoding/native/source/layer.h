// A decoder layer of the LLaMA family, and the parts that an exit may have before its norm.
#pragma once

#include "attention.h"
#include "rows.h"

struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *first_norm, *second_norm;
    const float *qk_norm; // [heads + groups][head_size], or null
    float first_epsilon, second_epsilon, qk_epsilon;
    int32_t heads, groups, head_size;
    int32_t window;     // 0 without one
    int32_t cache_kind; // FLOAT32 or BFLOAT16
};

// A step on each token by itself: an adapter (down, up) or an MLP with its norm (gate_up, down).
struct Part {
    Matrix first, second;
    const float *norm; // null: an adapter
    float epsilon;
    int32_t unused;
};

// The largest sizes of what runs in a pass.
struct Sizes {
    int inputs, outputs, attended;

    void hold(const Matrix &m) {
        inputs = std::max(inputs, m.inputs);
        outputs = std::max(outputs, m.outputs);
    }
    void hold(const Part &part) {
        hold(part.first);
        hold(part.second);
    }
    void hold(const Layer &layer) {
        for (const Matrix *m : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) hold(*m);
        attended = std::max(attended, layer.heads * layer.head_size);
    }
};

// A pass of n tokens: their hidden states, and memory for what is computed on the way. All memory
// is allocated here, before the threads begin: where there is too little, nothing has changed.
class Pass {
public:
    Pass(Pool &pool, int n, int hidden_size, const Sizes &sizes, const Places *places)
        : hidden(allocate<float>(n, hidden_size)), normed(allocate<float>(n, hidden_size)),
          rows(pool, n, sizes.inputs), pool_(pool), n_(n), size_(hidden_size),
          nodes_each_(places ? largest_tree(*places) : 0),
          span_(places ? longest_span(*places) + nodes_each_ : 0), places_(places),
          wide_(allocate<float>(n, sizes.outputs)), attended_(allocate<float>(n, sizes.attended)),
          scores_(allocate<float>(static_cast<size_t>(pool.size()) * MAX_QUERIES, span_)),
          nodes_(allocate<int32_t>(static_cast<size_t>(pool.size()) * MAX_QUERIES,
                                   nodes_each_)) {}

    float *state(int t) { return hidden.get() + static_cast<size_t>(t) * size_; }

    void run(const Part &part) {
        if (part.norm) {
            run_mlp(part.norm, part.epsilon, part.first, part.second);
            return;
        }
        rows.multiply(part.first, hidden.get(), size_, wide_.get(), part.first.outputs);
        rows.multiply(part.second, wide_.get(), part.first.outputs, normed.get(), size_);
        add(pool_, n_, hidden.get(), normed.get(), size_);
    }

    // Runs a layer, number `index` of those whose caches the texts have.
    void run(const Layer &layer, int index) {
        const size_t width = layer.qkv.outputs;
        const size_t attended_width = static_cast<size_t>(layer.heads) * layer.head_size;
        normalize_states(layer.first_norm, layer.first_epsilon);
        rows.multiply(layer.qkv, normed.get(), size_, wide_.get(), width);
        each(pool_, n_, [&](int t) {
            write_cache(layer, places_->text(t).caches[index], t, wide_.get() + t * width);
        });
        attend_all(layer, index);
        rows.multiply(layer.out, attended_.get(), attended_width, normed.get(), size_);
        add(pool_, n_, hidden.get(), normed.get(), size_);
        run_mlp(layer.second_norm, layer.second_epsilon, layer.gate_up, layer.down);
    }

    void normalize_states(const float *weight, float epsilon) {
        normalize_all(pool_, n_, hidden.get(), weight, epsilon, size_, normed.get());
    }

    Buffer<float> hidden, normed; // [n][hidden_size]
    Rows rows;

private:
    // No token attends to more slots than those up to its own and the tree's.
    static size_t longest_span(const Places &places) {
        size_t longest = 0;
        for (int t = 0; t < places.count; ++t)
            longest = std::max(longest, static_cast<size_t>(places.slots[t]) + 1);
        return longest + LANES;
    }

    static size_t largest_tree(const Places &places) {
        size_t largest = 0;
        for (int t = 0; t < places.count; ++t)
            largest = std::max(largest, static_cast<size_t>(places.text(t).tree_size));
        return largest;
    }

    void run_mlp(const float *norm, float epsilon, const Matrix &gate_up, const Matrix &down) {
        const size_t width = gate_up.outputs;
        normalize_states(norm, epsilon);
        rows.multiply(gate_up, normed.get(), size_, wide_.get(), width);
        each(pool_, n_, [&](int t) { swiglu(wide_.get() + t * width, gate_up.outputs / 2); });
        rows.multiply(down, wide_.get(), width, normed.get(), size_);
        add(pool_, n_, hidden.get(), normed.get(), size_);
    }

    // Where a group's slots begin in the cache of a token's text.
    size_t cache_start(const Layer &layer, int t, int group) const {
        return static_cast<size_t>(group) * places_->text(t).capacity * layer.head_size;
    }

    // Norm and rotation of a token's queries and keys; keys and values go to the cache.
    void write_cache(const Layer &layer, const Cache &cache, int t, float *qkv) {
        const int size = layer.head_size, turned = layer.heads + layer.groups;
        const size_t position = static_cast<size_t>(places_->positions[t]) * size;
        for (int head = 0; head < turned; ++head) {
            const size_t at = static_cast<size_t>(head) * size;
            if (layer.qk_norm)
                normalize(qkv + at, layer.qk_norm + at, layer.qk_epsilon, size, qkv + at);
            rotate(qkv + at, places_->cosines + position, places_->sines + position, size);
        }
        for (int group = 0; group < layer.groups; ++group) {
            const size_t to = cache_start(layer, t, group) +
                              static_cast<size_t>(places_->slots[t]) * size;
            const float *key = qkv + static_cast<size_t>(layer.heads + group) * size;
            const float *value = key + static_cast<size_t>(layer.groups) * size;
            with_numbers(layer, cache, [&](auto *keys, auto *values) {
                keep(key, size, keys + to);
                keep(value, size, values + to);
            });
        }
    }

    // Calls body(keys, values) with the numbers of a cache in their type.
    template <class Body>
    static void with_numbers(const Layer &layer, const Cache &cache, Body &&body) {
        if (layer.cache_kind == BFLOAT16)
            body(static_cast<uint16_t *>(cache.keys), static_cast<uint16_t *>(cache.values));
        else
            body(static_cast<float *>(cache.keys), static_cast<float *>(cache.values));
    }

    // Attention of all tokens: a piece of work is a group of keys and values, and a few tokens that
    // follow each other in one text.
    void attend_all(const Layer &layer, int index) {
        const int most = std::max(1, MAX_QUERIES * layer.groups / layer.heads);
        const auto end_of = [&](int t) {
            int end = t + 1;
            while (end < n_ && end < t + most && places_->rows[end] == places_->rows[t]) ++end;
            return end;
        };
        tiles_.clear();
        for (int t = 0; t < n_; t = end_of(t)) tiles_.push_back({t, end_of(t)});
        const auto attend_piece = [&](int64_t piece, int thread) {
            const auto [first, end] = tiles_[piece / layer.groups];
            const Cache &cache = places_->text(first).caches[index];
            attend_tile(layer, cache, first, end, static_cast<int>(piece % layer.groups), thread);
        };
        const int64_t pieces = static_cast<int64_t>(tiles_.size()) * layer.groups;
        const double work = static_cast<double>(n_) * layer.heads * layer.head_size;
        if (work * static_cast<double>(span_) > 65536.0)
            pool_.run(pieces, attend_piece);
        else
            for (int64_t piece = 0; piece < pieces; ++piece) attend_piece(piece, 0);
    }

    // Attention of the heads of tokens [first, end) of one text that share a group.
    void attend_tile(const Layer &layer, const Cache &cache, int first, int end, int group,
                     int thread) {
        const int size = layer.head_size, share = layer.heads / layer.groups;
        const size_t width = layer.qkv.outputs, out_width = static_cast<size_t>(layer.heads) * size;
        const size_t start = cache_start(layer, first, group);
        Query queries[MAX_QUERIES];
        int count = 0;
        const auto attend_queries = [&] {
            with_numbers(layer, cache, [&](auto *keys, auto *values) {
                attend(queries, count, keys + start, values + start, size,
                       places_->text(first).capacity);
            });
            count = 0;
        };
        for (int t = first; t < end; ++t)
            for (int head = group * share; head < (group + 1) * share; ++head) {
                const size_t room = static_cast<size_t>(thread) * MAX_QUERIES + count;
                const size_t at = static_cast<size_t>(head) * size;
                int32_t *nodes = nodes_.get() + room * nodes_each_;
                queries[count++] = {wide_.get() + t * width + at,
                                    seen_by(*places_, t, layer.window, nodes),
                                    scores_.get() + room * span_,
                                    attended_.get() + t * out_width + at};
                if (count == MAX_QUERIES) attend_queries();
            }
        if (count) attend_queries();
    }

    Pool &pool_;
    const int n_, size_;
    const size_t nodes_each_, span_; // the largest tree, and the most slots that a token attends to
    const Places *places_;           // null where no layer runs
    Buffer<float> wide_, attended_, scores_;
    Buffer<int32_t> nodes_;
    std::vector<std::pair<int, int>> tiles_; // of tokens
};
