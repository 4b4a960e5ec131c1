// Runs kernels on cases from stdin and writes their results to stdout: tests/prima_numpy/native_driver.py feeds it.
// So the kernels are tested where there is no Python: for other CPUs, under an emulator.
//
//   driver [threads]
//   case:    operation and variant, 24 bytes each; how many numbers, numbers; how many buffers; for each size and bytes
//   answer:  0 and the result, or 1 and a message: size, bytes
// Numbers and sizes are int64 in the order of the CPU; floats among the numbers come as their bits.

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "engine.h"
#include "fenced.h"

namespace {

using namespace prima;

constexpr int64_t kMaxSize = int64_t(1) << 20;  // of a dimension: products of three fit an int64
constexpr int64_t kMaxBytes = int64_t(1) << 30;

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

bool read_bytes(void* data, size_t n) { return n == 0 || std::fread(data, 1, n, stdin) == n; }

int64_t read_number() {
    int64_t number;
    if (!read_bytes(&number, sizeof(number))) throw std::runtime_error("the input ends within a case");
    return number;
}

int64_t read_count(int64_t most) {
    const int64_t count = read_number();
    if (count < 0 || count > most) throw std::runtime_error("a count of " + std::to_string(count));
    return count;
}

void write_answer(int64_t status, const void* data, size_t n) {
    const int64_t head[2] = {status, int64_t(n)};
    std::fwrite(head, sizeof(head), 1, stdout);
    std::fwrite(data, 1, n, stdout);
}

// Its numbers and buffers are asked for in their order; whoever asks says what size a buffer has.
class Case {
public:
    std::string operation, variant;

    // False at the end of the input.
    bool read() {
        char names[2][24];
        if (!read_bytes(names, sizeof(names))) return false;
        operation.assign(names[0], strnlen(names[0], sizeof(names[0])));
        variant.assign(names[1], strnlen(names[1], sizeof(names[1])));
        // Every second case's buffers have the fence before them.
        at_ = at_ == Fenced::At::End ? Fenced::At::Begin : Fenced::At::End;
        numbers_.clear();
        buffers_.clear();
        next_number_ = next_buffer_ = 0;
        for (int64_t i = read_count(16); i > 0; --i) numbers_.push_back(read_number());
        for (int64_t i = read_count(16); i > 0; --i) {
            buffers_.emplace_back(size_t(read_count(kMaxBytes)), at_);
            if (!read_bytes(buffers_.back().data(), buffers_.back().size())) {
                throw std::runtime_error("the input ends within a buffer");
            }
        }
        return true;
    }

    int64_t number() {
        if (next_number_ == numbers_.size()) refuse("too few numbers");
        return numbers_[next_number_++];
    }
    int64_t size() {
        const int64_t n = number();
        if (n < 0 || n > kMaxSize) refuse("a size of " + std::to_string(n));
        return n;
    }
    float real() {
        const int64_t bits = number();
        float value;
        std::memcpy(&value, &bits, sizeof(value));  // the low half: little-endian
        return value;
    }

