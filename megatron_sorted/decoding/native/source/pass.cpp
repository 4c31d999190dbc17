// A pass of some tokens through consecutive layers of a LLaMA-like network, and the readouts of exits.
//
// A token's numbers do not depend on the other tokens of a pass: each product, norm and attention
// adds its terms in one fixed order. So a pass of n tokens equals n passes of one token, bit for bit.
#include <memory>
#include <pthread.h>

#include "attention.h"
#include "products.h"

struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *first_norm, *second_norm, *qk_norm; // qk_norm: [heads + groups][head_size], or null
    float first_epsilon, second_epsilon, qk_epsilon;
    int32_t heads, groups, head_size, window; // window: 0 without one
    int32_t unused;
};

// A step on each token by itself: an adapter (down, up) or an MLP with its norm (gate_up, down).
struct Part {
    Matrix first, second;
    const float *norm; // null: an adapter
    float epsilon;
    int32_t unused;
};

struct Segment {
    int32_t num_layers, hidden_size, num_parts, embedding_kind;
    const Layer *layers;
    const Cache *caches;
    const Part *parts;       // before the layers
    const void *embedding;   // [v][hidden_size], or null where source is given
    const int64_t *tokens;   // [rows][capacity]
    const float *source;     // [rows][capacity][hidden_size]
    float *target;           // [rows][capacity][hidden_size]
};

struct Readout {
    Matrix head;
    const Part *parts;
    const float *norm;
    float epsilon;
    int32_t num_parts, hidden_size;
};

namespace {

using Buffer = std::unique_ptr<float[]>;

Buffer floats(size_t count) { return Buffer(new float[count]); }

template <class Body> void each(Pool &pool, int count, bool is_much, Body &&body) {
    if (is_much)
        pool.run(count, [&](int i, int) { body(i); });
    else
        for (int i = 0; i < count; ++i) body(i);
}

void normalize(const float *x, const float *weight, float epsilon, int n, float *y) {
    const float scale = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + epsilon);
    for (int i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// y[i] = silu(both[i]) * both[i + n]
void swiglu(float *both, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats gate = load(both + i);
        store(both + i, gate / (exponential(-gate) + 1.0f) * load(both + n + i));
    }
    for (; i < n; ++i) both[i] = both[i] / (exponential(-both[i]) + 1.0f) * both[n + i];
}

// Rows of inputs in the form that a kind of matrix needs, made once for all outputs.
class Rows {
public:
    Rows(int count, int most_inputs)
        : count_(count), inputs_(count), bytes_(static_cast<size_t>(count) * (most_inputs + GROUP) * 2),
          scales_(static_cast<size_t>(count) * (most_inputs / GROUP + 1)),
          sums_(static_cast<size_t>(count) * (most_inputs / GROUP + 1)), targets_(count) {}

