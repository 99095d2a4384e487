// Activations of a GPTQ linear as integers: blocks of 32 in the order of the weights, each with a scale of its own.
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// 32 activations, and what is known of all of them.
template <class V>
struct ActivationBlock {
  typename V::F32 half[2];
  float largest;  // magnitude
  float poison;   // 0, or NaN if one of them is NaN or infinite: a maximum may lose a NaN, differences do not

  ActivationBlock(typename V::F32 low, typename V::F32 high)
      : half{low, high},
        largest(V::reduce_max(V::max(V::abs(low), V::abs(high)))),
        poison(V::reduce_add(V::add(V::sub(low, low), V::sub(high, high)))) {}
};

// A block whose largest magnitude is below this reads as zero: 127 / largest must not overflow.
static constexpr float kSmallestBlock = 1.0e-36f;

// One digit: rint(x * 127 / max|x|).  Returns the scale: max|x| / 127.
template <class V>
float to_digits(const ActivationBlock<V>& x, int8_t (&digits)[kInt8Digits][kBlockRows]) {
  const bool quantisable = x.largest > kSmallestBlock;
  const auto inverse = V::broadcast(quantisable ? 127.0f / x.largest : 0.0f);
  for (int64_t i = 0; i < 2; ++i) V::store_int8(digits[0] + i * kLanes, V::mul(x.half[i], inverse));
  return (quantisable ? x.largest / 127.0f : 0.0f) + x.poison;
}

// The power of two s, at least the smallest normal float, for which largest / s is at most 2^23 / 1.005, so that three
// digits hold it, and above half of that if s may be that small.
static float three_digit_scale(float largest, float* inverse) {
  const float margin = largest * 1.005f;
  uint32_t bits;
  __builtin_memcpy(&bits, &margin, 4);
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 22;
  const uint32_t biased = exponent < 1 ? 1 : static_cast<uint32_t>(exponent);
  const uint32_t words[] = {biased << 23, (254 - biased) << 23};
  float scale;
  __builtin_memcpy(&scale, &words[0], 4);
  __builtin_memcpy(inverse, &words[1], 4);
  return scale;
}

// Three digits of rint(x / s), each from -128 to 127.  Returns the scale s.  After the first line all steps are exact, and
// what is rounded never ends in one half.
template <class V>
float to_digits(const ActivationBlock<V>& x, int8_t (&digits)[kExactDigits][kBlockRows]) {
  float inverse;
  const float scale = three_digit_scale(x.largest, &inverse);
  for (int64_t i = 0; i < 2; ++i) {
    const auto whole = V::round(V::mul(x.half[i], V::broadcast(inverse)));
    const auto high = V::round(V::mul(V::add(whole, V::broadcast(128.5f)), V::broadcast(0x1p-16f)));
    const auto rest = V::fnma(high, V::broadcast(65536.0f), whole);  // from -128 * 257 to 127 * 257
    const auto middle = V::round(V::mul(V::add(rest, V::broadcast(0.5f)), V::broadcast(0x1p-8f)));
    V::store_int8(digits[0] + i * kLanes, high);
    V::store_int8(digits[1] + i * kLanes, middle);
    V::store_int8(digits[2] + i * kLanes, V::fnma(middle, V::broadcast(256.0f), rest));
  }
  return scale + x.poison;
}

static int32_t sum_of(const int8_t (&digits)[kBlockRows]) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlockRows; ++i) sum += digits[i];
  return sum;
}

// In sorted order; padding rows read as zero.
template <class V>
ActivationBlock<V> load_block(const GptqWeights& w, const float* row, int64_t block) {
  const int64_t low = block * kBlockRows, high = low + kLanes;
  if (w.source_row == nullptr) return {V::load(row + low), V::load(row + high)};
  return {V::gather_or_zero(row, w.source_row + low), V::gather_or_zero(row, w.source_row + high)};
}

// Returns the sum of the block's values.
template <class V, int kDigits>
float prepare_block(const PrepareArgs& a, int64_t t, int64_t b) {
  const GptqWeights& w = *a.weights;
  const int64_t index = t * w.num_blocks + b;
  auto& digits = *reinterpret_cast<int8_t(*)[kDigits][kBlockRows]>(a.out.digits + index * kDigits * kBlockRows);
  const float scale = to_digits(load_block<V>(w, a.x + t * a.x_stride, b), digits);
  a.out.scales[index] = scale;
  int32_t whole = 0;
  for (int64_t d = 0; d < kDigits; ++d) {
    const int32_t sum = sum_of(digits[d]);
    a.out.starts[index * kDigits + d] = -w.middle * sum;
    whole = 256 * whole + sum;
  }
  return scale * static_cast<float>(whole);
}

template <class V, int kDigits>
void prepare_rows(const PrepareArgs& a, int64_t row_begin, int64_t row_end) {
  const GptqWeights& w = *a.weights;
  for (int64_t t = row_begin; t < row_end; ++t) {
    for (int64_t g = 0; g < w.num_groups; ++g) {
      float sum = 0.0f;
      for (int64_t b = w.group_starts[g]; b < w.group_starts[g + 1]; ++b) sum += prepare_block<V, kDigits>(a, t, b);
      a.out.group_sums[t * w.num_groups + g] = sum;
    }
  }
}

template <class V>
void prepare(const PrepareArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  if (a.num_digits == kInt8Digits) return prepare_rows<V, kInt8Digits>(a, row_begin, row_end);
  prepare_rows<V, kExactDigits>(a, row_begin, row_end);
}

}  // namespace ropewalk
