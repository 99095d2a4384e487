// A low-rank change: the product with A, and the product with B that is added to the output of a linear while that is
// in cache.
//
// Bit reproducibility: the product with A walks K in steps of 16 with one accumulator for each rank and adds its lanes in
// a fixed tree; one output element is the sum over the ranks in order, kept apart from what it is added to.
#pragma once

#include "linear.inl.hpp"

namespace ropewalk {

// Bytes between what is being read and what is prefetched.
static constexpr int64_t kPrefetchBytes = 4096;

// 16 elements from `index` on, without their scale.
template <class V, LowRankType kType>
typename V::F32 load_ranks(const void* matrix, int64_t index) {
  if constexpr (kType == LowRankType::i8) return V::load_i8(static_cast<const int8_t*>(matrix) + index);
  return V::load(static_cast<const float*>(matrix) + index);
}

// inner[t][4 * panel + i] = sum over k of x[t][k] * a[panel][k / 16][i][k % 16]
template <class V, LowRankType kType, int kRows>
void low_rank_inner_block(const LowRankInnerArgs& a, int64_t row, int64_t panel) {
  constexpr int64_t kStep = kRankTile * kLanes;
  constexpr int64_t kElement = kType == LowRankType::i8 ? 1 : 4;
  typename V::F32 total[kRows][kRankTile];
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < kRankTile; ++i) total[m][i] = V::zero();
  }
  const int64_t first = panel * ceil_div(a.in_features, kLanes) * kStep;
  const char* bytes = static_cast<const char*>(a.a) + first * kElement;
  const float* x = a.x + row * a.x_stride;
  const auto step = [&](int64_t k, int64_t count) {
    if constexpr (kRows == 1) {
      const char* ahead = bytes + k * kRankTile * kElement + kPrefetchBytes;
      for (int64_t line = 0; line < kStep * kElement; line += 64) V::prefetch(ahead + line);
    }
    typename V::F32 weight[kRankTile];
    for (int i = 0; i < kRankTile; ++i) weight[i] = load_ranks<V, kType>(a.a, first + k * kRankTile + i * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const float* p = x + m * a.x_stride + k;
      const auto value = count == kLanes ? V::load(p) : V::load_partial(p, count);
      for (int i = 0; i < kRankTile; ++i) total[m][i] = V::fma(value, weight[i], total[m][i]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= a.in_features; k += kLanes) step(k, kLanes);
  if (k < a.in_features) step(k, a.in_features - k);
  for (int m = 0; m < kRows; ++m) {
    float* inner = a.inner + (row + m) * a.inner_stride + panel * kRankTile;
    for (int i = 0; i < kRankTile; ++i) {
      inner[i] = V::reduce_add(total[m][i]);
      if constexpr (kType == LowRankType::i8) inner[i] *= a.scales[panel * kRankTile + i];
    }
  }
}

template <class V, LowRankType kType>
void low_rank_inner_typed(const LowRankInnerArgs& a, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                          int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    for_blocks<V::kDenseRows>(row_begin, row_end,
                              [&]<int kRows>(int64_t row) { low_rank_inner_block<V, kType, kRows>(a, row, panel); });
  }
}

template <class V>
void low_rank_inner(const LowRankInnerArgs& a, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                    int64_t panel_end) noexcept {
  if (a.type == LowRankType::i8) {
    return low_rank_inner_typed<V, LowRankType::i8>(a, row_begin, row_end, panel_begin, panel_end);
  }
  low_rank_inner_typed<V, LowRankType::f32>(a, row_begin, row_end, panel_begin, panel_end);
}

// out[t][n] += sum over r of inner[t][r] * b[r][n]
template <class V, LowRankType kType, int kRows, int kTiles>
void low_rank_block(const LowRankArgs& a, int64_t row, int64_t tile) {
  typename V::F32 total[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  const float* inner = a.inner + row * a.inner_stride;
  for (int64_t r = 0; r < a.rank; ++r) {
    typename V::F32 b[kTiles];
    for (int j = 0; j < kTiles; ++j) b[j] = load_ranks<V, kType>(a.b, ((tile + j) * a.rank + r) * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast(inner[m * a.inner_stride + r]);
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(value, b[j], total[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) {
      float* out = a.out + (row + m) * a.out_stride + (tile + j) * kLanes;
      const int64_t count = a.out_features - (tile + j) * kLanes;
      if constexpr (kType == LowRankType::i8) {
        total[m][j] = V::mul(total[m][j], V::load(a.scales + (tile + j) * kLanes));
      }
      if (count >= kLanes) {
        V::store(out, V::add(V::load(out), total[m][j]));
      } else {
        V::store_partial(out, V::add(V::load_partial(out, count), total[m][j]), count);
      }
    }
  }
}

template <class V, LowRankType kType>
void low_rank_typed(const LowRankArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  for_blocks<V::kLowRankTiles>(tile_begin, tile_end, [&]<int kTiles>(int64_t tile) {
    for_blocks<V::kLowRankRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      low_rank_block<V, kType, kRows, kTiles>(a, row, tile);
    });
  });
}

template <class V>
void low_rank(const LowRankArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) noexcept {
  if (a.type == LowRankType::i8) return low_rank_typed<V, LowRankType::i8>(a, row_begin, row_end, tile_begin, tile_end);
  low_rank_typed<V, LowRankType::f32>(a, row_begin, row_end, tile_begin, tile_end);
}

}  // namespace ropewalk
