// The Hadamard rotation of a head: x <- H x / sqrt(h) for each piece of h elements, h the largest power of two that
// divides D and H Sylvester's matrix.  It spreads a large element over its piece, so that a block of few bits has no
// outlier; it is its own inverse and keeps the products of two heads (Ashkboos et al. 2024, arXiv:2404.00456).
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// float32(1 / sqrt(2^k)) for size = 2^k, exactly rounded.
static inline float inverse_root(int64_t size) {
  float factor = 1.0f;
  for (; size >= 4; size /= 4) factor *= 0.5f;
  return size == 2 ? factor * 0.70710678118654752f : factor;
}

// (a, b) -> (a + b, a - b) at distance 1, 2, 4 and 8 within 16 lanes, as far as the piece goes.
template <class V>
typename V::F32 hadamard_lanes(typename V::F32 v, int64_t size) {
  if (size >= 2) v = V::template butterfly<1>(v);
  if (size >= 4) v = V::template butterfly<2>(v);
  if (size >= 8) v = V::template butterfly<4>(v);
  if (size >= 16) v = V::template butterfly<8>(v);
  return v;
}

// x: [D rounded up to 16] in place.
template <class V>
void hadamard(float* x, int64_t head_dim) {
  const int64_t size = head_dim & -head_dim;
  if (size == 1) return;
  const int64_t padded = round_up(head_dim, kLanes);
  const auto factor = V::broadcast(inverse_root(size));
  for (int64_t i = 0; i < padded; i += kLanes) {
    auto v = hadamard_lanes<V>(V::load(x + i), size);
    if (size <= kLanes) v = V::mul(v, factor);
    V::store(x + i, v);
  }
  for (int64_t stride = kLanes; stride < size; stride *= 2) {
    const bool last = 2 * stride == size;
    for (int64_t first = 0; first < padded; first += 2 * stride) {
      for (int64_t i = first; i < first + stride; i += kLanes) {
        const auto a = V::load(x + i), b = V::load(x + i + stride);
        const auto sum = V::add(a, b), difference = V::sub(a, b);
        V::store(x + i, last ? V::mul(sum, factor) : sum);
        V::store(x + i + stride, last ? V::mul(difference, factor) : difference);
      }
    }
  }
}

}  // namespace ropewalk
