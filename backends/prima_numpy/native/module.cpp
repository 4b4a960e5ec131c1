// The Python module `_kernels`: checks every array once, releases the GIL, calls the engine.
// `_kernels.pyi` has the signatures, `kernels.py` the documented wrapper.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <type_traits>

#include "arrays.h"
#include "cpu.h"
#include "engine.h"
#include "gil.h"

namespace nb = nanobind;
using namespace prima;

namespace {

constexpr int64_t kMaxThreads = 1024;

struct Matrix {
    Product product;  // without `out`
    int64_t cols;
    int type;
};

// A matrix that was checked once, as Python holds it; it keeps its arrays alive.
struct Held {
    Matrix matrix;
    In data;
    nb::object bias;
};

Matrix matrix(const Engine& engine, int type, const In& data, int64_t rows, int64_t cols) {
    const MatrixKernels* info = engine.kernels(type);
    if (info == nullptr) refuse("type " + std::to_string(type) + " is not supported");
    if (rows < 0 || cols <= 0 || rows > kMaxSize || cols > kMaxSize) {
        refuse("a matrix of " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    if (cols % info->block_weights != 0) {
        refuse("cols: " + std::to_string(cols) + " is not a multiple of " + std::to_string(info->block_weights));
    }
    if (data.dtype() != nb::dtype<uint8_t>()) refuse("data: not uint8");
    check_layout(data, "data", 1);
    // Divide rather than multiply: rows * bytes could overflow.
    const size_t row = size_t(cols / info->block_weights) * size_t(info->block_bytes);
    if (data.size() % row != 0 || data.size() / row != size_t(rows)) {
        refuse("data: " + std::to_string(data.size()) + " bytes where " + std::to_string(rows) + " rows of " +
               std::to_string(row) + " are expected");
    }
    const size_t alignment = info->block_weights == 1 ? size_t(info->block_bytes) : 1;
    if (reinterpret_cast<uintptr_t>(data.data()) % alignment != 0) refuse("data: not aligned");
    return {{info, static_cast<const uint8_t*>(data.data()), rows, nullptr, nullptr}, cols, type};
}

template <class T>
T field(nb::handle value, const char* name, const char* kind) {
    T result;
    // Enums convert to integers; arrays must not be converted, for that would copy.
    if (!nb::try_cast(value, result, std::is_integral<T>::value)) refuse(std::string(name) + ": not " + kind);
    return result;
}

void hold(Held* self, const Engine& engine, int type, In data, int64_t rows, int64_t cols, nb::object bias) {
    Matrix m = matrix(engine, type, data, rows, cols);
    if (!bias.is_none()) m.product.bias = input(field<In>(bias, "bias", "an array"), "bias", {rows});
    new (self) Held{m, std::move(data), std::move(bias)};
}

// A matrix as a product of x [n, cols] to `out`, by the engine's own kernels: it may have been checked by another one,
// whose variant wants activations in other forms.
Product product_of(const Engine& engine, const Held& held, const Out& out, int64_t n, int64_t cols) {
    if (held.matrix.cols != cols) {
        refuse("x: " + std::to_string(cols) + " columns where " + std::to_string(held.matrix.cols) + " are expected");
    }
    Product product = held.matrix.product;
    product.kernels = engine.kernels(held.matrix.type);
    product.out = output(out, "out", {n, product.rows});
    return product;
}

Norm norm_of(nb::object gain, float eps, int64_t cols) {
    if (gain.is_none()) return {};
    return {input(field<In>(gain, "gain", "an array"), "gain", {cols}), eps};
}

void matrix_rows(Engine& engine, const Held& held, const In& ids, const Out& out) {
    if (ids.dtype() != nb::dtype<int64_t>()) refuse("ids: not int64");
    check_layout(ids, "ids", 1);
    const int64_t n = int64_t(ids.shape(0)), cols = held.matrix.cols;
    float* result = output(out, "out", {n, cols});
    std::vector<int64_t> checked(static_cast<size_t>(n));  // which nobody changes once the GIL is released
    if (n != 0) std::memcpy(checked.data(), ids.data(), checked.size() * sizeof(int64_t));
    for (const int64_t id : checked) {
        if (id >= 0 && id < held.matrix.product.rows) continue;
        const std::string of = std::to_string(held.matrix.product.rows);
        throw nb::index_error(("ids: " + std::to_string(id) + " of " + of + " rows").c_str());
    }
    GilRelease release;
    engine.rows(held.matrix.type, held.matrix.product.data, cols, checked.data(), n, result);
}

struct Stack {
    Product product;  // of all experts' rows
    int64_t n_experts;
    int64_t cols;
};

Stack expert_stack(const Engine& engine, nb::handle item, int64_t n) {
    if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 6) {
        refuse("stacks: each is (type, data, experts, rows, cols, out)");
    }
    const auto fields = nb::borrow<nb::tuple>(item);
    const int64_t n_experts = field<int64_t>(fields[2], "experts", "an integer");
    const int64_t rows = field<int64_t>(fields[3], "rows", "an integer");
    if (n_experts < 1 || rows < 0 || n_experts > kMaxSize || rows > kMaxSize / n_experts) {
        refuse("a stack of " + std::to_string(n_experts) + " x " + std::to_string(rows) + " rows");
    }
    Matrix m = matrix(engine, field<int>(fields[0], "type", "an integer"), field<In>(fields[1], "data", "an array"),
                      n_experts * rows, field<int64_t>(fields[4], "cols", "an integer"));
    m.product.rows = rows;
    m.product.out = output(field<Out>(fields[5], "out", "a writable array"), "out", {n, rows});
    return {m.product, n_experts, m.cols};
}

// The arguments hold references to every array until the call returns.
void linear(Engine& engine, nb::tuple matrices, const In& x, nb::tuple outs, nb::object gain, float eps) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    if (matrices.size() != outs.size()) refuse("outs: not one for each matrix");
    std::vector<Product> products;
    products.reserve(matrices.size());
    for (size_t i = 0; i < matrices.size(); ++i) {
        const auto* held = field<const Held*>(matrices[i], "matrices", "of matrices");
        if (held == nullptr) refuse("matrices: None among them");
        products.push_back(product_of(engine, *held, field<Out>(outs[i], "out", "a writable array"), n, cols));
    }
    const Norm norm = norm_of(gain, eps, cols);
    GilRelease release;
    engine.linear(products, static_cast<const float*>(x.data()), n, cols, norm);
}

void added_linear(Engine& engine, const Held& matrix, const In& x, const In& added, const Out& out) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    Product product = product_of(engine, matrix, out, n, cols);
    product.added = input(added, "added", {n, product.rows});
    GilRelease release;
    engine.linear({product}, static_cast<const float*>(x.data()), n, cols);
}

