// Linear layers: GPTQ in two compute modes, and dense.
//
// Bit reproducibility: one output element is always reduced in the same order, whichever rows are computed with it.
// GPTQ kernels keep one output feature per lane and walk the blocks in order; the dense kernel walks K in steps of 16
// with one accumulator and adds its lanes in a fixed tree.
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

template <class V>
typename V::F32 load_scales(const GptqWeights& w, int64_t index) {
  if (w.scale_type == FloatType::f16) return V::load_f16(static_cast<const uint16_t*>(w.scales) + index * kLanes);
  return V::load(static_cast<const float*>(w.scales) + index * kLanes);
}

template <class V>
typename V::F32 load_zeros(const GptqWeights& w, int64_t index) {
  return w.zeros != nullptr ? V::load_u8(w.zeros + index * kLanes) : V::broadcast(w.constant_zero);
}

template <class V>
typename V::F32 load_bias(const GptqWeights& w, int64_t tile) {
  return w.bias != nullptr ? V::load(w.bias + tile * kLanes) : V::zero();
}

template <class V>
void store_tile(const GptqLinearArgs& a, int64_t row, int64_t tile, typename V::F32 y) {
  float* out = a.out + row * a.out_stride + tile * kLanes;
  const int64_t count = a.weights->out_features - tile * kLanes;
  if (count >= kLanes) {
    V::store(out, y);
  } else {
    V::store_partial(out, y, count);
  }
}

// Calls visit(row, std::integral_constant-like row count) over [begin, end) in blocks of kMost, then halves of it.
template <int kMost, class Visit>
void for_row_blocks(int64_t begin, int64_t end, Visit visit) {
  for (; end - begin >= kMost; begin += kMost) visit.template operator()<kMost>(begin);
  if constexpr (kMost > 1) {
    if (begin < end) for_row_blocks<kMost / 2>(begin, end, visit);
  }
}

// y[n] = bias[n] + sum over groups g of scale[g, n] * (sum over blocks b of g of x_scale[b] * dot(codes, x8)
//                                                      - zero[g, n] * group_sum[g])
template <class V, int kBits, int kRows>
void gptq_int8_rows(const GptqLinearArgs& a, int64_t row, int64_t tile) {
  using Dot = typename V::template Dot<kBits>;
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const GptqWeights& w = *a.weights;
  const uint8_t* codes = w.codes + tile * w.num_blocks * kBlockBytes;
  const int8_t* x = a.values + row * w.num_blocks * kBlockRows;
  const float* x_scales = a.block_scales + row * w.num_blocks;
  const float* sums = a.group_sums + row * w.num_groups;
  typename V::F32 y[kRows];
  for (int m = 0; m < kRows; ++m) y[m] = load_bias<V>(w, tile);
  for (int64_t g = 0; g < w.num_groups; ++g) {
    typename V::F32 total[kRows];
    for (int m = 0; m < kRows; ++m) total[m] = V::zero();
    for (int64_t b = w.group_starts[g]; b < w.group_starts[g + 1]; ++b) {
      typename Dot::Sum sum[kRows];
      for (int m = 0; m < kRows; ++m) sum[m] = Dot::zero();
      const uint8_t* block = codes + b * kBlockBytes;
      V::prefetch(block + 2048);
      const int8_t* x_block = x + b * kBlockRows;
      for (int quad = 0; quad < 4; ++quad) {
        const auto first = Dot::first_half(block, quad);
        const auto second = Dot::second_half(block, quad);
        for (int m = 0; m < kRows; ++m) {
          const int8_t* values = x_block + m * w.num_blocks * kBlockRows + quad * 4;
          sum[m] = Dot::add(sum[m], first, values);
          sum[m] = Dot::add(sum[m], second, values + 16);
        }
      }
      for (int m = 0; m < kRows; ++m) {
        total[m] = V::fma(Dot::to_f32(sum[m]), V::broadcast(x_scales[m * w.num_blocks + b]), total[m]);
      }
    }
    const auto scale = load_scales<V>(w, tile * w.num_groups + g);
    const auto zero = load_zeros<V>(w, tile * w.num_groups + g);
    for (int m = 0; m < kRows; ++m) {
      const auto centred = V::fnma(zero, V::broadcast(sums[m * w.num_groups + g]), total[m]);
      y[m] = V::fma(scale, centred, y[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) store_tile<V>(a, row + m, tile, y[m]);
}

template <class V, int kBits>
void gptq_int8_bits(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                    int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for_row_blocks<V::kInt8Rows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      gptq_int8_rows<V, kBits, kRows>(a, row, tile);
    });
  }
}

template <class V>
void gptq_int8(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
               int64_t tile_end) noexcept {
  if (a.weights->code_bits == 4) {
    gptq_int8_bits<V, 4>(a, row_begin, row_end, tile_begin, tile_end);
  } else {
    gptq_int8_bits<V, 8>(a, row_begin, row_end, tile_begin, tile_end);
  }
}

// code - zero as f32 (exact) for the 32 rows of one block: weights[k][16].
template <class V, int kBits>
void dequantise_block(const uint8_t* block, typename V::F32 zero, float* weights) {
  using Dot = typename V::template Dot<kBits>;
  for (int quad = 0; quad < 4; ++quad) {
    const auto first = Dot::first_half(block, quad);
    const auto second = Dot::second_half(block, quad);
    for (int j = 0; j < 4; ++j) {
      V::store(weights + (quad * 4 + j) * kLanes, V::sub(V::codes_to_f32(first, j), zero));
      V::store(weights + (16 + quad * 4 + j) * kLanes, V::sub(V::codes_to_f32(second, j), zero));
    }
  }
}

