// Arrays that come from Python: a wrong type, shape or layout is a ValueError that names the argument.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace prima {

using In = nanobind::ndarray<nanobind::ro>;
using Out = nanobind::ndarray<>;

// Of any dimension: products of two cannot overflow unnoticed below.
inline constexpr int64_t kMaxSize = int64_t(1) << 40;

[[noreturn]] inline void refuse(const std::string& message) { throw nanobind::value_error(message.c_str()); }

// What a tuple holds.
template <class T>
T field(nanobind::handle value, const char* name, const char* kind) {
    T result;
    // Enums convert to integers; arrays must not be converted, for that would copy.
    if (!nanobind::try_cast(value, result, std::is_integral<T>::value)) refuse(std::string(name) + ": not " + kind);
    return result;
}

template <class Array>
std::string shape_text(const Array& array) {
    std::string text = "[";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

template <class Array>
bool is_contiguous(const Array& array) {
    int64_t expected = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.stride(i) != expected) return false;
        expected *= int64_t(array.shape(i));
    }
    return true;
}

template <class Array>
void check_layout(const Array& array, const char* name, size_t ndim) {
    if (array.ndim() != ndim) {
        refuse(std::string(name) + ": " + std::to_string(ndim) + " dimensions expected, got " + shape_text(array));
    }
    if (array.size() != 0 && !is_contiguous(array)) refuse(std::string(name) + ": not C-contiguous");
    if (array.device_type() != nanobind::device::cpu::value) refuse(std::string(name) + ": not in host memory");
}

template <class Array>
void check_shape(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    std::string wanted;
    bool is_same = true;
    size_t i = 0;
    for (int64_t size : shape) {
        is_same = is_same && int64_t(array.shape(i++)) == size;
        wanted += (wanted.empty() ? "[" : ", ") + std::to_string(size);
    }
    if (!is_same) refuse(std::string(name) + ": shape " + shape_text(array) + " where " + wanted + "] is expected");
}

template <class Array>
void check_float(const Array& array, const char* name, size_t ndim) {
    if (array.dtype() != nanobind::dtype<float>()) refuse(std::string(name) + ": not float32");
    check_layout(array, name, ndim);
}

inline const float* input(const In& array, const char* name, std::initializer_list<int64_t> shape) {
    check_float(array, name, shape.size());
    check_shape(array, name, shape);
    return static_cast<const float*>(array.data());
}

inline float* output(const Out& array, const char* name, std::initializer_list<int64_t> shape) {
    check_float(array, name, shape.size());
    check_shape(array, name, shape);
    return static_cast<float*>(array.data());
}

template <class Array>
KvType kv_type(const Array& array, const char* name) {
    const nanobind::dlpack::dtype half{uint8_t(nanobind::dlpack::dtype_code::Float), 16, 1};
    if (array.dtype() == half) return KvType::F16;
    if (array.dtype() == nanobind::dtype<float>()) return KvType::F32;
    if (array.dtype() == nanobind::dtype<uint8_t>()) return KvType::Q8_0;
    refuse(std::string(name) + ": neither float16 nor float32 nor uint8 (blocks of Q8_0)");
}

// A cache [n_kv_heads, capacity, values], or of the bytes of their blocks, for heads of head_dim.
template <class Array>
CacheShape cache_shape(const Array& array, const char* name, int64_t head_dim) {
    check_layout(array, name, 3);
    const KvType type = kv_type(array, name);
    int64_t width = head_dim;
    if (type == KvType::Q8_0) {
        if (head_dim % kQ8Block != 0) refuse(std::string(name) + ": heads of " + std::to_string(head_dim));
        width = head_dim / kQ8Block * kQ8Bytes;
    }
    const CacheShape shape{type, int64_t(array.shape(0)), int64_t(array.shape(1)), head_dim,
                           width * int64_t(array.itemsize())};
    check_shape(array, name, {shape.n_kv_heads, shape.capacity, width});
    return shape;
}

inline void check_start(int64_t start, int64_t n, int64_t capacity) {
    if (start < 0 || start > capacity || n > capacity - start) {
        refuse("start: rows at " + std::to_string(start) + " + " + std::to_string(n) + " leave a cache of " +
               std::to_string(capacity));
    }
}

}  // namespace prima