void gated_linear(Engine& engine, const Held& gate, const Held& up, bool is_gelu, const In& x, nb::object gain,
                  float eps, const Out& out) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    if (gate.matrix.product.rows != up.matrix.product.rows) refuse("gate and up: not of as many rows");
    const Product gates = product_of(engine, gate, out, n, cols), ups = product_of(engine, up, out, n, cols);
    const Norm norm = norm_of(gain, eps, cols);
    GilRelease release;
    engine.gated_linear(gates, ups, is_gelu, static_cast<const float*>(x.data()), n, cols, norm);
}

// Groups of rows of x [n, cols], each for an expert: starts[i] to starts[i + 1] for experts[i].
std::vector<Group> row_groups(const In& experts, const In& starts, int64_t n, int64_t n_experts) {
    if (experts.dtype() != nb::dtype<int64_t>() || starts.dtype() != nb::dtype<int64_t>()) {
        refuse("experts and starts: not int64");
    }
    check_layout(experts, "experts", 1);
    check_layout(starts, "starts", 1);
    const int64_t n_groups = int64_t(experts.shape(0));
    check_shape(starts, "starts", {n_groups + 1});
    const auto* expert = static_cast<const int64_t*>(experts.data());
    const auto* start = static_cast<const int64_t*>(starts.data());
    if (start[0] != 0 || start[n_groups] != n) refuse("starts: not from 0 to " + std::to_string(n));
    std::vector<Group> groups;
    groups.reserve(size_t(n_groups));
    for (int64_t i = 0; i < n_groups; ++i) {
        if (expert[i] < 0 || expert[i] >= n_experts) {
            refuse("experts: " + std::to_string(expert[i]) + " of " + std::to_string(n_experts));
        }
        if (start[i + 1] < start[i]) refuse("starts: not in order");
        groups.push_back({expert[i], start[i], start[i + 1] - start[i]});
    }
    return groups;
}

