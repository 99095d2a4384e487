// Linear layers: GPTQ in two compute modes, and dense.
//
// Bit reproducibility: one output element is always reduced in the same order, whichever rows are computed with it.
// GPTQ kernels keep one output feature per lane and walk the blocks in order; the dense kernel walks K in steps of 16
// with one accumulator and adds its lanes in a fixed tree.
#pragma once

#include "load.inl.hpp"
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

// Calls visit.operator()<count>(first) over [begin, end) in blocks of kMost, then of half that, down to 1.
template <int kMost, class Visit>
void for_blocks(int64_t begin, int64_t end, Visit visit) {
  for (; end - begin >= kMost; begin += kMost) visit.template operator()<kMost>(begin);
  if constexpr (kMost > 1) {
    if (begin < end) for_blocks<kMost / 2>(begin, end, visit);
  }
}

// visit.operator()<size>(first), size at most kMost.
template <int kMost, class Visit>
void visit_block(int64_t first, int64_t size, Visit& visit) {
  if constexpr (kMost > 1) {
    if (size < kMost) return visit_block<kMost - 1>(first, size, visit);
  }
  visit.template operator()<kMost>(first);
}

// The same over as few blocks as possible, all of about one size: 8 rows as 4 and 4 read the weights twice, as 6, 1 and
// 1 three times.
template <int kMost, class Visit>
void for_even_blocks(int64_t begin, int64_t end, Visit visit) {
  for (int64_t blocks = ceil_div(end - begin, kMost); blocks > 0; --blocks) {
    const int64_t size = ceil_div(end - begin, blocks);
    visit_block<kMost>(begin, size, visit);
    begin += size;
  }
}

// One block of 32 input features for kRows rows and kTiles tiles:
// total[m][j] += x_scale[m] * sum over the block of codes[j] * x8[m], the sum in integers.
template <class V, int kBits, int kRows, int kTiles>
void int8_block_step(const uint8_t* block, int64_t tile_bytes, const int8_t* x, int64_t x_stride,
                     const float* x_scales, int64_t scale_stride, typename V::F32 (&total)[kRows][kTiles]) {
  using Dot = typename V::template Dot<kBits>;
  typename Dot::Sum sum[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) sum[m][j] = Dot::zero();
  }
  for (int quad = 0; quad < 4; ++quad) {
    typename V::Codes first[kTiles], second[kTiles];
    for (int j = 0; j < kTiles; ++j) {
      first[j] = Dot::first_half(block + j * tile_bytes, quad);
      second[j] = Dot::second_half(block + j * tile_bytes, quad);
    }
    for (int m = 0; m < kRows; ++m) {
      const auto low = V::broadcast_quad(x + m * x_stride + quad * 4);
      const auto high = V::broadcast_quad(x + m * x_stride + quad * 4 + 16);
      for (int j = 0; j < kTiles; ++j) {
        sum[m][j] = Dot::add(sum[m][j], first[j], low);
        sum[m][j] = Dot::add(sum[m][j], second[j], high);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const auto x_scale = V::broadcast(x_scales[m * scale_stride]);
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(Dot::to_f32(sum[m][j]), x_scale, total[m][j]);
  }
}

// y[n] = bias[n] + sum over groups g of scale[g, n] * (sum over blocks b of g of x_scale[b] * dot(codes, x8)
//                                                      - zero[g, n] * group_sum[g])
template <class V, int kBits, int kRows, int kTiles>
void gptq_int8_block(const GptqLinearArgs& a, int64_t row, int64_t tile) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const GptqWeights& w = *a.weights;
  const int64_t tile_bytes = w.num_blocks * kBlockBytes;
  const uint8_t* codes = w.codes + tile * tile_bytes;
  const uint8_t* next = codes + kTiles * tile_bytes;
  const int64_t x_stride = w.num_blocks * kBlockRows;
  const int8_t* x = a.values + row * x_stride;
  const float* x_scales = a.block_scales + row * w.num_blocks;
  const float* sums = a.group_sums + row * w.num_groups;
  typename V::F32 y[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) y[m][j] = load_bias<V>(w, tile + j);
  }
  for (int64_t g = 0; g < w.num_groups; ++g) {
    typename V::F32 total[kRows][kTiles];
    for (int m = 0; m < kRows; ++m) {
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
    }
    for (int64_t b = w.group_starts[g]; b < w.group_starts[g + 1]; ++b) {
      // The products of several rows fill the processor's window: it does not see far enough ahead to start reading
      // the next tiles by itself, as it does for one row, and 4 rows took twice as long as one. Past the last tile this
      // asks for what follows in memory, and reads nothing.
      if constexpr (kRows > 1) {
        for (int j = 0; j < kTiles; ++j) prefetch_bytes<V>(next + j * tile_bytes + b * kBlockBytes, kBlockBytes);
      }
      int8_block_step<V, kBits, kRows, kTiles>(codes + b * kBlockBytes, tile_bytes, x + b * kBlockRows, x_stride,
                                               x_scales + b, w.num_blocks, total);
    }
    for (int j = 0; j < kTiles; ++j) {
      const auto scale = load_scales<V>(w, (tile + j) * w.num_groups + g);
      const auto zero = load_zeros<V>(w, (tile + j) * w.num_groups + g);
      for (int m = 0; m < kRows; ++m) {
        const auto centred = V::fnma(zero, V::broadcast(sums[m * w.num_groups + g]), total[m][j]);
        y[m][j] = V::fma(scale, centred, y[m][j]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) store_tile<V>(a, row + m, tile + j, y[m][j]);
  }
}

template <class V, int kBits>
void gptq_int8_bits(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                    int64_t tile_end) {
  if (row_end - row_begin == 1) {  // decoding: one stream of codes is read fastest
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) gptq_int8_block<V, kBits, 1, 1>(a, row_begin, tile);
    return;
  }
  for_blocks<V::kInt8Tiles>(tile_begin, tile_end, [&]<int kTiles>(int64_t tile) {
    for_even_blocks<V::kInt8Rows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      gptq_int8_block<V, kBits, kRows, kTiles>(a, row, tile);
    });
  });
}

