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

// Keys as a page has them: [4][D][16] in f16. For one block of rows they are rounded in registers.
template <class V>
struct KeyHalves {
  const uint16_t* keys;
  const uint8_t* next;  // the page that is read next
  int64_t head_dim;

  typename V::Bf16Pairs load(int64_t tile, int64_t pair) const {
    const int64_t place = (tile * head_dim + 2 * pair) * kLanes;
    V::prefetch_far(next + 2 * place);
    const auto low = V::load_f16(keys + place);
    return V::round_pairs(low, 2 * pair + 1 < head_dim ? V::load_f16(keys + place + kLanes) : V::zero());
  }
};

// The same as pairs: [4][ceil(D / 2)][16].
template <class V>
struct KeyPairs {
  const uint32_t* keys;
  int64_t num_pairs;

  typename V::Bf16Pairs load(int64_t tile, int64_t pair) const {
    return V::load_pairs(keys + (tile * num_pairs + pair) * kLanes);
  }
};

// The keys of a page into tile.keys.
template <class V>
KeyPairs<V> paired_keys(const AttendTile& tile, const KeyHalves<V>& keys) {
  const int64_t num_pairs = ceil_div(keys.head_dim, 2);
  auto* to = reinterpret_cast<uint32_t*>(tile.keys);
  for (int64_t j = 0; j < kKvTile / kLanes; ++j) {
    for (int64_t i = 0; i < num_pairs; ++i) V::store_pairs(to + (j * num_pairs + i) * kLanes, keys.load(j, i));
  }
  return {to, num_pairs};
}

// The scores of kRows rows over kTiles tiles of 16 keys from the first on: q [kRows][block_dim] in bf16.
template <class V, int kRows, int kTiles, class Keys>
void score_pairs_block(const AttendTile& tile, const uint16_t* q, const Keys& keys, int64_t first, int64_t num_pairs,
                       float* scores) {
  typename V::F32 total[kRows][kTiles];
#pragma GCC unroll 8  // else GCC keeps the sums in memory before and after the loop
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    typename V::Bf16Pairs key[kTiles];
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) key[j] = keys.load(first + j, i);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast_pair(q + m * tile.block_dim + 2 * i);
#pragma GCC unroll 8
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::add_products(total[m][j], key[j], value);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) V::store(scores + m * kKvTile + j * kLanes, total[m][j]);
  }
}

// tile.scores of some rows over all of these keys.
template <class V, class Keys>
void score_rows(const AttendTile& tile, const PageRows& rows, const Keys& keys, int64_t num_pairs) {
  for_even_blocks<V::kAttendRows>(rows.row_begin, rows.row_end, [&]<int kRows>(int64_t row) {
    constexpr int kTiles = kRows > V::kAttendRows / 2 ? 2 : 4;
    for (int64_t j = 0; j < kKvTile / kLanes; j += kTiles) {
      score_pairs_block<V, kRows, kTiles>(tile, tile.halves + row * tile.block_dim, keys, j, num_pairs,
                                          tile.scores + row * kKvTile + j * kLanes);
    }
  });
}

// tile.scores of some rows over all keys of a page.
template <class V>
void score_pairs(const AttendTile& tile, const PageRows& rows, int64_t head_dim) {
  const KeyHalves<V> keys{reinterpret_cast<const uint16_t*>(rows.page.keys), rows.next.keys, head_dim};
  const int64_t num_pairs = ceil_div(head_dim, 2);
  if (rows.row_end - rows.row_begin <= V::kAttendRows) return score_rows<V>(tile, rows, keys, num_pairs);
  score_rows<V>(tile, rows, paired_keys<V>(tile, keys), num_pairs);
}

// Values as a page has them: [keys][padded_dim] in f16.
template <class V>
struct ValueHalves {
  const uint16_t* values;
  const uint8_t* next;
  int64_t padded_dim;
  int64_t num_keys;

  typename V::Bf16Pairs load(int64_t key, int64_t d) const {
    const int64_t low = key * padded_dim + d, high = low + padded_dim;
    V::prefetch_far(next + 2 * low);
    V::prefetch_far(next + 2 * high);
    return V::round_pairs(V::load_f16(values + low), key + 1 < num_keys ? V::load_f16(values + high) : V::zero());
  }
};

// The same as pairs: [keys / 2][padded_dim].
template <class V>
struct ValuePairs {
  const uint32_t* values;
  int64_t padded_dim;

  typename V::Bf16Pairs load(int64_t key, int64_t d) const {
    return V::load_pairs(values + key / 2 * padded_dim + d);
  }
};

// The first num_keys values of a page into tile.values.
template <class V>
ValuePairs<V> paired_values(const AttendTile& tile, const ValueHalves<V>& values) {
  auto* to = reinterpret_cast<uint32_t*>(tile.values);
  for (int64_t key = 0; key < values.num_keys; key += 2) {
    for (int64_t d = 0; d < tile.padded_dim; d += kLanes) {
      V::store_pairs(to + key / 2 * tile.padded_dim + d, values.load(key, d));
    }
  }
  return {to, tile.padded_dim};
}

// out = out * correction + weighted values of the keys at `places`, for kRows rows and kChunks * 16 dims.
// w: [kRows][kKvTile] in bf16, zero at the other places; but zero times a hidden value that is infinite would be NaN, so
// of a pair that is half hidden the other half alone is read.
template <class V, int kRows, int kChunks, class Values>
void weigh_pairs_block(const uint16_t* w, const float* correction, const Values& values, int64_t d, KeyRange places,
                       float* out) {
  const int64_t padded_dim = values.padded_dim;
  typename V::F32 total[kRows][kChunks];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      total[m][c] = V::mul(V::broadcast(correction[m]), V::load(out + m * padded_dim + c * kLanes));
    }
  }
  const auto step = [&](int64_t key, auto visible) {
    typename V::Bf16Pairs value[kChunks];
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) value[c] = visible(values.load(key, d + c * kLanes));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto weight = V::broadcast_pair(w + m * kKvTile + key);
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) total[m][c] = V::add_products(total[m][c], value[c], weight);
    }
  };
  int64_t key = places.begin;
  if (key % 2 == 1) step(key++ - 1, [](auto pair) { return V::keep_high(pair); });
  for (; key + 1 < places.end; key += 2) step(key, [](auto pair) { return pair; });
  if (key < places.end) step(key, [](auto pair) { return V::keep_low(pair); });
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) V::store(out + m * padded_dim + c * kLanes, total[m][c]);
  }
}

// state.out of rows [row_begin, row_end), which see the same places of a page.
template <class V, class Values>
void weigh_pairs(const AttendTile& tile, int64_t row_begin, int64_t row_end, const Values& values, KeyRange places) {
  for_even_blocks<V::kAttendRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    constexpr int kChunks = kRows > V::kAttendRows / 2 ? 2 : 4;
    const auto* w = reinterpret_cast<const uint16_t*>(tile.weights) + row * kKvTile;
    float* out = tile.state.out + row * tile.padded_dim;
    int64_t d = 0;
    for (; d + kChunks * kLanes <= tile.padded_dim; d += kChunks * kLanes) {
      weigh_pairs_block<V, kRows, kChunks>(w, tile.correction + row, values, d, places, out + d);
    }
    for (; d < tile.padded_dim; d += kLanes) {
      weigh_pairs_block<V, kRows, 1>(w, tile.correction + row, values, d, places, out + d);
    }
  });
}

}  // namespace ropewalk