// Stacks are (type, data, experts, rows, cols, out).
void linear_experts(Engine& engine, nb::tuple stacks, const In& x, const In& experts, const In& starts) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    std::vector<Product> products;
    products.reserve(stacks.size());
    int64_t n_experts = kMaxSize;
    for (nb::handle item : stacks) {
        const Stack stack = expert_stack(engine, item, n);
        if (stack.cols != cols) {
            refuse("x: " + std::to_string(cols) + " columns where " + std::to_string(stack.cols) + " are expected");
        }
        n_experts = std::min(n_experts, stack.n_experts);
        products.push_back(stack.product);
    }
    const std::vector<Group> groups = row_groups(experts, starts, n, n_experts);
    GilRelease release;
    engine.linear_experts(products, groups, static_cast<const float*>(x.data()), cols);
}

void rms_norm(Engine& engine, const In& x, const In& gain, float eps, const Out& out) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), dim = int64_t(x.shape(1));
    const float* gains = input(gain, "gain", {dim});
    float* result = output(out, "out", {n, dim});
    GilRelease release;
    engine.rms_norm(static_cast<const float*>(x.data()), gains, n, dim, eps, result);
}

struct Rotation {
    float* x;
    const float *cos, *sin;
    int64_t n, n_heads, head_dim, half;
    bool neox;

    void run(Engine& engine) const { engine.rope(x, cos, sin, n, n_heads, head_dim, half, neox); }
};

Rotation rotation(const Out& x, const char* name, const In& cos, const In& sin, bool neox) {
    check_float(x, name, 3);
    check_float(cos, "cos", 2);
    const int64_t n = int64_t(x.shape(0)), head_dim = int64_t(x.shape(2)), half = int64_t(cos.shape(1));
    if (half > head_dim / 2)
        refuse("cos: " + std::to_string(half) + " angles for heads of " + std::to_string(head_dim));
    const float *cosines = input(cos, "cos", {n, half}), *sines = input(sin, "sin", {n, half});
    return {static_cast<float*>(x.data()), cosines, sines, n, int64_t(x.shape(1)), head_dim, half, neox};
}

void rope(Engine& engine, const Out& x, const In& cos, const In& sin, bool neox) {
    const Rotation call = rotation(x, "x", cos, sin, neox);
    GilRelease release;
    call.run(engine);
}

template <void (Engine::*kernel)(const float*, const float*, int64_t, float*)>
void gated(Engine& engine, const In& gate, const In& up, const Out& out) {
    check_float(gate, "gate", 2);
    const int64_t n = int64_t(gate.shape(0)), dim = int64_t(gate.shape(1));
    const float* ups = input(up, "up", {n, dim});
    float* result = output(out, "out", {n, dim});
    GilRelease release;
    (engine.*kernel)(static_cast<const float*>(gate.data()), ups, n * dim, result);
}

void add(Engine& engine, const In& x, const In& y, const Out& out) {
    check_float(x, "x", 2);
    const int64_t n = int64_t(x.shape(0)), dim = int64_t(x.shape(1));
    const float* ys = input(y, "y", {n, dim});
    float* result = output(out, "out", {n, dim});
    GilRelease release;
    engine.add(static_cast<const float*>(x.data()), ys, n * dim, result);
}

// Spans are (k_cache, v_cache, start, n): the next n rows of a call stand at positions start.. of a sequence. The tuple
// holds references to the caches until the call returns.
std::vector<Sequence> sequences(nb::tuple spans, int64_t n_rows, int64_t head_dim) {
    std::vector<Sequence> all;
    all.reserve(spans.size());
    int64_t first = 0;
    for (nb::handle item : spans) {
        if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 4) {
            refuse("spans: each is (k_cache, v_cache, start, n)");
        }
        const auto fields = nb::borrow<nb::tuple>(item);
        const auto k = field<Out>(fields[0], "k_cache", "a writable array");
        const auto v = field<Out>(fields[1], "v_cache", "a writable array");
        const CacheShape shape = cache_shape(k, "k_cache", head_dim), other = cache_shape(v, "v_cache", head_dim);
        if (shape.type != other.type) refuse("k_cache and v_cache: different types");
        if (shape.n_kv_heads != other.n_kv_heads || shape.capacity != other.capacity) {
            refuse("k_cache and v_cache: different shapes");
        }
        const auto start = field<int64_t>(fields[2], "start", "an integer");
        const auto n = field<int64_t>(fields[3], "n", "an integer");
        if (n < 0 || n > n_rows - first) refuse("spans: more rows than " + std::to_string(n_rows));
        check_start(start, n, shape.capacity);
        all.push_back({static_cast<uint8_t*>(k.data()), static_cast<uint8_t*>(v.data()), shape, first, n, start});
        first += n;
    }
    if (first != n_rows) refuse("spans: " + std::to_string(first) + " of " + std::to_string(n_rows) + " rows");
    return all;
}