    // y = W x + b, row by row; x and y have these distances between rows.
    void multiply(Pool &pool, const Matrix &m, const float *x, size_t x_stride, float *y, size_t y_stride) {
        const int padded = padded_inputs(m.kind, m.inputs), groups = m.groups();
        each(pool, count_, count_ >= 8, [&](int t) {
            Inputs &in = inputs_[t];
            const float *row = x + t * x_stride;
            in.floats = row;
            if (m.kind == BFLOAT16) {
                uint16_t *halves = reinterpret_cast<uint16_t *>(bytes_.data()) + static_cast<size_t>(t) * padded;
                for (int k = 0; k < padded; ++k) halves[k] = k < m.inputs ? to_bf16(row[k]) : 0;
                in.halves = halves;
            } else if (m.kind == INT8) {
                int8_t *bytes = bytes_.data() + static_cast<size_t>(t) * padded;
                float *scales = scales_.data() + static_cast<size_t>(t) * groups;
                int32_t *sums = sums_.data() + static_cast<size_t>(t) * groups;
                for (int group = 0; group < groups; ++group) {
                    const int first = group * GROUP;
                    quantize(row + first, std::min(GROUP, m.inputs - first), bytes + first, scales + group);
                    int32_t sum = 0;
                    for (int k = 0; k < GROUP; ++k) sum += bytes[first + k];
                    sums[group] = 128 * sum;
                }
                in.bytes = bytes, in.scales = scales, in.sums = sums;
            }
            targets_[t] = y + t * y_stride;
        });
        ::multiply(pool, m, count_, inputs_.data(), targets_.data());
    }

private:
    int count_;
    std::vector<Inputs> inputs_;
    std::vector<int8_t> bytes_;
    std::vector<float> scales_;
    std::vector<int32_t> sums_;
    std::vector<float *> targets_;
};

void add(Pool &pool, int n, float *to, const float *what, int size) {
    each(pool, n, n >= 8, [&](int t) {
        float *x = to + static_cast<size_t>(t) * size;
        const float *y = what + static_cast<size_t>(t) * size;
        for (int i = 0; i < size; ++i) x[i] += y[i];
    });
}

void normalize_all(Pool &pool, int n, const float *x, const float *weight, float epsilon, int size, float *y) {
    each(pool, n, n >= 8, [&](int t) {
        normalize(x + static_cast<size_t>(t) * size, weight, epsilon, size, y + static_cast<size_t>(t) * size);
    });
}

void run_mlp(Pool &pool, Rows &rows, int n, float *hidden, int size, const float *norm, float epsilon,
             const Matrix &gate_up, const Matrix &down, float *normed, float *wide) {
    normalize_all(pool, n, hidden, norm, epsilon, size, normed);
    rows.multiply(pool, gate_up, normed, size, wide, gate_up.outputs);
    each(pool, n, n >= 8, [&](int t) { swiglu(wide + static_cast<size_t>(t) * gate_up.outputs, gate_up.outputs / 2); });
    rows.multiply(pool, down, wide, gate_up.outputs, normed, size);
    add(pool, n, hidden, normed, size);
}

void run_parts(Pool &pool, Rows &rows, int n, float *hidden, int size, const Part *parts, int num_parts,
               float *normed, float *wide) {
    for (const Part *part = parts; part < parts + num_parts; ++part) {
        if (part->norm) {
            run_mlp(pool, rows, n, hidden, size, part->norm, part->epsilon, part->first, part->second, normed, wide);
            continue;
        }
        rows.multiply(pool, part->first, hidden, size, wide, part->first.outputs);
        rows.multiply(pool, part->second, wide, part->first.outputs, normed, size);
        add(pool, n, hidden, normed, size);
    }
}

void run_layer(Pool &pool, Rows &rows, const Layer &layer, const Cache &cache, const Places &places,
               float *hidden, int size, float *normed, float *wide, float *attended) {
    const int n = places.count, heads = layer.heads, groups = layer.groups, d = layer.head_size;
    const int share = heads / groups;
    const size_t stride = layer.qkv.outputs;
    normalize_all(pool, n, hidden, layer.first_norm, layer.first_epsilon, size, normed);
    rows.multiply(pool, layer.qkv, normed, size, wide, stride);
    int longest = 0;
    for (int t = 0; t < n; ++t) longest = std::max(longest, places.slots[t] + 1);
    each(pool, n, n >= 8, [&](int t) {
        float *qkv = wide + t * stride;
        const float *cosines = places.cosines + static_cast<size_t>(places.positions[t]) * d;
        const float *sines = places.sines + static_cast<size_t>(places.positions[t]) * d;
        for (int head = 0; head < heads + groups; ++head) {
            if (layer.qk_norm)
                normalize(qkv + head * d, layer.qk_norm + static_cast<size_t>(head) * d, layer.qk_epsilon, d, qkv + head * d);
            rotate(qkv + head * d, cosines, sines, d);
        }
        for (int group = 0; group < groups; ++group) {
            const size_t at = ((static_cast<size_t>(places.rows[t]) * groups + group) * places.capacity + places.slots[t]) * d;
            std::memcpy(cache.keys + at, qkv + static_cast<size_t>(heads + group) * d, sizeof(float) * d);
            std::memcpy(cache.values + at, qkv + static_cast<size_t>(heads + groups + group) * d, sizeof(float) * d);
        }
    });
    const int span = std::max(longest, places.tree_first ? longest + places.tree_size : longest);
    std::vector<float> scores(static_cast<size_t>(pool.size()) * (span + LANES));
    std::vector<int32_t> slots(static_cast<size_t>(pool.size()) * (span + LANES));
    const auto one = [&](int piece, int thread) {
        const int t = piece / groups, group = piece % groups;
        const Seen seen = seen_by(places, t, layer.window);
        const size_t at = (static_cast<size_t>(places.rows[t]) * groups + group) * places.capacity * d;
        for (int head = group * share; head < (group + 1) * share; ++head)
            attend_head(wide + t * stride + static_cast<size_t>(head) * d, cache.keys + at, cache.values + at, d,
                        seen, places, t, layer.window, scores.data() + static_cast<size_t>(thread) * (span + LANES),
                        slots.data() + static_cast<size_t>(thread) * (span + LANES),
                        attended + (static_cast<size_t>(t) * heads + head) * d);
    };
    if (static_cast<int64_t>(n) * heads * d * longest > 1 << 16)
        pool.run(n * groups, one);
    else
        for (int piece = 0; piece < n * groups; ++piece) one(piece, 0);
    rows.multiply(pool, layer.out, attended, static_cast<size_t>(heads) * d, normed, size);
    add(pool, n, hidden, normed, size);
    run_mlp(pool, rows, n, hidden, size, layer.second_norm, layer.second_epsilon, layer.gate_up, layer.down, normed, wide);
}

void widen(const Matrix &m, int *inputs, int *outputs) {
    *inputs = std::max(*inputs, m.inputs);
    *outputs = std::max(*outputs, m.outputs);
}

// The pool that threads of this process share; one pass runs at a time.
std::mutex pool_mutex;
std::unique_ptr<Pool> shared_pool;

// A fork waits until no pass runs: the new process has no thread that could end one.
const int fork_handlers = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                         [] { pool_mutex.unlock(); });

