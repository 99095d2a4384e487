// Arrays are never converted: wrong dtype, shape, strides, access or overlap is an error that names the array.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ropewalk/limits.hpp"

namespace ropewalk {

// Becomes ropewalk.errors.ShapeError.
struct ShapeFailure : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// For messages that are put together use `if (...) throw ShapeFailure(...)`: an argument is made on every call, and may
// overflow on just those that are to be refused.
inline void require(bool condition, const char* message) {
  if (!condition) throw ShapeFailure(message);
}

using Shape = std::vector<int64_t>;

inline Shape shape_of(const pybind11::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

inline std::string describe(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

template <class T>
void check_dtype(const pybind11::array& array, const char* name) {
  const auto expected = pybind11::dtype::of<T>();
  // Byte order is '=' or '|' in an array of this machine's own.
  const char order = array.dtype().byteorder();
  if (array.dtype().kind() != expected.kind() || array.itemsize() != expected.itemsize() ||
      (order != '=' && order != '|')) {
    throw ShapeFailure(std::string(name) + " has dtype " + std::string(pybind11::str(array.dtype())) +
                       "; accepted: " + std::string(pybind11::str(expected)));
  }
  if (reinterpret_cast<uintptr_t>(array.data()) % sizeof(T) != 0) {
    throw ShapeFailure(std::string(name) + " does not start on a multiple of its element size");
  }
}

inline void check_shape(const pybind11::array& array, const char* name, const Shape& shape) {
  if (shape_of(array) != shape) {
    throw ShapeFailure(std::string(name) + " has shape " + describe(shape_of(array)) + "; expected " +
                       describe(shape));
  }
}

inline void check_writeable(const pybind11::array& array, const char* name) {
  if (!array.writeable()) throw ShapeFailure(std::string(name) + " is read-only");
}

// An array in a place where None is accepted too.
inline pybind11::array array_of(const pybind11::object& object, const char* name) {
  if (!pybind11::isinstance<pybind11::array>(object)) {
    throw ShapeFailure(std::string(name) + " is a " + Py_TYPE(object.ptr())->tp_name +
                       "; accepted: a numpy array or None");
  }
  return pybind11::reinterpret_borrow<pybind11::array>(object);
}

// Sizes of an array without elements are bounded by nothing else, and are multiplied.
inline void check_extent(const pybind11::array& array, const char* name) {
  for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.shape(i) <= kMostFeatures) continue;
    throw ShapeFailure(std::string(name) + " has shape " + describe(shape_of(array)) +
                       "; a dimension can have at most " + std::to_string(kMostFeatures));
  }
}

template <class T>
const T* contiguous(const pybind11::array& array, const char* name, const Shape& shape) {
  check_dtype<T>(array, name);
  check_extent(array, name);
  check_shape(array, name, shape);
  if ((array.flags() & pybind11::array::c_style) == 0) {
    throw ShapeFailure(std::string(name) + " must be contiguous (row-major)");
  }
  return static_cast<const T*>(array.data());
}

template <class T>
T* writable_contiguous(pybind11::array& array, const char* name, const Shape& shape) {
  check_writeable(array, name);
  return const_cast<T*>(contiguous<T>(array, name, shape));
}

// The stride of dimension 0 in elements; the other dimensions are contiguous.
template <class T>
int64_t row_stride(const pybind11::array& array, const char* name) {
  int64_t expected = sizeof(T);
  if (array.size() == 0) return 0;  // numpy gives the strides of an empty array no meaning
  for (pybind11::ssize_t i = array.ndim() - 1; i > 0; --i) {
    if (array.shape(i) > 1 && array.strides(i) != expected) {
      throw ShapeFailure(std::string(name) + " must be contiguous in all dimensions but the first");
    }
    expected *= array.shape(i);
  }
  if (array.shape(0) == 1) return expected / static_cast<int64_t>(sizeof(T));
  const int64_t stride = array.strides(0);
  if (stride < expected || stride % static_cast<int64_t>(sizeof(T)) != 0) {
    throw ShapeFailure(std::string(name) + " has overlapping or misaligned rows");
  }
  return stride / static_cast<int64_t>(sizeof(T));
}

template <class T>
struct Rows {
  T* data;
  int64_t num_rows;
  int64_t stride;
};

// [T, size], rows any distance apart.
inline Rows<const float> rows_of(const pybind11::array& array, const char* name, int64_t size) {
  check_dtype<float>(array, name);
  if (array.ndim() != 2) throw ShapeFailure(std::string(name) + " must have two dimensions");
  check_extent(array, name);
  check_shape(array, name, {array.shape(0), size});
  return {static_cast<const float*>(array.data()), array.shape(0), row_stride<float>(array, name)};
}

inline Rows<float> writable_rows(pybind11::array& array, const char* name, int64_t num_rows, int64_t size) {
  check_writeable(array, name);
  const Rows<const float> rows = rows_of(array, name, size);
  check_shape(array, name, {num_rows, size});
  return {const_cast<float*>(rows.data), rows.num_rows, rows.stride};
}

template <class T>
struct Heads {
  T* data;
  int64_t num_rows;
  int64_t num_heads;
  int64_t row_stride;
};

// [T, size] or [T, H, size]: heads follow each other, rows any distance apart.
inline Heads<const float> heads_of(const pybind11::array& array, const char* name, int64_t size) {
  check_dtype<float>(array, name);
  if (array.ndim() != 2 && array.ndim() != 3) {
    throw ShapeFailure(std::string(name) + " must have two or three dimensions");
  }
  check_extent(array, name);
  const int64_t num_heads = array.ndim() == 3 ? array.shape(1) : 1;
  if (num_heads > kMostHeads) {
    throw ShapeFailure(std::string(name) + " has " + std::to_string(num_heads) + " heads; accepted: at most " +
                       std::to_string(kMostHeads));
  }
  check_shape(array, name, array.ndim() == 3 ? Shape{array.shape(0), num_heads, size} : Shape{array.shape(0), size});
  return {static_cast<const float*>(array.data()), array.shape(0), num_heads, row_stride<float>(array, name)};
}

inline Heads<float> writable_heads(pybind11::array& array, const char* name, int64_t size) {
  check_writeable(array, name);
  const Heads<const float> heads = heads_of(array, name, size);
  return {const_cast<float*>(heads.data), heads.num_rows, heads.num_heads, heads.row_stride};
}

// The weight or bias of a layer norm, [size] for all heads or [heads * size] in any number of dimensions, and how far
// apart heads are in it.
inline const float* norm_of(const pybind11::array& array, const char* name, int64_t heads, int64_t size,
                            int64_t& stride) {
  if (array.size() != size && array.size() != heads * size) {
    throw ShapeFailure(std::string(name) + " has shape " + describe(shape_of(array)) + "; expected " +
                       std::to_string(size) + " elements, or as many for each of " + std::to_string(heads) + " heads");
  }
  stride = array.size() == size ? 0 : size;
  return contiguous<float>(array, name, shape_of(array));
}

// The memory of an array whose last dimensions are contiguous: rows of bytes, any distance apart.
struct Extent {
  uintptr_t begin;
  uintptr_t num_rows, row_bytes, stride;

