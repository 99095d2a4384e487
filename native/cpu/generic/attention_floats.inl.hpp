// Scores and weighted values where keys and values are floats.
#pragma once

#include "attention_tile.inl.hpp"
#include "linear.inl.hpp"

namespace ropewalk {

// scores[m][16 keys] = sum over d of q[m][d] * key[d][16], for kRows rows and kTiles key tiles.
template <class V, KvType kType, int kRows, int kTiles>
void score_block(const float* q, int64_t q_stride, const typename KvElement<V, kType>::Stored* keys, int64_t head_dim,
                 float* scores) {
  typename V::F32 total[kRows][kTiles];
#pragma GCC unroll 8  // else GCC keeps the sums in memory before and after the loop
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    typename V::F32 key[kTiles];
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) key[j] = KvElement<V, kType>::load(keys + (j * head_dim + d) * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast(q[m * q_stride + d]);
#pragma GCC unroll 8
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(value, key[j], total[m][j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) V::store(scores + m * kKvTile + j * kLanes, total[m][j]);
  }
}

// The scores of some rows over all keys of a page: keys [4][D][16]; q: tile.q, or the rotated queries.
template <class V, KvType kType>
void score_floats(const AttendTile& tile, int64_t row_begin, int64_t row_end, const float* q, const void* keys,
                  int64_t head_dim) {
  const auto* stored = static_cast<const typename KvElement<V, kType>::Stored*>(keys);
  for_blocks<V::kAttendRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    constexpr int kTiles = kRows == V::kAttendRows ? 2 : 4;
    for (int64_t j = 0; j < kKvTile; j += kTiles * kLanes) {
      score_block<V, kType, kRows, kTiles>(q + row * tile.block_dim, tile.block_dim, stored + j * head_dim, head_dim,
                                           tile.scores + row * kKvTile + j);
    }
  });
}

// out[m] = out[m] * correction[m] + sum over keys j of p[m][j] * value[j], for kRows rows and kChunks * 16 dims.
template <class V, KvType kType, int kRows, int kChunks>
void weigh_block(const float* p, const float* correction, const typename KvElement<V, kType>::Stored* values,
                 int64_t padded_dim, int64_t num_keys, float* out) {
  typename V::F32 total[kRows][kChunks];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      total[m][c] = V::mul(V::broadcast(correction[m]), V::load(out + m * padded_dim + c * kLanes));
    }
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    typename V::F32 value[kChunks];
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) value[c] = KvElement<V, kType>::load(values + j * padded_dim + c * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto weight = V::broadcast(p[m * kKvTile + j]);
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) total[m][c] = V::fma(weight, value[c], total[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) V::store(out + m * padded_dim + c * kLanes, total[m][c]);
  }
}

// weigh_block over rows [row_begin, row_end), all dims, and those keys of the page.
template <class V, KvType kType>
void weigh_floats(const AttendTile& tile, int64_t row_begin, int64_t row_end, const void* values, KeyRange places) {
  const auto* first = static_cast<const typename KvElement<V, kType>::Stored*>(values) + places.begin * tile.padded_dim;
  const int64_t num_keys = places.end - places.begin;
  for_blocks<V::kAttendRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    constexpr int kChunks = kRows == V::kAttendRows ? 2 : 4;
    const float* p = tile.scores + row * kKvTile + places.begin;
    float* out = tile.state.out + row * tile.padded_dim;
    int64_t d = 0;
    for (; d + kChunks * kLanes <= tile.padded_dim; d += kChunks * kLanes) {
      weigh_block<V, kType, kRows, kChunks>(p, tile.correction + row, first + d, tile.padded_dim, num_keys, out + d);
    }
    for (; d < tile.padded_dim; d += kLanes) {
      weigh_block<V, kType, kRows, 1>(p, tile.correction + row, first + d, tile.padded_dim, num_keys, out + d);
    }
  });
}

}  // namespace ropewalk
