// Layer norm (Ba et al. 2016, arXiv:1607.06450): out = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias.
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// Calls visit(first, count) over [0, size) in steps of a register.
template <class Visit>
void for_lanes(int64_t size, Visit visit) {
  for (int64_t i = 0; i < size; i += kLanes) visit(i, size - i < kLanes ? size - i : kLanes);
}

template <class V>
void layer_norm_one(const float* x, const float* weight, const float* bias, int64_t size, float epsilon, float* out) {
  const float inverse = 1.0f / static_cast<float>(size);
  auto sum = V::zero();
  for_lanes(size, [&](int64_t i, int64_t count) { sum = V::add(sum, V::load_partial(x + i, count)); });
  const auto mean = V::broadcast(V::reduce_add(sum) * inverse);
  auto squares = V::zero();
  for_lanes(size, [&](int64_t i, int64_t count) {
    const auto centred = V::select_range(V::sub(V::load_partial(x + i, count), mean), V::zero(), 0, count);
    squares = V::fma(centred, centred, squares);
  });
  const auto factor = V::broadcast(1.0f / V::sqrt(V::reduce_add(squares) * inverse + epsilon));
  for_lanes(size, [&](int64_t i, int64_t count) {
    const auto normed = V::mul(V::sub(V::load_partial(x + i, count), mean), factor);
    const auto scaled = V::mul(normed, V::load_partial(weight + i, count));
    V::store_partial(out + i, bias == nullptr ? scaled : V::add(scaled, V::load_partial(bias + i, count)), count);
  });
}

template <class V>
void layer_norm(const LayerNormArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const float* bias = a.bias == nullptr ? nullptr : a.bias + h * a.bias_stride;
      layer_norm_one<V>(a.x + t * a.row_stride + h * a.size, a.weight + h * a.weight_stride, bias, a.size, a.epsilon,
                        a.out + (t * a.num_heads + h) * a.size);
    }
  }
}

}  // namespace ropewalk
