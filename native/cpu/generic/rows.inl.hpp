// Row-wise kernels: RMS norm, rotation, sum, embedding.  Written once over the vector verbs of an instruction set `V` (see
// native/README.md, "The verbs").
#pragma once

#include "load.inl.hpp"
#include "ropewalk/kernels.hpp"

namespace ropewalk {

// n = round(x / ln 2) and r = x - n ln 2, |r| <= ln 2 / 2.
template <class V>
void split_by_ln2(typename V::F32 x, typename V::F32& n, typename V::F32& r) {
  n = V::round(V::mul(x, V::broadcast(1.44269504088896341f)));
  r = V::fnma(n, V::broadcast(0.693359375f), x);  // ln 2 in two parts: the product with n is exact
  r = V::fnma(n, V::broadcast(-2.12194440054690583e-4f), r);
}

// (e^r - 1 - r) / r^2 by the Taylor polynomial of e^r of degree 7.
template <class V>
typename V::F32 exp_rest(typename V::F32 r) {
  auto p = V::broadcast(1.0f / 5040.0f);
  p = V::fma(p, r, V::broadcast(1.0f / 720.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 120.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 24.0f));
  p = V::fma(p, r, V::broadcast(1.0f / 6.0f));
  return V::fma(p, r, V::broadcast(0.5f));
}

// exp(x) = 2^n * e^r, e^r by its Taylor polynomial of degree 7 (relative error below 2e-7 after rounding).  Arguments
// below -87 give 0 up to rounding (2^-126), above 88 the largest power.
template <class V>
typename V::F32 exp_f32(typename V::F32 x) {
  x = V::max(V::broadcast(-87.0f), V::min(V::broadcast(88.0f), x));
  typename V::F32 n, r;
  split_by_ln2<V>(x, n, r);
  auto p = V::fma(exp_rest<V>(r), r, V::broadcast(1.0f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::mul_pow2(p, n);
}

// out = x / sqrt(mean(x^2) + epsilon) * weight
template <class V>
void rms_norm_one(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
  const int64_t whole = size / kLanes * kLanes;
  const int64_t tail = size - whole;
  auto squares = V::zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const auto v = V::load(x + i);
    squares = V::fma(v, v, squares);
  }
  if (tail != 0) {
    const auto v = V::load_partial(x + whole, tail);
    squares = V::fma(v, v, squares);
  }
  const float mean = V::reduce_add(squares) / static_cast<float>(size);
  const auto factor = V::broadcast(1.0f / V::sqrt(mean + epsilon));
  for (int64_t i = 0; i < whole; i += kLanes) {
    V::store(out + i, V::mul(V::mul(V::load(x + i), factor), V::load(weight + i)));
  }
  if (tail != 0) {
    const auto v = V::mul(V::mul(V::load_partial(x + whole, tail), factor), V::load_partial(weight + whole, tail));
    V::store_partial(out + whole, v, tail);
  }
}

template <class V>
void rms_norm(const RmsNormArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    for (int64_t h = 0; h < a.num_heads; ++h) {
      rms_norm_one<V>(a.x + t * a.row_stride + h * a.size, a.weight, a.size, a.epsilon,
                      a.out + (t * a.num_heads + h) * a.size);
    }
  }
}

// (x_i, x_{i+R/2}) -> (x_i cos_i - x_{i+R/2} sin_i, x_{i+R/2} cos_i + x_i sin_i); Su et al. 2021, eq. 34, with the
// halves of the head paired as transformers does.
template <class V>
void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i < kLanes ? half - i : kLanes;
    const auto c = V::load_partial(cos + i, count);
    const auto s = V::load_partial(sin + i, count);
    const auto first = V::load_partial(x + i, count);
    const auto second = V::load_partial(x + half + i, count);
    V::store_partial(x + i, V::fnma(second, s, V::mul(first, c)), count);
    V::store_partial(x + half + i, V::fma(first, s, V::mul(second, c)), count);
  }
}

template <class V>
void rotate(const RotateArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    for (int64_t h = 0; h < a.num_heads; ++h) {
      rotate_head<V>(a.x + t * a.row_stride + h * a.head_dim, a.cos + t * a.half, a.sin + t * a.half, a.half);
    }
  }
}

// x += weight * y
template <class V>
void add(const AddArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  const auto weight = V::broadcast(a.weight);
  for (int64_t i = row_begin * a.size; i < row_end * a.size; i += kLanes) {
    const int64_t left = row_end * a.size - i;
    const int64_t count = left < kLanes ? left : kLanes;
    V::store_partial(a.x + i, V::fma(weight, V::load_partial(a.y + i, count), V::load_partial(a.x + i, count)), count);
  }
}

template <class V, FloatType kType>
void embed_row(const EmbedArgs& a, int64_t token_id, float* out) {
  for (int64_t i = 0; i < a.size; i += kLanes) {
    const int64_t count = a.size - i < kLanes ? a.size - i : kLanes;
    V::store_partial(out + i, load_weight<V, kType>(a.table, token_id * a.size + i, count), count);
  }
}

template <class V>
void embed(const EmbedArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    float* out = a.out + t * a.size;
    switch (a.table_type) {
      case FloatType::f32: embed_row<V, FloatType::f32>(a, a.token_ids[t], out); break;
      case FloatType::f16: embed_row<V, FloatType::f16>(a, a.token_ids[t], out); break;
      case FloatType::bf16: embed_row<V, FloatType::bf16>(a, a.token_ids[t], out); break;
    }
  }
}

}  // namespace ropewalk