    bool has_buffer() const { return next_buffer_ < buffers_.size(); }
    template <class T>
    T* buffer(int64_t n) {
        if (!has_buffer()) refuse("too few buffers");
        const Fenced& b = buffers_[next_buffer_++];
        if (b.size() % sizeof(T) != 0 || int64_t(b.size() / sizeof(T)) != n) {
            refuse("buffer " + std::to_string(next_buffer_) + " has " + std::to_string(b.size()) + " bytes where " +
                   std::to_string(n) + " values are expected");
        }
        return reinterpret_cast<T*>(b.data());
    }
    template <class T>
    T* result(int64_t n) {
        if (n > kMaxBytes / int64_t(sizeof(T))) refuse("a result of " + std::to_string(n) + " values");
        result_ = std::make_unique<Fenced>(size_t(n) * sizeof(T), at_);
        return reinterpret_cast<T*>(result_->data());
    }
    const Fenced& finished() {
        if (has_buffer() || next_number_ < numbers_.size()) refuse("more than the operation takes");
        return *result_;
    }

private:
    Fenced::At at_ = Fenced::At::Begin;
    std::vector<int64_t> numbers_;
    std::vector<Fenced> buffers_;
    size_t next_number_ = 0, next_buffer_ = 0;
    std::unique_ptr<Fenced> result_;
};

const MatrixKernels& kernels_of(const Engine& engine, int64_t type, int64_t cols) {
    const MatrixKernels* kernels = engine.kernels(int(type));
    if (kernels == nullptr) refuse("type " + std::to_string(type));
    if (cols == 0 || cols % kernels->block_weights != 0) refuse(std::to_string(cols) + " columns");
    return *kernels;
}

// type, rows, cols, n; weights, x, perhaps a bias
void linear(Engine& engine, Case& c) {
    const int64_t type = c.size(), rows = c.size(), cols = c.size(), n = c.size();
    const MatrixKernels& kernels = kernels_of(engine, type, cols);
    const uint8_t* data = c.buffer<uint8_t>(rows * int64_t(row_bytes(kernels, cols)));
    const float* x = c.buffer<float>(n * cols);
    const float* bias = c.has_buffer() ? c.buffer<float>(rows) : nullptr;
    engine.linear({{&kernels, data, rows, bias, c.result<float>(n * rows)}}, x, n, cols);
}

// type, experts, rows, cols, n, groups; weights, x, for each group its expert, then its number of rows
void linear_experts(Engine& engine, Case& c) {
    const int64_t type = c.size(), n_experts = c.size(), rows = c.size(), cols = c.size(), n = c.size();
    const int64_t n_groups = c.size();
    const MatrixKernels& kernels = kernels_of(engine, type, cols);
    const int64_t bytes = int64_t(row_bytes(kernels, cols));
    if (bytes > kMaxSize) refuse("rows of " + std::to_string(bytes) + " bytes");
    const uint8_t* data = c.buffer<uint8_t>(n_experts * rows * bytes);
    const float* x = c.buffer<float>(n * cols);
    const auto* experts = c.buffer<int64_t>(n_groups);
    const auto* counts = c.buffer<int64_t>(n_groups);
    std::vector<Group> groups;
    int64_t first = 0;
    for (int64_t i = 0; i < n_groups; first += counts[i++]) {
        if (experts[i] < 0 || experts[i] >= n_experts) refuse("expert " + std::to_string(experts[i]));
        if (counts[i] < 0 || counts[i] > n - first) refuse("group " + std::to_string(i));
        groups.push_back({experts[i], first, counts[i]});
    }
    if (first != n) refuse("rows without a group");
    engine.linear_experts({{&kernels, data, rows, nullptr, c.result<float>(n * rows)}}, groups, x, cols);
}

// type, rows, cols, n; weights, ids
void rows(Engine& engine, Case& c) {
    const int64_t type = c.size(), rows = c.size(), cols = c.size(), n = c.size();
    const uint8_t* data = c.buffer<uint8_t>(rows * int64_t(row_bytes(kernels_of(engine, type, cols), cols)));
    const auto* ids = c.buffer<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= rows) refuse("row " + std::to_string(ids[i]));
    }
    engine.rows(int(type), data, cols, ids, n, c.result<float>(n * cols));
}

// n, dim, eps; x, gain
void rms_norm(Engine& engine, Case& c) {
    const int64_t n = c.size(), dim = c.size();
    const float eps = c.real();
    const float* x = c.buffer<float>(n * dim);
    engine.rms_norm(x, c.buffer<float>(dim), n, dim, eps, c.result<float>(n * dim));
}

// n, heads, head_dim, half, neox; x, cos, sin
void rope(Engine& engine, Case& c) {
    const int64_t n = c.size(), n_heads = c.size(), head_dim = c.size(), half = c.size(), neox = c.size();
    if (2 * half > head_dim) refuse("half " + std::to_string(half));
    const float* x = c.buffer<float>(n * n_heads * head_dim);
    const float* cos = c.buffer<float>(n * half);
    const float* sin = c.buffer<float>(n * half);
    float* turned = c.result<float>(n * n_heads * head_dim);
    std::memcpy(turned, x, size_t(n * n_heads * head_dim) * sizeof(float));
    engine.rope(turned, cos, sin, n, n_heads, head_dim, half, neox != 0);
}

// n; x, y
template <void (Engine::*kernel)(const float*, const float*, int64_t, float*)>
void elementwise(Engine& engine, Case& c) {
    const int64_t n = c.size();
    const float* x = c.buffer<float>(n);
    (engine.*kernel)(x, c.buffer<float>(n), n, c.result<float>(n));
}

// type (0 f32, 1 f16, 2 q8_0), K/V heads, capacity, head_dim
CacheShape cache_shape(Case& c) {
    const int64_t type = c.size(), n_kv_heads = c.size(), capacity = c.size(), head_dim = c.size();
    if (type > 2 || n_kv_heads == 0 || head_dim == 0) refuse("a cache");
    if (type == 2 && head_dim % kQ8Block != 0) refuse("heads of " + std::to_string(head_dim));
    const int64_t row_bytes[] = {head_dim * 4, head_dim * 2, head_dim / kQ8Block * kQ8Bytes};
    if (row_bytes[type] > kMaxSize) refuse("heads of " + std::to_string(head_dim));
    return {KvType(type), n_kv_heads, capacity, head_dim, row_bytes[type]};
}

