// Rounding of a float matrix to the codes of a GPTQ linear: the head (ropewalk/gptq/rounding.py says by which rule).
//
// Sixteen rows at a time, run by run of their inputs: the words of neighbouring rows are neighbours in `words`.
#pragma once

#include "load.inl.hpp"
#include "ropewalk/kernels.hpp"

namespace ropewalk {

// The lowest and the highest of some weights and 0. A NaN is both.
struct WeightRange {
  float low, high;
};

template <class V, FloatType kType>
WeightRange weight_range(const void* weight, int64_t first, int64_t count) {
  auto highest = V::zero(), lowest = V::zero(), differences = V::zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto w = load_weight<V, kType>(weight, first + i, count - i < kLanes ? count - i : kLanes);
    highest = V::max(highest, w);
    lowest = V::max(lowest, V::sub(V::zero(), w));
    differences = V::add(differences, V::sub(w, w));
  }
  const float numbers = V::reduce_add(differences);  // 0 unless one is infinite or no number
  if (numbers == 0.0f) return {-V::reduce_max(lowest), V::reduce_max(highest)};
  return {numbers, numbers};
}

// The codes of one run of one row, [kRoundRun<kBits>] bytes.
template <class V, FloatType kType, int kBits>
void round_run(const void* weight, int64_t first, int64_t count, float divisor, float zero, uint8_t* codes) {
  const auto d = V::broadcast(divisor), z = V::broadcast(zero);
  const auto least = V::broadcast(kBits == 8 ? -127.0f : 0.0f), most = V::broadcast(kBits == 8 ? 127.0f : 15.0f);
  for (int64_t i = 0; i < kRoundRun<kBits>; i += kLanes) {
    const int64_t left = count - i < 0 ? 0 : count - i < kLanes ? count - i : kLanes;
    const auto w = load_weight<V, kType>(weight, first + i, left);
    const auto code = V::add(V::round(V::div(w, d)), z);
    V::store_int8(reinterpret_cast<int8_t*>(codes + i), V::min(V::max(code, least), most));
  }
}

// The scales of one run of 16 rows, rounded if they are to be; true if one of them leaves the normal numbers of f16.
template <class V>
bool round_scales(bool half, float* scales) {
  constexpr float kLargest = 65504.0f, kSmallestNormal = 0x1p-14f;
  bool leaves = false;
  for (int64_t r = 0; r < kLanes; ++r) {
    leaves |= scales[r] > kLargest || (scales[r] < kSmallestNormal && scales[r] > 0.0f);
  }
  if (half) {
    uint16_t rounded[kLanes];
    V::store_f16(rounded, V::load(scales));
    V::store(scales, V::load_f16(rounded));
  }
  return leaves;
}

// The words of 16 rows from the bytes of a run of each.
template <class V, int kBits>
void store_words(const uint8_t (*codes)[kRoundRun<kBits>], int64_t num_words, int64_t num_rows, int64_t stride,
                 uint32_t* out) {
  for (int64_t w = 0; w < num_words; ++w, out += stride) {
    for (int64_t r = 0; r < num_rows; ++r) {
      uint32_t quads[32 / kBits / 4];
      __builtin_memcpy(quads, codes[r] + w * (32 / kBits), sizeof quads);
      if constexpr (kBits == 8) {
        out[r] = quads[0] ^ 0x80808080;  // -127 .. 127 to 1 .. 255
      } else {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= (quads[i / 4] >> 8 * (i % 4) & 15u) << 4 * i;
        out[r] = word;
      }
    }
  }
}

template <class V, FloatType kType, int kBits>
bool round_tile(const RoundArgs& a, int64_t row) {
  const int64_t num_rows = a.out_features - row < kLanes ? a.out_features - row : kLanes;
  bool leaves = false;
  for (int64_t first = 0, run = 0; first < a.in_features; first += kRoundRun<kBits>, ++run) {
    const int64_t rest = a.in_features - first;
    const int64_t count = rest < kRoundRun<kBits> ? rest : kRoundRun<kBits>;
    alignas(64) float scales[kLanes] = {};
    float low[kLanes];
    for (int64_t r = 0; r < num_rows; ++r) {
      const WeightRange range = weight_range<V, kType>(a.weight, (row + r) * a.in_features + first, count);
      low[r] = range.low;
      scales[r] = kBits == 4 ? (range.high - range.low) / 15.0f
                             : (range.high >= -range.low ? range.high : -range.low) / 127.0f;
    }
    leaves |= round_scales<V>(a.half_scales, scales);
    uint8_t codes[kLanes][kRoundRun<kBits>];
    for (int64_t r = 0; r < num_rows; ++r) {
      const float divisor = scales[r] > 0.0f ? scales[r] : 1.0f;
      float zero = 0.0f;
      if constexpr (kBits == 4) {
        const float nearest = V::first(V::round(V::broadcast(-low[r] / divisor)));
        zero = nearest > 0.0f ? (nearest < 15.0f ? nearest : 15.0f) : 0.0f;
      }
      round_run<V, kType, kBits>(a.weight, (row + r) * a.in_features + first, count, divisor, zero, codes[r]);
      a.scales[run * a.out_features + row + r] = scales[r];
      a.zeros[run * a.out_features + row + r] = static_cast<uint8_t>(kBits == 8 ? 128.0f : zero);
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(a.words) + first * kBits / 32 * a.out_features + row;
    store_words<V, kBits>(codes, count * kBits / 32, num_rows, a.out_features, words);
  }
  return leaves;
}

template <class V, FloatType kType>
bool round_tile(const RoundArgs& a, int64_t row) {
  return a.bits == 8 ? round_tile<V, kType, 8>(a, row) : round_tile<V, kType, 4>(a, row);
}

template <class V>
bool round_rows(const RoundArgs& a, int64_t tile_begin, int64_t tile_end) noexcept {
  bool leaves = false;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row = tile * kLanes;
    leaves |= a.type == FloatType::f32   ? round_tile<V, FloatType::f32>(a, row)
              : a.type == FloatType::f16 ? round_tile<V, FloatType::f16>(a, row)
                                         : round_tile<V, FloatType::bf16>(a, row);
  }
  return leaves;
}

}  // namespace ropewalk