template <class V>
void gptq_int8(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
               int64_t tile_end) noexcept {
  for_code_bits(a.weights->code_bits, [&]<int kBits>() {
    gptq_int8_bits<V, kBits>(a, row_begin, row_end, tile_begin, tile_end);
  });
}

static constexpr int64_t kRunBlocks = 2;  // of a group, whose products are summed before they are scaled

// One block of 32 input features: total[m][j] += x[m][k] * (code[k] - zero[j]), k in order.
template <class V, int kBits, int kRows, int kTiles>
void exact_block_step(const uint8_t* block, int64_t tile_bytes, const float* x, int64_t x_stride,
                      const typename V::Zero (&zero)[kTiles], typename V::F32 (&total)[kRows][kTiles]) {
  using Dot = typename V::template Dot<kBits>;
  for (int quad = 0; quad < 8; ++quad) {
    typename V::Codes codes[kTiles];
    for (int j = 0; j < kTiles; ++j) {
      const uint8_t* from = block + j * tile_bytes;
      codes[j] = quad < 4 ? Dot::first_half(from, quad) : Dot::second_half(from, quad - 4);
    }
    for (int i = 0; i < 4; ++i) {
      typename V::F32 weight[kTiles];
      for (int j = 0; j < kTiles; ++j) weight[j] = V::template centred<kBits>(codes[j], i, zero[j]);
      for (int m = 0; m < kRows; ++m) {
        const auto value = V::broadcast(x[m * x_stride + quad * 4 + i]);
        for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(value, weight[j], total[m][j]);
      }
    }
  }
}

// Exactly dequantised weights, f32 products. The sum runs over runs of up to two blocks of a group. Weights never leave
// the registers, though each block of rows dequantises them anew: keeping them in L1 for many rows was slower.
template <class V, int kBits, int kRows, int kTiles>
void gptq_exact_block(const GptqLinearArgs& a, int64_t row, int64_t tile) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const GptqWeights& w = *a.weights;
  const int64_t tile_bytes = w.num_blocks * kBlockBytes;
  const uint8_t* codes = w.codes + tile * tile_bytes;
  const uint8_t* next = codes + kTiles * tile_bytes;
  const float* x = a.gathered + row * a.x_stride;
  typename V::F32 y[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) y[m][j] = load_bias<V>(w, tile + j);
  }
  for (int64_t g = 0; g < w.num_groups; ++g) {
    typename V::F32 scale[kTiles];
    typename V::Zero zero[kTiles];
    for (int j = 0; j < kTiles; ++j) {
      scale[j] = load_scales<V>(w, (tile + j) * w.num_groups + g);
      zero[j] = V::as_zero(load_zeros<V>(w, (tile + j) * w.num_groups + g));
    }
    const int64_t group_end = w.group_starts[g + 1];
    for (int64_t b = w.group_starts[g]; b < group_end;) {
      const int64_t run_end = group_end - b < kRunBlocks ? group_end : b + kRunBlocks;
      typename V::F32 total[kRows][kTiles];
      for (int m = 0; m < kRows; ++m) {
        for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
      }
      for (; b < run_end; ++b) {
        if constexpr (kRows > 1) {  // as in gptq_int8_block
          for (int j = 0; j < kTiles; ++j) prefetch_bytes<V>(next + j * tile_bytes + b * kBlockBytes, kBlockBytes);
        }
        exact_block_step<V, kBits, kRows, kTiles>(codes + b * kBlockBytes, tile_bytes, x + b * kBlockRows, a.x_stride,
                                                  zero, total);
      }
      for (int m = 0; m < kRows; ++m) {
        for (int j = 0; j < kTiles; ++j) y[m][j] = V::fma(scale[j], total[m][j], y[m][j]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) store_tile<V>(a, row + m, tile + j, y[m][j]);
  }
}

template <class V, int kBits>
void gptq_exact_bits(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                     int64_t tile_end) {
  if (row_end - row_begin == 1) {  // one chain of sums would be waited for
    for_blocks<V::kExactTiles>(tile_begin, tile_end, [&]<int kTiles>(int64_t tile) {
      gptq_exact_block<V, kBits, 1, kTiles>(a, row_begin, tile);
    });
    return;
  }
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for_even_blocks<V::kExactRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      gptq_exact_block<V, kBits, kRows, 1>(a, row, tile);
    });
  }
}

template <class V>
void gptq_exact(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                int64_t tile_end) noexcept {
  for_code_bits(a.weights->code_bits, [&]<int kBits>() {
    gptq_exact_bits<V, kBits>(a, row_begin, row_end, tile_begin, tile_end);
  });
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
  for_blocks<4>(out_begin, out_end, [&]<int kOuts>(int64_t out) {
    for_even_blocks<V::kDenseRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
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