struct Attention {
    std::vector<Sequence> sequences;
    const float* q;
    int64_t n_heads;
    AttentionRule rule;
    float* out;

    void run(Engine& engine) const { engine.attention(sequences, q, n_heads, rule, out); }
};

template <class Rows>
Attention attention_of(const Rows& q, nb::tuple spans, const AttentionRule& rule, const Out& out) {
    check_float(q, "q", 3);
    const int64_t n = int64_t(q.shape(0)), n_heads = int64_t(q.shape(1)), head_dim = int64_t(q.shape(2));
    const std::vector<Sequence> all = sequences(spans, n, head_dim);
    for (const Sequence& s : all) {
        const int64_t n_kv_heads = s.shape.n_kv_heads;
        if (n_kv_heads == 0 || n_heads == 0 || n_heads % n_kv_heads != 0) {
            refuse("q: " + std::to_string(n_heads) + " heads cannot share " + std::to_string(n_kv_heads) +
                   " K/V heads");
        }
    }
    if (!(rule.softcap >= 0)) refuse("softcap: " + std::to_string(rule.softcap));
    if (rule.window < 0) refuse("window: " + std::to_string(rule.window));
    float* result = output(out, "out", {n, n_heads, head_dim});
    return {all, static_cast<const float*>(q.data()), n_heads, rule, result};
}

void attention(Engine& engine, const In& q, nb::tuple spans, float scale, float softcap, int64_t window,
               const Out& out) {
    const Attention call = attention_of(q, spans, {scale, softcap, window}, out);
    GilRelease release;
    call.run(engine);
}

struct Writing {
    std::vector<Sequence> sequences;
    const float *k, *v;

    void run(Engine& engine) const { engine.kv_write(sequences, k, v); }
};

template <class Rows>
Writing writing(const Rows& k, const In& v, nb::tuple spans) {
    check_float(k, "k", 3);
    const int64_t n = int64_t(k.shape(0)), n_kv_heads = int64_t(k.shape(1)), head_dim = int64_t(k.shape(2));
    const float* values = input(v, "v", {n, n_kv_heads, head_dim});
    const std::vector<Sequence> all = sequences(spans, n, head_dim);
    for (const Sequence& s : all) {
        if (s.shape.n_kv_heads != n_kv_heads) {
            refuse("k: " + std::to_string(n_kv_heads) + " heads for a cache of " + std::to_string(s.shape.n_kv_heads));
        }
    }
    return {all, static_cast<const float*>(k.data()), values};
}

void kv_write(Engine& engine, const In& k, const In& v, nb::tuple spans) {
    const Writing call = writing(k, v, spans);
    GilRelease release;
    call.run(engine);
}

void rotated_attention(Engine& engine, const Out& q, const Out& k, const In& v, const In& cos, const In& sin, bool neox,
                       nb::tuple spans, float scale, float softcap, int64_t window, const Out& out) {
    const Rotation turns[] = {rotation(q, "q", cos, sin, neox), rotation(k, "k", cos, sin, neox)};
    const Writing write = writing(k, v, spans);
    const Attention call = attention_of(q, spans, {scale, softcap, window}, out);
    GilRelease release;
    for (const Rotation& turn : turns) turn.run(engine);
    write.run(engine);
    call.run(engine);
}

uint64_t read_bytes(Engine& engine, const In& data) {
    if (data.dtype() != nb::dtype<uint8_t>()) refuse("data: not uint8");
    check_layout(data, "data", 1);
    const auto* bytes = static_cast<const uint8_t*>(data.data());
    const int64_t n_bytes = int64_t(data.size());
    GilRelease release;
    return engine.read(bytes, n_bytes);
}

