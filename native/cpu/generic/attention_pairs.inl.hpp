// Scores and weighted values over keys and values in f16, in products of pairs of bf16 that are summed in f32.
//
// Queries, keys, values and weights are rounded to bf16 (8 bits), the sums are not: an element is off by 2^-9 of itself at
// most, half of what coding it in 8 bits costs.  Only for `int8`, and only where the processor multiplies such pairs:
// twice as many products to an instruction as in f32.
//
//   keys    [4][ceil(D / 2)][16] lanes of (dim 2i, dim 2i + 1)         values  [keys / 2][padded_dim] lanes of two keys
#pragma once

#include "attention_tile.inl.hpp"
#include "linear.inl.hpp"
#include "softmax.inl.hpp"

namespace ropewalk {

template <class V>
constexpr bool in_pairs(KvType type, Compute compute) {
  return V::kBf16Pairs && type == KvType::f16 && compute == Compute::int8;
}

// The keys of a page into tile.keys.
template <class V>
void pair_keys(const AttendTile& tile, const uint8_t* keys, int64_t head_dim) {
  const auto* from = reinterpret_cast<const uint16_t*>(keys);
  auto* to = reinterpret_cast<uint32_t*>(tile.keys);
  for (int64_t j = 0; j < kKvTile / kLanes; ++j) {
    for (int64_t d = 0; d < head_dim; d += 2, from += 2 * kLanes, to += kLanes) {
      const auto low = V::load_f16(from);
      if (d + 1 < head_dim) {
        V::store_pairs(to, V::round_pairs(low, V::load_f16(from + kLanes)));
      } else {
        V::store_pairs(to, V::round_pairs(low, V::zero()));
        from -= kLanes;
      }
    }
  }
}

// The first num_keys values of a page into tile.values.
template <class V>
void pair_values(const AttendTile& tile, const uint8_t* values, int64_t num_keys) {
  const auto* from = reinterpret_cast<const uint16_t*>(values);
  auto* to = reinterpret_cast<uint32_t*>(tile.values);
  const int64_t width = tile.padded_dim;
  for (int64_t key = 0; key < num_keys; key += 2, from += 2 * width, to += width) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const auto high = key + 1 < num_keys ? V::load_f16(from + width + d) : V::zero();
      V::store_pairs(to + d, V::round_pairs(V::load_f16(from + d), high));
    }
  }
}

// The scores of kRows rows over kTiles tiles of 16 keys: q [kRows][block_dim] in bf16.
template <class V, int kRows, int kTiles>
void score_pairs_block(const AttendTile& tile, const uint16_t* q, const uint32_t* keys, int64_t num_pairs,
                       float* scores) {
  typename V::F32 total[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    typename V::Bf16Pairs key[kTiles];
    for (int j = 0; j < kTiles; ++j) key[j] = V::load_pairs(keys + (j * num_pairs + i) * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast_pair(q + m * tile.block_dim + 2 * i);
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::add_products(total[m][j], key[j], value);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) V::store(scores + m * kKvTile + j * kLanes, total[m][j]);
  }
}

// tile.scores of some rows over all keys of a page.
template <class V>
void score_pairs(const AttendTile& tile, const PageRows& rows, int64_t head_dim) {
  const int64_t num_pairs = ceil_div(head_dim, 2);
  pair_keys<V>(tile, rows.page.keys, head_dim);
  const auto* keys = reinterpret_cast<const uint32_t*>(tile.keys);
  for_even_blocks<V::kAttendRows>(rows.row_begin, rows.row_end, [&]<int kRows>(int64_t row) {
    constexpr int kTiles = kRows > V::kAttendRows / 2 ? 2 : 4;
    for (int64_t j = 0; j < kKvTile / kLanes; j += kTiles) {
      score_pairs_block<V, kRows, kTiles>(tile, tile.halves + row * tile.block_dim, keys + j * num_pairs * kLanes,
                                          num_pairs, tile.scores + row * kKvTile + j * kLanes);
    }
  });
}

// out = out * correction + weighted values of the keys at `places`, for kRows rows and kChunks * 16 dims.
// w: [kRows][kKvTile] in bf16, zero at the other places; but zero times a hidden value that is infinite would be NaN, so
// of a pair that is half hidden the other half alone is read.
template <class V, int kRows, int kChunks>
void weigh_pairs_block(const uint16_t* w, const float* correction, const uint32_t* values, int64_t padded_dim,
                       KeyRange places, float* out) {
  typename V::F32 total[kRows][kChunks];
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kChunks; ++c) {
      total[m][c] = V::mul(V::broadcast(correction[m]), V::load(out + m * padded_dim + c * kLanes));
    }
  }
  const auto step = [&](int64_t key, auto visible) {
    typename V::Bf16Pairs value[kChunks];
    for (int c = 0; c < kChunks; ++c) value[c] = visible(V::load_pairs(values + key / 2 * padded_dim + c * kLanes));
    for (int m = 0; m < kRows; ++m) {
      const auto weight = V::broadcast_pair(w + m * kKvTile + key);
      for (int c = 0; c < kChunks; ++c) total[m][c] = V::add_products(total[m][c], value[c], weight);
    }
  };
  int64_t key = places.begin;
  if (key % 2 == 1) step(key++ - 1, [](auto pair) { return V::keep_high(pair); });
  for (; key + 1 < places.end; key += 2) step(key, [](auto pair) { return pair; });
  if (key < places.end) step(key, [](auto pair) { return V::keep_low(pair); });
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kChunks; ++c) V::store(out + m * padded_dim + c * kLanes, total[m][c]);
  }
}

// state.out of rows [row_begin, row_end), which see the same places of the page in tile.values.
template <class V>
void weigh_pairs(const AttendTile& tile, int64_t row_begin, int64_t row_end, KeyRange places) {
  const auto* values = reinterpret_cast<const uint32_t*>(tile.values);
  for_even_blocks<V::kAttendRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    constexpr int kChunks = kRows > V::kAttendRows / 2 ? 2 : 4;
    const auto* w = reinterpret_cast<const uint16_t*>(tile.weights) + row * kKvTile;
    float* out = tile.state.out + row * tile.padded_dim;
    int64_t d = 0;
    for (; d + kChunks * kLanes <= tile.padded_dim; d += kChunks * kLanes) {
      weigh_pairs_block<V, kRows, kChunks>(w, tile.correction + row, values + d, tile.padded_dim, places, out + d);
    }
    for (; d < tile.padded_dim; d += kLanes) {
      weigh_pairs_block<V, kRows, 1>(w, tile.correction + row, values + d, tile.padded_dim, places, out + d);
    }
  });
}

}  // namespace ropewalk
