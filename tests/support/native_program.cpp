// A program that runs the native source on odd sizes in memory that ends where its numbers end, for
// sanitizers to watch: native_program THREADS. With "layout" it prints how structures lie in memory.
#include "pass.cpp"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(condition)                                                                         \
    if (!(condition)) {                                                                          \
        std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition);            \
        std::exit(3);                                                                            \
    }
#define FIELD(type, field)                                                                       \
    std::printf("%s %s %zu %zu\n", #type, #field, offsetof(type, field), sizeof(type::field))

static int threads = 1;

static std::vector<float> numbers(size_t count) {
    static uint32_t state = 1;
    std::vector<float> made(count);
    for (float &number : made) {
        state = static_cast<uint32_t>(state * 1664525ull + 1013904223ull);
        number = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return made;
}

// A packed matrix and its memory.
struct Packed {
    std::vector<uint8_t> weights;
    std::vector<float> scales, bias;
    Matrix matrix;

    Packed(int kind, int outputs, int inputs, bool is_biased = false)
        : weights(native_packed_bytes(kind, outputs, inputs)),
          scales(native_num_scales(kind, outputs, inputs)) {
        if (is_biased) bias = numbers(outputs);
        const std::vector<float> plain = numbers(static_cast<size_t>(outputs) * inputs);
        CHECK(native_pack(threads, kind, plain.data(), outputs, inputs, weights.data(),
                          scales.data()) == DONE);
        matrix = {kind, outputs, inputs, 0, weights.data(), scales.data(),
                  is_biased ? bias.data() : nullptr};
    }
    Packed(const Packed &) = delete;
};

static void run_products(int kind) {
    const int shapes[][2] = {{1, 1}, {70, 172}, {64, 64}, {129, 65}, {3, 2080}};
    for (const auto &shape : shapes)
        for (int n : {0, 1, 2, 3, 5, 6, 7, 17, 24, 100}) {
            const size_t outputs = shape[0], inputs = shape[1];
            const Packed packed(kind, shape[0], shape[1], n % 2);
            const std::vector<float> x = numbers(n * inputs);
            std::vector<float> y(n * outputs), one(outputs);
            CHECK(native_multiply(threads, &packed.matrix, n, x.data(), y.data()) == DONE);
            for (int t = 0; t < n; t += 5) {
                const std::vector<float> row(x.begin() + t * inputs, x.begin() + (t + 1) * inputs);
                CHECK(native_multiply(1, &packed.matrix, 1, row.data(), one.data()) == DONE);
                CHECK(!std::memcmp(one.data(), y.data() + t * outputs, outputs * sizeof(float)));
            }
        }
}

// A layer with its parts and caches for two texts, run on ragged prompts and then on a tree.
struct Case {
    int kind, head_size, window;
    bool has_qk_norm;
    static constexpr int rows = 2, capacity = 37, hidden = 22, heads = 4, groups = 2, wide = 35;
    static constexpr int vocabulary = 11, tree_size = 5;

    void run() const {
        const Packed qkv(kind, (heads + 2 * groups) * head_size, hidden, true);
        const Packed out(kind, hidden, heads * head_size), gate_up(kind, 2 * wide, hidden);
        const Packed down(kind, hidden, wide), small(kind, 3, hidden), back(kind, hidden, 3);
        const Packed head(kind, vocabulary, hidden);
        const auto norm = numbers(hidden), qk_norm = numbers((heads + groups) * head_size);
        const Layer layer = {qkv.matrix, out.matrix, gate_up.matrix, down.matrix,
                             norm.data(), norm.data(), has_qk_norm ? qk_norm.data() : nullptr,
                             1e-5f, 1e-6f, 1e-5f, heads, groups, head_size, window,
                             kind == FLOAT32 ? FLOAT32 : BFLOAT16};
        const Part parts[] = {{small.matrix, back.matrix, nullptr, 0.0f, 0},
                              {gate_up.matrix, down.matrix, norm.data(), 1e-5f, 0}};
        const size_t cached = static_cast<size_t>(rows) * groups * capacity * head_size;
        std::vector<char> keys(cached * (kind == FLOAT32 ? 4 : 2)), values(keys.size());
        std::vector<float> target(rows * capacity * hidden);
        const std::vector<float> source = numbers(target.size());
        const auto cosines = numbers(capacity * head_size), sines = numbers(capacity * head_size);
        const std::vector<float> table = numbers(vocabulary * hidden);
        std::vector<uint16_t> rounded;
        for (float number : table) rounded.push_back(to_bf16(number));
        std::vector<int64_t> tokens(rows * capacity);
        for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i) % vocabulary;
        const size_t second = keys.size() / rows;
        const Cache caches[] = {{keys.data(), values.data()},
                                {keys.data() + second, values.data() + second}};
        Text texts[rows];
        for (int row = 0; row < rows; ++row) // the second has fewer slots than its memory
            texts[row] = {tokens.data() + row * capacity, nullptr,
                          target.data() + row * capacity * hidden, &caches[row],
                          row ? 21 : capacity, 0, 0, 0, nullptr, nullptr};
        Segment segment = {1, hidden, 2, BFLOAT16, &layer, parts, rounded.data(), vocabulary};
        const int firsts[] = {capacity - tree_size, 4};
        std::vector<int32_t> row_of, slots, positions;
        for (int row = 0; row < rows; ++row)
            for (int slot = 0; slot < firsts[row]; ++slot) row_of.push_back(row), slots.push_back(slot);
        Places places = {static_cast<int32_t>(slots.size()), 0, row_of.data(), slots.data(),
                         slots.data(), cosines.data(), sines.data(), texts};
        CHECK(pass(threads, segment, places) == DONE);
        const std::vector<float> whole = target;
        const std::vector<char> whole_keys = keys;
        for (int i = 0; i < places.count; ++i) { // the same one by one
            Places one = places;
            one.count = 1, one.rows += i, one.slots += i, one.positions += i;
            CHECK(pass(1, segment, one) == DONE);
        }
        CHECK(target == whole && keys == whole_keys);
        for (int row = 0; row < rows; ++row)
            texts[row].source = source.data() + row * capacity * hidden;
        segment.num_parts = 0;
        CHECK(pass(threads, segment, places) == DONE);
        for (Text &text : texts) text.source = nullptr;
        segment.embedding = table.data(), segment.embedding_kind = FLOAT32;
        const Segment *both[] = {&segment, &segment};
        const Places twice[] = {places, places};
        CHECK(native_run(threads, 2, both, twice) == DONE);
        run_tree(segment, places, texts, firsts);
        tokens[7] = vocabulary;
        CHECK(pass(threads, segment, places) == BAD_TOKEN);
        places.count = 0;
        CHECK(pass(threads, segment, places) == DONE);

        const Readout readout = {head.matrix, parts, norm.data(), 1e-5f, 2, hidden, 0};
        std::vector<float> logits(slots.size() * vocabulary);
        std::vector<const float *> states;
        for (size_t i = 0; i < slots.size(); ++i)
            states.push_back(texts[row_of[i]].target + slots[i] * hidden);
        CHECK(native_logits(threads, &readout, static_cast<int32_t>(slots.size()), states.data(),
                            logits.data()) == DONE);
        for (float logit : logits) CHECK(std::isfinite(logit));
    }

    static int32_t pass(int on, const Segment &segment, const Places &places) {
        const Segment *one = &segment;
        return native_run(on, 1, &one, &places);
    }

    void run_tree(const Segment &segment, Places places, Text *texts, const int *firsts) const {
        const int parents[rows][tree_size] = {{-1, -1, 0, 2, 2}, {-1, 0, 1, 2, 3}};
        std::vector<int32_t> row_of, slots, positions, levels;
        std::vector<uint8_t> seen(rows * tree_size * tree_size);
        for (int row = 0; row < rows; ++row)
            for (int node = 0; node < tree_size; ++node) {
                int level = 0;
                for (int at = node; at >= 0; at = parents[row][at], ++level)
                    seen[(row * tree_size + node) * tree_size + at] = 1;
                levels.push_back(level), row_of.push_back(row);
                slots.push_back(firsts[row] + node), positions.push_back(firsts[row] + level - 1);
            }
        places.count = static_cast<int32_t>(slots.size());
        places.rows = row_of.data(), places.slots = slots.data();
        places.positions = positions.data();
        for (int row = 0; row < rows; ++row) {
            texts[row].tree_first = firsts[row], texts[row].tree_size = tree_size;
            texts[row].tree_levels = levels.data() + row * tree_size;
            texts[row].tree_seen = seen.data() + row * tree_size * tree_size;
        }
        CHECK(pass(threads, segment, places) == DONE);
        for (Text *text = texts; text < texts + rows; ++text) text->tree_size = 0;
    }
};

// Many short runs of a pool: every piece is done once, before its run returns.
static void run_pool() {
    Pool pool(threads);
    for (int run = 0; run < 20000; ++run) {
        const std::unique_ptr<int[]> done(new int[3]());
        pool.run(3, [&](int64_t piece, int) { done[piece] += run + 1; });
        for (int piece = 0; piece < 3; ++piece) CHECK(done[piece] == run + 1);
    }
}

static void print_layout() {
    FIELD(Matrix, kind), FIELD(Matrix, outputs), FIELD(Matrix, inputs), FIELD(Matrix, unused);
    FIELD(Matrix, weights), FIELD(Matrix, scales), FIELD(Matrix, bias);
    FIELD(Layer, qkv), FIELD(Layer, out), FIELD(Layer, gate_up), FIELD(Layer, down);
    FIELD(Layer, first_norm), FIELD(Layer, second_norm), FIELD(Layer, qk_norm);
    FIELD(Layer, first_epsilon), FIELD(Layer, second_epsilon), FIELD(Layer, qk_epsilon);
    FIELD(Layer, heads), FIELD(Layer, groups), FIELD(Layer, head_size), FIELD(Layer, window);
    FIELD(Layer, cache_kind), FIELD(Part, first), FIELD(Part, second), FIELD(Part, norm);
    FIELD(Part, epsilon), FIELD(Part, unused), FIELD(Cache, keys), FIELD(Cache, values);
    FIELD(Segment, num_layers), FIELD(Segment, hidden_size), FIELD(Segment, num_parts);
    FIELD(Segment, embedding_kind), FIELD(Segment, layers), FIELD(Segment, parts);
    FIELD(Segment, embedding), FIELD(Segment, vocabulary), FIELD(Text, tokens);
    FIELD(Text, source), FIELD(Text, target), FIELD(Text, caches), FIELD(Text, capacity);
    FIELD(Text, tree_first), FIELD(Text, tree_size), FIELD(Text, unused);
    FIELD(Text, tree_levels), FIELD(Text, tree_seen), FIELD(Places, count);
    FIELD(Places, unused), FIELD(Places, rows), FIELD(Places, slots), FIELD(Places, positions);
    FIELD(Places, cosines), FIELD(Places, sines), FIELD(Places, texts), FIELD(Readout, head);
    FIELD(Readout, parts), FIELD(Readout, norm), FIELD(Readout, epsilon);
    FIELD(Readout, num_parts), FIELD(Readout, hidden_size), FIELD(Readout, unused);
    std::printf("Matrix - %zu 0\nLayer - %zu 0\nPart - %zu 0\nCache - %zu 0\n", sizeof(Matrix),
                sizeof(Layer), sizeof(Part), sizeof(Cache));
    std::printf("Segment - %zu 0\nText - %zu 0\nPlaces - %zu 0\nReadout - %zu 0\n",
                sizeof(Segment), sizeof(Text), sizeof(Places), sizeof(Readout));
}

int main(int, char **arguments) {
    if (arguments[1] == std::string("layout")) {
        print_layout();
        return 0;
    }
    threads = std::atoi(arguments[1]);
    run_pool();
    for (int kind : {FLOAT32, BFLOAT16, INT8}) {
        run_products(kind);
        for (int head_size : {4, 20, 80})
            for (int window : {0, 3}) Case{kind, head_size, window, window == 0}.run();
    }
    std::printf("%s: done\n", native_instructions());
}
