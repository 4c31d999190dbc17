// The functions that Python calls: packing, products, passes through layers, and logits.
//
// Every function returns a `Status`. Passes of all threads of a process share one pool, one pass at
// a time; each product, norm and attention adds its terms in one fixed order, so that a pass of n
// tokens equals n passes of one token, bit for bit.
#include <cfenv>
#include <pthread.h>

#include "layer.h"

// Layers that run together.
struct Segment {
    int32_t num_layers, hidden_size, num_parts, embedding_kind;
    const Layer *layers;
    const Part *parts;     // before the layers
    const void *embedding; // [vocabulary][hidden_size]; not read where texts have a source
    int64_t vocabulary;
};

struct Readout {
    Matrix head;
    const Part *parts;
    const float *norm;
    float epsilon;
    int32_t num_parts, hidden_size, unused;
};

namespace {

enum Status : int32_t { DONE = 0, NO_MEMORY = 1, BAD_TOKEN = 2, FAILED = 3 };

std::mutex pool_mutex;
Pool *shared_pool = nullptr; // its threads end with the process

// Returns the pool, with this number of threads. A fork has no threads: it begins a new one.
Pool &pool_of(int threads) {
    if (shared_pool && !shared_pool->is_of_this_process()) shared_pool = nullptr;
    if (shared_pool && shared_pool->requested() != threads) {
        delete shared_pool;
        shared_pool = nullptr;
    }
    if (!shared_pool) {
        // a fork waits until no pass runs, so that it does not inherit a locked mutex
        static const int registered = pthread_atfork([] { pool_mutex.lock(); },
                                                     [] { pool_mutex.unlock(); },
                                                     [] { pool_mutex.unlock(); });
        static_cast<void>(registered);
        shared_pool = new Pool(threads);
    }
    return *shared_pool;
}

// The usual rounding, also of denormal numbers, whatever this thread is set to. Threads of a pool
// inherit it when they are made, so that all round alike.
class Rounding {
public:
    Rounding() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~Rounding() { std::fesetenv(&before_); }

private:
    std::fenv_t before_;
};

// Calls body(pool) while no other pass runs; exceptions become a status, since C knows none.
template <class Body> int32_t guarded(int threads, Body &&body) {
    try {
        std::lock_guard<std::mutex> guard(pool_mutex);
        const Rounding rounding;
        return body(pool_of(threads));
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

void load_embedding(const Segment &segment, int64_t token, float *to) {
    const int size = segment.hidden_size;
    const size_t at = static_cast<size_t>(token) * size;
    if (segment.embedding_kind == BFLOAT16) {
        const uint16_t *from = static_cast<const uint16_t *>(segment.embedding) + at;
        for (int i = 0; i < size; ++i) to[i] = from_bf16(from[i]);
    } else {
        const float *from = static_cast<const float *>(segment.embedding) + at;
        std::memcpy(to, from, sizeof(float) * size);
    }
}

int32_t run_segment(Pool &pool, const Segment &segment, const Places &places) {
    const int n = places.count, size = segment.hidden_size;
    const auto at = [&](int t) { return static_cast<size_t>(places.slots[t]) * size; };
    for (int t = 0; t < n; ++t) {
        const int64_t token = places.text(t).tokens[places.slots[t]];
        if (token < 0 || token >= segment.vocabulary) return BAD_TOKEN;
    }
    Sizes sizes = {size, size, 0};
    for (int i = 0; i < segment.num_layers; ++i) sizes.hold(segment.layers[i]);
    for (int i = 0; i < segment.num_parts; ++i) sizes.hold(segment.parts[i]);
    Pass pass(pool, n, size, sizes, &places);
    for (int t = 0; t < n; ++t) {
        const Text &text = places.text(t);
        if (text.source)
            std::memcpy(pass.state(t), text.source + at(t), sizeof(float) * size);
        else
            load_embedding(segment, text.tokens[places.slots[t]], pass.state(t));
    }
    for (int i = 0; i < segment.num_parts; ++i) pass.run(segment.parts[i]);
    for (int i = 0; i < segment.num_layers; ++i) pass.run(segment.layers[i], i);
    for (int t = 0; t < n; ++t)
        std::memcpy(places.text(t).target + at(t), pass.state(t), sizeof(float) * size);
    return DONE;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t native_version() { return 4; }
int32_t native_block() { return BLOCK; }

const char *native_instructions() {
#if VECTOR_BYTES == 64 && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return "AVX512 with VNNI and BF16";
#elif VECTOR_BYTES == 64 && defined(__AVX512VNNI__)
    return "AVX512 with VNNI";
#elif VECTOR_BYTES == 64
    return "AVX512";
#elif VECTOR_BYTES == 32
    return "AVX2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "portable";
#endif
}

uint64_t native_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs) {
    return packed_bytes(kind, outputs, inputs);
}

uint64_t native_num_scales(int32_t kind, int32_t outputs, int32_t inputs) {
    const Matrix m = {kind, outputs, inputs, 0, nullptr, nullptr, nullptr};
    return kind == INT8 ? static_cast<uint64_t>(m.blocks()) * BLOCK * m.groups() : 0;
}

// Packs a matrix [outputs][inputs] of float32.
int32_t native_pack(int32_t threads, int32_t kind, const float *matrix, int32_t outputs,
                    int32_t inputs, void *packed, float *scales) {
    const Matrix m = {kind, outputs, inputs, 0, nullptr, nullptr, nullptr};
    return guarded(threads, [&](Pool &pool) {
        pool.run(m.blocks(), [&](int64_t block, int) {
            pack_block(m, matrix, static_cast<int>(block), packed, scales);
        });
        return DONE;
    });
}

// y = W x + b for the rows x [n][inputs]; y is [n][outputs].
int32_t native_multiply(int32_t threads, const Matrix *matrix, int32_t n, const float *x,
                        float *y) {
    return guarded(threads, [&](Pool &pool) {
        Rows(pool, n, matrix->inputs).multiply(*matrix, x, matrix->inputs, y, matrix->outputs);
        return DONE;
    });
}

// Runs segments one after another, each on its own new tokens of any number of texts.
int32_t native_run(int32_t threads, int32_t count, const Segment *const *segments,
                   const Places *places) {
    return guarded(threads, [&](Pool &pool) {
        for (int32_t i = 0; i < count; ++i)
            if (const int32_t status = run_segment(pool, *segments[i], places[i])) return status;
        return static_cast<int32_t>(DONE);
    });
}

// Writes the logits [n][outputs of the head] of n hidden states, each [hidden_size] and anywhere.
int32_t native_logits(int32_t threads, const Readout *readout, int32_t n,
                      const float *const *states, float *logits) {
    return guarded(threads, [&](Pool &pool) {
        const int size = readout->hidden_size;
        Sizes sizes = {size, size, 0};
        for (int i = 0; i < readout->num_parts; ++i) sizes.hold(readout->parts[i]);
        Pass pass(pool, n, size, sizes, nullptr);
        for (int t = 0; t < n; ++t) std::memcpy(pass.state(t), states[t], sizeof(float) * size);
        for (int i = 0; i < readout->num_parts; ++i) pass.run(readout->parts[i]);
        pass.normalize_states(readout->norm, readout->epsilon);
        pass.rows.multiply(readout->head, pass.normed.get(), size, logits, readout->head.outputs);
        return DONE;
    });
}

} // extern "C"
#pragma GCC visibility pop