// y[n] += scale[n] * sum_k x[k] * weights[k][n] over `count` rows.
template <class V, int kRows>
void exact_rows(const float* x, int64_t x_stride, const float* weights, int64_t count, typename V::F32 scale,
                float* y) {
  typename V::F32 total[kRows];
  for (int m = 0; m < kRows; ++m) total[m] = V::zero();
  for (int64_t k = 0; k < count; ++k) {
    const auto weight = V::load(weights + k * kLanes);
    for (int m = 0; m < kRows; ++m) total[m] = V::fma(V::broadcast(x[m * x_stride + k]), weight, total[m]);
  }
  for (int m = 0; m < kRows; ++m) V::store(y + m * kLanes, V::fma(scale, total[m], V::load(y + m * kLanes)));
}

// Exactly dequantised weights, f32 products: each run of up to 4 blocks of a group is dequantised once into L1 and
// used by all rows of the panel.
template <class V, int kBits>
void gptq_exact_tile(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  constexpr int64_t kRunBlocks = 4;
  const GptqWeights& w = *a.weights;
  const uint8_t* codes = w.codes + tile * w.num_blocks * kBlockBytes;
  alignas(64) float weights[kRunBlocks * kBlockRows * kLanes];
  alignas(64) float y[kPanelRows * kLanes];
  for (int64_t row = row_begin; row < row_end; ++row) V::store(y + (row - row_begin) * kLanes, load_bias<V>(w, tile));
  for (int64_t g = 0; g < w.num_groups; ++g) {
    const auto scale = load_scales<V>(w, tile * w.num_groups + g);
    const auto zero = load_zeros<V>(w, tile * w.num_groups + g);
    const int64_t group_end = w.group_starts[g + 1];
    for (int64_t b = w.group_starts[g]; b < group_end; b += kRunBlocks) {
      const int64_t run = group_end - b < kRunBlocks ? group_end - b : kRunBlocks;
      for (int64_t i = 0; i < run; ++i) {
        dequantise_block<V, kBits>(codes + (b + i) * kBlockBytes, zero, weights + i * kBlockRows * kLanes);
      }
      const float* x = a.gathered + b * kBlockRows;
      for_row_blocks<V::kExactRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
        exact_rows<V, kRows>(x + row * a.x_stride, a.x_stride, weights, run * kBlockRows, scale,
                             y + (row - row_begin) * kLanes);
      });
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    store_tile<V>(a, row, tile, V::load(y + (row - row_begin) * kLanes));
  }
}

template <class V>
void gptq_exact(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                int64_t tile_end) noexcept {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (a.weights->code_bits == 4) {
      gptq_exact_tile<V, 4>(a, row_begin, row_end, tile);
    } else {
      gptq_exact_tile<V, 8>(a, row_begin, row_end, tile);
    }
  }
}

template <class V, FloatType kType>
typename V::F32 load_weight(const void* weight, int64_t index, int64_t count) {
  if constexpr (kType == FloatType::f32) {
    const float* p = static_cast<const float*>(weight) + index;
    return count == kLanes ? V::load(p) : V::load_partial(p, count);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(weight) + index;
    uint16_t padded[kLanes] = {};
    if (count != kLanes) {
      for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
      p = padded;
    }
    return kType == FloatType::f16 ? V::load_f16(p) : V::load_bf16(p);
  }
}

template <class V, FloatType kType, int kRows, int kOuts>
void dense_block(const DenseLinearArgs& a, int64_t row, int64_t out) {
  typename V::F32 total[kRows][kOuts];
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kOuts; ++n) total[m][n] = V::zero();
  }
  const float* x = a.x + row * a.x_stride;
  const auto step = [&](int64_t k, int64_t count) {
    typename V::F32 weight[kOuts];
    for (int n = 0; n < kOuts; ++n) weight[n] = load_weight<V, kType>(a.weight, (out + n) * a.in_features + k, count);
    for (int m = 0; m < kRows; ++m) {
      const float* p = x + m * a.x_stride + k;
      const auto value = count == kLanes ? V::load(p) : V::load_partial(p, count);
      for (int n = 0; n < kOuts; ++n) total[m][n] = V::fma(value, weight[n], total[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= a.in_features; k += kLanes) step(k, kLanes);
  if (k < a.in_features) step(k, a.in_features - k);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kOuts; ++n) {
      const float bias = a.bias != nullptr ? a.bias[out + n] : 0.0f;
      a.out[(row + m) * a.out_stride + out + n] = V::reduce_add(total[m][n]) + bias;
    }
  }
}

template <class V, FloatType kType>
void dense_typed(const DenseLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t out_begin, int64_t out_end) {
  for_row_blocks<4>(out_begin, out_end, [&]<int kOuts>(int64_t out) {
    for_row_blocks<V::kDenseRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      dense_block<V, kType, kRows, kOuts>(a, row, out);
    });
  });
}

template <class V>
void dense(const DenseLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t out_begin, int64_t out_end) noexcept {
  switch (a.weight_type) {
    case FloatType::f32: return dense_typed<V, FloatType::f32>(a, row_begin, row_end, out_begin, out_end);
    case FloatType::f16: return dense_typed<V, FloatType::f16>(a, row_begin, row_end, out_begin, out_end);
    case FloatType::bf16: return dense_typed<V, FloatType::bf16>(a, row_begin, row_end, out_begin, out_end);
  }
}

}  // namespace ropewalk