bool multiply_registers(Engine& engine, int64_t n_products) {
    if (n_products < 0) refuse("n_products: below 0");
    GilRelease release;
    return engine.multiply(n_products);
}

std::vector<std::string> variants() {
    std::vector<std::string> names;
    for (const Table* table : usable_tables()) names.emplace_back(table->name);
    return names;
}

const Table& table_named(const std::string& name) {
    std::string choices = "auto";
    for (const Table* table : usable_tables()) {
        const bool is_named = name == table->name;
        if ((is_named || name == "auto") && obtain(*table)) return *table;
        if (is_named) throw std::runtime_error("the system does not let this process use CPU variant '" + name + "'");
        choices += std::string(", ") + table->name;
    }
    refuse("variant '" + name + "' is not one of: " + choices);
}

void make_engine(Engine* self, int threads, const std::string& variant) {
    if (threads < 1 || threads > kMaxThreads) refuse("threads: " + std::to_string(threads) + " is not in 1..1024");
    const Table& table = table_named(variant);
    try {
        new (self) Engine(threads, table);
    } catch (const std::system_error& error) {
        refuse("threads: the system does not start " + std::to_string(threads) + ": " + error.what());
    }
}

std::string build_info() {
#if defined(__clang__)
    std::string text = "clang " __clang_version__;
#elif defined(__GNUC__)
    std::string text = "gcc " __VERSION__;
#elif defined(_MSC_VER)
    std::string text = "msvc " + std::to_string(_MSC_VER);
#else
    std::string text = "unknown compiler";
#endif
#if defined(__OPTIMIZE__) || (defined(_MSC_VER) && defined(NDEBUG))
    return text + ", optimised";
#else
    return text + ", not optimised";
#endif
}

}  // namespace

NB_MODULE(_kernels, m) {
    using namespace nb::literals;
    nb::set_leak_warnings(false);  // a thread that is at work when the interpreter ends keeps its engine
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&GilRelease::end));
    m.def("cpu_features", &cpu_features);
    m.def("variants", &variants);
    m.def("build_info", &build_info);
    nb::class_<Engine>(m, "Engine")
        .def("__init__", &make_engine, "threads"_a, "variant"_a)
        .def_prop_ro("threads", &Engine::n_threads)
        .def_prop_ro("variant", &Engine::variant)
        .def("linear", &linear, "matrices"_a, "x"_a, "outs"_a, "gain"_a.none(), "eps"_a)
        .def("added_linear", &added_linear, "matrix"_a, "x"_a, "added"_a, "out"_a)
        .def("gated_linear", &gated_linear, "gate"_a, "up"_a, "is_gelu"_a, "x"_a, "gain"_a.none(), "eps"_a, "out"_a)
        .def("linear_experts", &linear_experts, "stacks"_a, "x"_a, "experts"_a, "starts"_a)
        .def("rows", &matrix_rows, "matrix"_a, "ids"_a, "out"_a)
        .def("rms_norm", &rms_norm, "x"_a, "gain"_a, "eps"_a, "out"_a)
        .def("rope", &rope, "x"_a, "cos"_a, "sin"_a, "neox"_a)
        .def("swiglu", &gated<&Engine::swiglu>, "gate"_a, "up"_a, "out"_a)
        .def("geglu", &gated<&Engine::geglu>, "gate"_a, "up"_a, "out"_a)
        .def("add", &add, "x"_a, "y"_a, "out"_a)
        .def("attention", &attention, "q"_a, "spans"_a, "scale"_a, "softcap"_a, "window"_a, "out"_a)
        .def("rotated_attention", &rotated_attention, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "neox"_a, "spans"_a,
             "scale"_a, "softcap"_a, "window"_a, "out"_a)
        .def("kv_write", &kv_write, "k"_a, "v"_a, "spans"_a)
        .def("read", &read_bytes, "data"_a)
        .def("multiply", &multiply_registers, "n_products"_a);
    nb::class_<Held>(m, "Matrix")
        .def("__init__", &hold, "engine"_a, "type"_a, "data"_a, "rows"_a, "cols"_a, "bias"_a.none());
}
