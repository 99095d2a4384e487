// Linear layers: GPTQ in two compute modes, and dense.
//
// Bit reproducibility: one output element is always reduced in the same order, whichever rows are computed with it.
// The GPTQ kernel keeps one output feature per lane and walks the blocks in order; the dense kernel walks K in steps of 16
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

// What is left of the zero points once `middle` has been subtracted from the codes.
template <class V>
typename V::F32 load_zeros(const GptqWeights& w, int64_t index) {
  return V::sub(V::load_u8(w.zeros + index * kLanes), V::broadcast(static_cast<float>(w.middle)));
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

// The sums of a block, one for each digit of the activations, as one number: ((d0 2^8 + d1) 2^8 + d2).
template <class V, int kDigits>
typename V::F32 joined(const typename V::F32 (&digit)[kDigits]) {
  if constexpr (kDigits == 1) return digit[0];
  const auto low = V::fma(digit[1], V::broadcast(256.0f), digit[2]);
  return V::fma(digit[0], V::broadcast(65536.0f), low);
}

// One block of 32 input features for kRows rows and kTiles tiles:
// total[m][j] += scale[m] * sum over the block of x[m] * (codes[j] - middle), the sums in integers.
// Always inlined: a call would pass the totals through memory.
template <class V, int kBits, int kDigits, int kRows, int kTiles>
[[gnu::always_inline]] inline void block_step(const uint8_t* block, int64_t tile_bytes, const PreparedRows& rows,
                                              int64_t num_blocks, typename V::F32 (&total)[kRows][kTiles]) {
  using Dot = typename V::template Dot<kBits>;
  const int32_t* starts = rows.starts;
  typename Dot::Sum sum[kRows][kDigits][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int d = 0; d < kDigits; ++d) {
      for (int j = 0; j < kTiles; ++j) sum[m][d][j] = Dot::begin(starts[m * num_blocks * kDigits + d]);
    }
  }
  for (int quad = 0; quad < 4; ++quad) {
    typename V::Codes first[kTiles], second[kTiles];
    for (int j = 0; j < kTiles; ++j) {
      first[j] = Dot::first_half(block + j * tile_bytes, quad);
      second[j] = Dot::second_half(block + j * tile_bytes, quad);
    }
    for (int m = 0; m < kRows; ++m) {
      for (int d = 0; d < kDigits; ++d) {
        const int8_t* x = rows.digits + (m * num_blocks * kDigits + d) * kBlockRows;
        const auto low = V::broadcast_quad(x + quad * 4);
        const auto high = V::broadcast_quad(x + quad * 4 + 16);
        for (int j = 0; j < kTiles; ++j) {
          sum[m][d][j] = Dot::add(sum[m][d][j], first[j], low);
          sum[m][d][j] = Dot::add(sum[m][d][j], second[j], high);
        }
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const auto scale = V::broadcast(rows.scales[m * num_blocks]);
    for (int j = 0; j < kTiles; ++j) {
      typename V::F32 digit[kDigits];
      for (int d = 0; d < kDigits; ++d) digit[d] = Dot::end(sum[m][d][j], starts[m * num_blocks * kDigits + d]);
      total[m][j] = V::fma(joined<V, kDigits>(digit), scale, total[m][j]);
    }
  }
}

// From block b of a row on.
template <int kDigits>
static PreparedRows from_block(const PreparedRows& rows, int64_t index) {
  return {rows.digits + index * kDigits * kBlockRows, rows.scales + index, rows.starts + index * kDigits, nullptr};
}

// y[n] = bias[n] + sum over groups g of scale[g, n] * (sum over blocks b of g of scale[b] * dot(codes - middle, digits)
//                                                      - (zero[g, n] - middle) * group_sum[g])
// Where each group is one block, its totals stay in registers: the compiler knows that they are written once.
template <class V, int kBits, int kDigits, int kRows, int kTiles, bool kGroupsAreBlocks>
void gptq_block(const GptqLinearArgs& a, int64_t row, int64_t tile) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const GptqWeights& w = *a.weights;
  const int64_t tile_bytes = w.num_blocks * kBlockBytes;
  const uint8_t* codes = w.codes + tile * tile_bytes;
  const uint8_t* next = codes + kTiles * tile_bytes;
  const float* sums = a.rows.group_sums + row * w.num_groups;
  typename V::F32 y[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) y[m][j] = load_bias<V>(w, tile + j);
  }
  for (int64_t g = 0; g < w.num_groups; ++g) {
    typename V::F32 total[kRows][kTiles];
    for (int m = 0; m < kRows; ++m) {
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
    }
    const int64_t first = kGroupsAreBlocks ? g : w.group_starts[g];
    const int64_t end = kGroupsAreBlocks ? g + 1 : w.group_starts[g + 1];
    for (int64_t b = first; b < end; ++b) {
      // The products of several rows or digits fill the processor's window: it does not see far enough ahead to start
      // reading the next tiles by itself, as it does for one row, and 4 rows took twice as long as one. Past the last
      // tile this asks for what follows in memory, and reads nothing.
      if constexpr (kRows * kDigits > 1) {
        for (int j = 0; j < kTiles; ++j) prefetch_bytes<V>(next + j * tile_bytes + b * kBlockBytes, kBlockBytes);
      }
      const PreparedRows rows = from_block<kDigits>(a.rows, row * w.num_blocks + b);
      block_step<V, kBits, kDigits, kRows, kTiles>(codes + b * kBlockBytes, tile_bytes, rows, w.num_blocks, total);
    }
    for (int j = 0; j < kTiles; ++j) {
      const auto scale = load_scales<V>(w, (tile + j) * w.num_groups + g);
      if (w.zeros != nullptr) {
        const auto zero = load_zeros<V>(w, (tile + j) * w.num_groups + g);
        for (int m = 0; m < kRows; ++m) {
          total[m][j] = V::fnma(zero, V::broadcast(sums[m * w.num_groups + g]), total[m][j]);
        }
      }
      for (int m = 0; m < kRows; ++m) y[m][j] = V::fma(scale, total[m][j], y[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) store_tile<V>(a, row + m, tile + j, y[m][j]);
  }
}

template <class V, int kBits, int kDigits, int kMostRows, int kMostTiles, bool kGroupsAreBlocks>
void gptq_bits(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  // Decoding in int8: one stream of codes is read fastest. With three digits, loads bind: two tiles share the broadcasts.
  if (kDigits == 1 && row_end - row_begin == 1) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      gptq_block<V, kBits, kDigits, 1, 1, kGroupsAreBlocks>(a, row_begin, tile);
    }
    return;
  }
  for_blocks<kMostTiles>(tile_begin, tile_end, [&]<int kTiles>(int64_t tile) {
    for_even_blocks<kMostRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      gptq_block<V, kBits, kDigits, kRows, kTiles, kGroupsAreBlocks>(a, row, tile);
    });
  });
}

template <class V>
void gptq_int8(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
               int64_t tile_end) noexcept {
  for_code_bits(a.weights->code_bits, [&]<int kBits>() {
    const auto run = a.weights->groups_are_blocks
                         ? gptq_bits<V, kBits, kInt8Digits, V::kInt8Rows, V::kInt8Tiles, true>
                         : gptq_bits<V, kBits, kInt8Digits, V::kInt8Rows, V::kInt8Tiles, false>;
    run(a, row_begin, row_end, tile_begin, tile_end);
  });
}

template <class V>
void gptq_exact(const GptqLinearArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                int64_t tile_end) noexcept {
  for_code_bits(a.weights->code_bits, [&]<int kBits>() {
    gptq_bits<V, kBits, kExactDigits, V::kExactRows, V::kExactTiles, false>(a, row_begin, row_end, tile_begin,
                                                                            tile_end);
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