Pool &pool_of(int threads) {
    if (shared_pool && !shared_pool->is_of_this_process()) shared_pool.release(); // its threads are elsewhere
    if (!shared_pool || shared_pool->size() != threads) shared_pool.reset(new Pool(threads));
    return *shared_pool;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t native_version() { return 1; }
int32_t native_block() { return BLOCK; }

const char *native_instructions() {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return "AVX512 with VNNI and BF16";
#elif defined(__AVX512VNNI__)
    return "AVX512 with VNNI";
#elif defined(__AVX512F__)
    return "AVX512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "portable";
#endif
}

uint64_t native_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs) {
    return packed_bytes(kind, outputs, inputs);
}

uint64_t native_num_scales(int32_t kind, int32_t outputs, int32_t inputs) {
    if (kind != INT8) return 0;
    return static_cast<uint64_t>((outputs + BLOCK - 1) / BLOCK) * BLOCK * ((inputs + GROUP - 1) / GROUP);
}

void native_pack(int32_t threads, int32_t kind, const float *weights, int32_t outputs, int32_t inputs, void *packed, float *scales) {
    std::lock_guard<std::mutex> guard(pool_mutex);
    pool_of(threads).run((outputs + BLOCK - 1) / BLOCK, [&](int block, int) {
        pack_block(kind, weights, outputs, inputs, block, packed, scales);
    });
}

void native_multiply(int32_t threads, const Matrix *matrix, int32_t n, const float *x, float *y) {
    std::lock_guard<std::mutex> guard(pool_mutex);
    Rows rows(n, matrix->inputs);
    rows.multiply(pool_of(threads), *matrix, x, matrix->inputs, y, matrix->outputs);
}