int64_t n_bytes(const CacheShape& shape) { return shape.n_kv_heads * shape.capacity * shape.row_bytes; }

void check_start(int64_t start, int64_t n, const CacheShape& shape) {
    if (start + n > shape.capacity) refuse("rows that leave the cache");
}

// a cache's shape, n, heads, start, window, scale, softcap; q, k, v
void attention(Engine& engine, Case& c) {
    const CacheShape shape = cache_shape(c);
    const int64_t n = c.size(), n_heads = c.size(), start = c.size(), window = c.number();
    AttentionRule rule;
    rule.scale = c.real();
    rule.softcap = c.real();
    rule.window = window;
    check_start(start, n, shape);
    if (n_heads == 0 || n_heads % shape.n_kv_heads != 0 || window < 0) refuse("heads or window");
    const float* q = c.buffer<float>(n * n_heads * shape.head_dim);
    auto* k = const_cast<uint8_t*>(c.buffer<uint8_t>(n_bytes(shape)));  // attention only reads
    auto* v = const_cast<uint8_t*>(c.buffer<uint8_t>(n_bytes(shape)));
    float* out = c.result<float>(n * n_heads * shape.head_dim);
    engine.attention({{k, v, shape, 0, n, start}}, q, n_heads, rule, out);
}

// a cache's shape, n, start; k, the cache before; v is k, in a cache of its own
void kv_write(Engine& engine, Case& c) {
    const CacheShape shape = cache_shape(c);
    const int64_t n = c.size(), start = c.size();
    check_start(start, n, shape);
    const float* k = c.buffer<float>(n * shape.n_kv_heads * shape.head_dim);
    const uint8_t* before = c.buffer<uint8_t>(n_bytes(shape));
    uint8_t* cache = c.result<uint8_t>(n_bytes(shape));
    std::memcpy(cache, before, size_t(n_bytes(shape)));
    std::vector<uint8_t> values(cache, cache + n_bytes(shape));
    engine.kv_write({{cache, values.data(), shape, 0, n, start}}, k, k);
    if (std::memcmp(cache, values.data(), values.size()) != 0) refuse("K and V written differently");
}

// The usable variants, best first, and on a second line the features of the CPU.
void describe(Engine&, Case& c) {
    std::string text;
    for (const Table* table : usable_tables()) text += std::string(table->name) + " ";
    text += "\n";
    for (const auto& feature : cpu_features()) text += feature.second ? feature.first + " " : "";
    std::memcpy(c.result<char>(int64_t(text.size())), text.data(), text.size());
}

const std::map<std::string, void (*)(Engine&, Case&)> kOperations = {
    {"describe", describe},
    {"linear", linear},
    {"linear_experts", linear_experts},
    {"rows", rows},
    {"rms_norm", rms_norm},
    {"rope", rope},
    {"swiglu", elementwise<&Engine::swiglu>},
    {"geglu", elementwise<&Engine::geglu>},
    {"add", elementwise<&Engine::add>},
    {"attention", attention},
    {"kv_write", kv_write},
};

const Table& table_named(const std::string& name) {
    for (const Table* table : usable_tables()) {
        if ((name == "auto" || name == table->name) && obtain(*table)) return *table;
    }
    refuse("variant " + name);
}

// Engines by the name that they were asked for.
class Engines {
public:
    explicit Engines(int n_threads) : n_threads_(n_threads) {}

    Engine& named(const std::string& variant) {
        std::unique_ptr<Engine>& engine = engines_[variant];
        if (engine == nullptr) engine = std::make_unique<Engine>(n_threads_, table_named(variant));
        return *engine;
    }

private:
    const int n_threads_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;
};

void answer(Engines& engines, Case& c) {
    try {
        const auto operation = kOperations.find(c.operation);
        if (operation == kOperations.end()) refuse("operation " + c.operation);
        operation->second(engines.named(c.variant), c);
        const Fenced& result = c.finished();
        write_answer(0, result.data(), result.size());
    } catch (const std::invalid_argument& error) {
        write_answer(1, error.what(), std::strlen(error.what()));
    }
}

}  // namespace

int main(int argc, char** argv) try {
    const int n_threads = argc > 1 ? std::stoi(argv[1]) : 1;
    if (n_threads < 1 || n_threads > 64) throw std::runtime_error("threads");
    Engines engines(n_threads);
    for (Case c; c.read();) answer(engines, c);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