  uintptr_t end() const { return begin + (num_rows - 1) * stride + row_bytes; }
};

inline Extent extent_of(const pybind11::array& array) {
  const auto begin = reinterpret_cast<uintptr_t>(array.data());
  const auto bytes = static_cast<uintptr_t>(array.nbytes());
  if (bytes == 0 || array.ndim() == 0 || array.shape(0) == 1) return {begin, 1, bytes, bytes};
  const auto num_rows = static_cast<uintptr_t>(array.shape(0));
  return {begin, num_rows, bytes / num_rows, static_cast<uintptr_t>(array.strides(0))};
}

// Rows of one distance that lie beside each other (two parts of a fused projection) do not overlap.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.row_bytes == 0 || b.row_bytes == 0 || a.end() <= b.begin || b.end() <= a.begin) return false;
  if (a.num_rows == 1 || b.num_rows == 1 || a.stride != b.stride) return true;
  const Extent& first = a.begin <= b.begin ? a : b;
  const Extent& second = a.begin <= b.begin ? b : a;
  const uintptr_t offset = (second.begin - first.begin) % a.stride;
  return offset < first.row_bytes || offset + second.row_bytes > a.stride;
}

// Kernels read their inputs while they write: `written` is of checked layout and shares no memory with `read`.
inline void check_apart(const pybind11::array& written, const char* written_name, const pybind11::array& read,
                        const char* read_name) {
  if (overlap(extent_of(written), extent_of(read))) {
    throw ShapeFailure(std::string(written_name) + " overlaps " + read_name + " in memory");
  }
}

}  // namespace ropewalk
