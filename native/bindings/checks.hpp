// Arrays are never converted: wrong dtype, shape, strides or access is an error that names the array.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ropewalk {

// Becomes ropewalk.errors.ShapeError.
struct ShapeFailure : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool condition, const std::string& message) {
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

template <class T>
const T* contiguous(const pybind11::array& array, const char* name, const Shape& shape) {
  check_dtype<T>(array, name);
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
  const int64_t num_heads = array.ndim() == 3 ? array.shape(1) : 1;
  check_shape(array, name, array.ndim() == 3 ? Shape{array.shape(0), num_heads, size} : Shape{array.shape(0), size});
  return {static_cast<const float*>(array.data()), array.shape(0), num_heads, row_stride<float>(array, name)};
}

inline Heads<float> writable_heads(pybind11::array& array, const char* name, int64_t size) {
  check_writeable(array, name);
  const Heads<const float> heads = heads_of(array, name, size);
  return {const_cast<float*>(heads.data), heads.num_rows, heads.num_heads, heads.row_stride};
}

}  // namespace ropewalk
