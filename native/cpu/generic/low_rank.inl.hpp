// The second half of a low-rank change, added to the output of a linear while that lies in cache.
//
// Bit reproducibility: one output element is the sum over the ranks in order, kept apart from what it is added to.
#pragma once

#include "linear.inl.hpp"

namespace ropewalk {

// out[t][n] += sum over r of inner[t][r] * b[r][n]
template <class V, FloatType kType, int kRows, int kTiles>
void low_rank_block(const LowRankArgs& a, int64_t row, int64_t tile) {
  typename V::F32 total[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  const float* inner = a.inner + row * a.inner_stride;
  for (int64_t r = 0; r < a.rank; ++r) {
    typename V::F32 b[kTiles];
    for (int j = 0; j < kTiles; ++j) b[j] = load_weight<V, kType>(a.b, ((tile + j) * a.rank + r) * kLanes, kLanes);
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast(inner[m * a.inner_stride + r]);
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(value, b[j], total[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) {
      float* out = a.out + (row + m) * a.out_stride + (tile + j) * kLanes;
      const int64_t count = a.out_features - (tile + j) * kLanes;
      if (count >= kLanes) {
        V::store(out, V::add(V::load(out), total[m][j]));
      } else {
        V::store_partial(out, V::add(V::load_partial(out, count), total[m][j]), count);
      }
    }
  }
}

template <class V, FloatType kType>
void low_rank_typed(const LowRankArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  for_blocks<V::kExactTiles>(tile_begin, tile_end, [&]<int kTiles>(int64_t tile) {
    for_blocks<V::kExactRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
      low_rank_block<V, kType, kRows, kTiles>(a, row, tile);
    });
  });
}

template <class V>
void low_rank(const LowRankArgs& a, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) noexcept {
  if (a.type == FloatType::f16) return low_rank_typed<V, FloatType::f16>(a, row_begin, row_end, tile_begin, tile_end);
  low_rank_typed<V, FloatType::f32>(a, row_begin, row_end, tile_begin, tile_end);
}

}  // namespace ropewalk