void native_run(int32_t threads, const Segment *segment, const Places *places) {
    std::lock_guard<std::mutex> guard(pool_mutex);
    Pool &pool = pool_of(threads);
    const int n = places->count, size = segment->hidden_size;
    int inputs = size, outputs = size, attention = 0;
    for (int i = 0; i < segment->num_layers; ++i) {
        const Layer &layer = segment->layers[i];
        for (const Matrix *m : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) widen(*m, &inputs, &outputs);
        attention = std::max(attention, layer.heads * layer.head_size);
    }
    for (int i = 0; i < segment->num_parts; ++i) {
        widen(segment->parts[i].first, &inputs, &outputs);
        widen(segment->parts[i].second, &inputs, &outputs);
    }
    Rows rows(n, inputs);
    const size_t count = n;
    Buffer hidden = floats(count * size), normed = floats(count * size), wide = floats(count * outputs),
           attended = floats(count * attention);
    for (int t = 0; t < n; ++t) {
        const size_t place = static_cast<size_t>(places->rows[t]) * places->capacity + places->slots[t];
        float *to = hidden.get() + static_cast<size_t>(t) * size;
        if (segment->source) {
            std::memcpy(to, segment->source + place * size, sizeof(float) * size);
        } else if (segment->embedding_kind == BFLOAT16) {
            const uint16_t *from = static_cast<const uint16_t *>(segment->embedding) + static_cast<size_t>(segment->tokens[place]) * size;
            for (int i = 0; i < size; ++i) to[i] = from_bf16(from[i]);
        } else {
            std::memcpy(to, static_cast<const float *>(segment->embedding) + static_cast<size_t>(segment->tokens[place]) * size, sizeof(float) * size);
        }
    }
    run_parts(pool, rows, n, hidden.get(), size, segment->parts, segment->num_parts, normed.get(), wide.get());
    for (int i = 0; i < segment->num_layers; ++i)
        run_layer(pool, rows, segment->layers[i], segment->caches[i], *places, hidden.get(), size, normed.get(), wide.get(), attended.get());
    for (int t = 0; t < n; ++t) {
        const size_t place = static_cast<size_t>(places->rows[t]) * places->capacity + places->slots[t];
        std::memcpy(segment->target + place * size, hidden.get() + static_cast<size_t>(t) * size, sizeof(float) * size);
    }
}

// Writes the logits [n][outputs of the head] of hidden states [rows][capacity][hidden_size].
void native_logits(int32_t threads, const Readout *readout, const float *states, int32_t capacity, int32_t n,
                   const int32_t *rows_of, const int32_t *slots, float *logits) {
    std::lock_guard<std::mutex> guard(pool_mutex);
    Pool &pool = pool_of(threads);
    const int size = readout->hidden_size;
    int inputs = size, outputs = size;
    for (int i = 0; i < readout->num_parts; ++i) {
        widen(readout->parts[i].first, &inputs, &outputs);
        widen(readout->parts[i].second, &inputs, &outputs);
    }
    Rows rows(n, inputs);
    const size_t count = n;
    Buffer hidden = floats(count * size), normed = floats(count * size), wide = floats(count * outputs);
    for (int t = 0; t < n; ++t)
        std::memcpy(hidden.get() + static_cast<size_t>(t) * size,
                    states + (static_cast<size_t>(rows_of[t]) * capacity + slots[t]) * size, sizeof(float) * size);
    run_parts(pool, rows, n, hidden.get(), size, readout->parts, readout->num_parts, normed.get(), wide.get());
    normalize_all(pool, n, hidden.get(), readout->norm, readout->epsilon, size, normed.get());
    rows.multiply(pool, readout->head, normed.get(), size, logits, readout->head.outputs);
}

} // extern "C"
#pragma GCC visibility pop
