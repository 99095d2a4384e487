// Scores and weighted values where keys and values are codes, in integers.
//
//   score[j] = sum over blocks b of 32 dims of  scale[j, b] * s[b] * (sum over d in b of q[d] * code[j, d]
//                                                                     - zero * sum over d in b of q[d])
//   out[c]  += unit[b] * (sum over j of w[j] * code[j, c] - zero * sum over j of w[j])
//
// q: queries rounded to 8 bits, s: their scales.  w[j]: the weight of key j times the scale of its values in block b of
// c, in 15 bits of the largest of the page; a page of 64 keys stays below 2^31.  The sums are exact.
#pragma once

#include "attention_tile.inl.hpp"
#include "linear.inl.hpp"
#include "prepare.inl.hpp"
#include "softmax.inl.hpp"

namespace ropewalk {

// q [block_dim] -> codes, code_scales and code_offsets of one row.
template <class V>
void quantise_query(const AttendTile& tile, int64_t row, const float* q, float zero) {
  const int64_t blocks = tile.block_dim / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const ActivationBlock<V> block(V::load(q + b * kBlockRows), V::load(q + b * kBlockRows + kLanes));
    auto& codes = *reinterpret_cast<int8_t(*)[1][kBlockRows]>(tile.codes + row * tile.block_dim + b * kBlockRows);
    const float scale = to_digits(block, codes);
    tile.code_scales[row * blocks + b] = scale;
    tile.code_offsets[row * blocks + b] = -(zero * static_cast<float>(sum_of(codes[0]))) * scale;
  }
}

// Codes and scales of 16 keys in one block of dims, or of 32 keys in 16 dims.
template <int kBits>
static constexpr int64_t kAheadBytes = kBlockRows * kLanes * kBits / 8 + kLanes * 2;

// The scores of kRows rows over kTiles tiles of 16 keys, in all blocks of dims.
template <class V, int kBits, int kRows, int kTiles>
void score_codes_block(const AttendTile& tile, int64_t row, const uint8_t* codes, const uint16_t* scales,
                       const uint8_t* next, float* scores) {
  using Dot = typename V::template Dot<kBits>;
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const int64_t blocks = tile.block_dim / kBlockRows;
  const int8_t* q = tile.codes + row * tile.block_dim;
  typename V::F32 total[kRows][kTiles];
#pragma GCC unroll 8  // or GCC clears them by way of memory, with a `rep stos`: 6 % of decoding over q8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  for (int64_t b = 0; b < blocks; ++b) {
    typename Dot::Sum sum[kRows][kTiles];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int j = 0; j < kTiles; ++j) sum[m][j] = Dot::zero();
    }
    if (next != nullptr) prefetch_bytes<V>(next + b * kTiles * kAheadBytes<kBits>, kTiles * kAheadBytes<kBits>);
    for (int quad = 0; quad < 4; ++quad) {
      typename V::Codes first[kTiles], second[kTiles];
      for (int j = 0; j < kTiles; ++j) {
        first[j] = Dot::first_half(codes + (j * blocks + b) * kBlockBytes, quad);
        second[j] = Dot::second_half(codes + (j * blocks + b) * kBlockBytes, quad);
      }
      for (int m = 0; m < kRows; ++m) {
        const auto low = V::broadcast_quad(q + m * tile.block_dim + b * kBlockRows + quad * 4);
        const auto high = V::broadcast_quad(q + m * tile.block_dim + b * kBlockRows + quad * 4 + 16);
        for (int j = 0; j < kTiles; ++j) {
          sum[m][j] = Dot::add(sum[m][j], first[j], low);
          sum[m][j] = Dot::add(sum[m][j], second[j], high);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) {
      const auto scale = V::load_f16(scales + (j * blocks + b) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto step = V::broadcast(tile.code_scales[(row + m) * blocks + b]);
        const auto offset = V::broadcast(tile.code_offsets[(row + m) * blocks + b]);
        total[m][j] = V::fma(scale, V::fma(Dot::to_f32(sum[m][j]), step, offset), total[m][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kTiles; ++j) V::store(scores + m * kKvTile + j * kLanes, total[m][j]);
  }
}

// tile.scores of some rows over all keys of a page.
template <class V, int kBits>
void score_codes(const AttendTile& tile, const PageRows& rows) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const int64_t blocks = tile.block_dim / kBlockRows;
  const uint8_t* codes = rows.page.keys;
  const auto* scales = reinterpret_cast<const uint16_t*>(codes + kKvTile / kLanes * blocks * kBlockBytes);
  for_even_blocks<V::kCodeRows>(rows.row_begin, rows.row_end, [&]<int kRows>(int64_t row) {
    constexpr int kTiles = kRows > V::kCodeRows / 2 ? 1 : kRows > V::kCodeRows / 4 ? 2 : 4;
    for (int64_t j = 0; j < kKvTile / kLanes; j += kTiles) {
      const uint8_t* next = row == rows.row_begin ? rows.next.keys + j * blocks * kAheadBytes<kBits> : nullptr;
      score_codes_block<V, kBits, kRows, kTiles>(tile, row, codes + j * blocks * kBlockBytes,
                                                 scales + j * blocks * kLanes, next,
                                                 tile.scores + row * kKvTile + j * kLanes);
    }
  });
}

// The scales of the values at `places` in integers of 15 bits, the others 0: a scale that no row sees may be anything.
// w = weights * value_scales / 2^15 is in units of value_units.
template <class V>
void load_value_scales(const AttendTile& tile, const uint16_t* scales, KeyRange places) {
  const bool whole = places.begin == 0 && places.end == kKvTile;
  for (int64_t b = 0; b < tile.block_dim / kBlockRows; ++b) {
    typename V::F32 d[kKvTile / kLanes];
    auto highest = V::zero(), poison = V::zero();
    for (int64_t j = 0; j < kKvTile; j += kLanes) {
      auto& lanes = d[j / kLanes];
      lanes = V::load_f16(scales + b * kKvTile + j);
      if (!whole) lanes = V::select_range(lanes, V::zero(), places.begin - j, places.end - j);
      highest = V::max(highest, lanes);
      poison = V::add(poison, V::sub(lanes, lanes));  // NaN where a scale is not finite
    }
    const float largest = V::reduce_max(highest);
    const auto steps = V::broadcast(largest > 0.0f ? kWeightSteps / largest : 0.0f);
    for (int64_t j = 0; j < kKvTile; j += kLanes) {
      V::store_int16(tile.value_scales + b * kKvTile + j, V::mul(d[j / kLanes], steps));
    }
    tile.value_units[b] = largest * (32768.0f / (kWeightSteps * kWeightSteps)) + V::reduce_add(poison);
  }
}

// out = out * correction + take * weighted values of a page, for kRows rows and kGroups * 16 dims of one block.
// w: [kRows][kKvTile]; factors, offsets: [kRows] unit * take, and zero * sum(w).
template <class V, int kBits, int kRows, int kGroups>
void weigh_codes_block(const int16_t* w, const uint8_t* codes, const float* correction, const float* factors,
                       const float* offsets, int64_t padded_dim, float* out) {
  using Pairs = typename V::template Pairs<kBits>;
  constexpr int64_t kTileBytes = kBlockRows * kLanes * kBits / 8;
  // Sums that do not wait for each other, where few rows leave registers: integers add up the same in any order.
  constexpr int kChains = kRows * kGroups >= 4 ? 1 : 2;
  typename V::PairSum sum[kRows][kGroups][kChains];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) sum[m][g][c] = V::pair_zero();
    }
  }
  for (int half = 0; half < kKvTile / kBlockRows; ++half) {
    for (int line = 0; line < Pairs::kLines; ++line) {
      const int64_t key = half * kBlockRows + line * Pairs::kPerLine * 2;
      for (int g = 0; g < kGroups; ++g) {
        typename V::Words words[Pairs::kPerLine];
        Pairs::load(codes + (g * (kKvTile / kBlockRows) + half) * kTileBytes, line, words);
        for (int i = 0; i < Pairs::kPerLine; ++i) {
          for (int m = 0; m < kRows; ++m) {
            auto& total = sum[m][g][i % kChains];
            total = V::add_pair(total, words[i], w + m * kKvTile + key + 2 * i);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      auto total = sum[m][g][0];
      if constexpr (kChains == 2) total = V::add_sums(total, sum[m][g][1]);
      const auto centred = V::sub(V::pair_to_f32(total), V::broadcast(offsets[m]));
      float* target = out + m * padded_dim + g * kLanes;
      const auto kept = V::mul(V::load(target), V::broadcast(correction[m]));
      V::store(target, V::fma(centred, V::broadcast(factors[m]), kept));
    }
  }
}

// w of kRows rows in one block of dims, and sum(w).
template <class V, int kRows>
void weights_times_scales(const int16_t* weights, const int16_t* scales, int16_t* w, float* sums) {
  static constexpr int16_t kOnes[2] = {1, 1};
  for (int m = 0; m < kRows; ++m) {
    auto sum = V::pair_zero();
    for (int64_t j = 0; j < kKvTile; j += 2 * kLanes) {
      const auto product = V::mul_words(V::load_words(weights + m * kKvTile + j), V::load_words(scales + j));
      V::store_words(w + m * kKvTile + j, product);
      sum = V::add_pair(sum, product, kOnes);
    }
    sums[m] = V::reduce_add(V::pair_to_f32(sum));
  }
}

// state.out of rows that see the same keys of a page, whose value scales are loaded.
template <class V, int kBits>
void weigh_codes(const AttendTile& tile, const PageRows& rows, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kTileBytes = kBlockRows * kLanes * kBits / 8;
  constexpr int64_t kGroupBytes = kKvTile / kBlockRows * kTileBytes;
  for_even_blocks<V::kCodeRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    alignas(64) int16_t w[kRows * kKvTile];
    float factors[kRows], offsets[kRows];
    for (int64_t d = 0; d < tile.padded_dim; d += kBlockRows) {
      const int64_t b = d / kBlockRows;
      weights_times_scales<V, kRows>(tile.weights + row * kKvTile, tile.value_scales + b * kKvTile, w, offsets);
      for (int m = 0; m < kRows; ++m) {
        factors[m] = tile.value_units[b] * tile.take[row + m];
        offsets[m] *= zero_point(kBits);
      }
      const int64_t first = d / kLanes * kGroupBytes;
      if (row == rows.row_begin) {
        prefetch_bytes<V>(rows.next.values + 4 * b * kAheadBytes<kBits>, 4 * kAheadBytes<kBits>);
      }
      const auto weigh = [&]<int kGroups>(int64_t group) {
        weigh_codes_block<V, kBits, kRows, kGroups>(w, rows.page.values + first + group * kGroupBytes,
                                                    tile.correction + row, factors, offsets, tile.padded_dim,
                                                    tile.state.out + row * tile.padded_dim + d + group * kLanes);
      };
      if (d + kLanes == tile.padded_dim) {
        weigh.template operator()<1>(0);
      } else if constexpr (kRows > V::kCodeRows / 2) {
        weigh.template operator()<1>(0);
        weigh.template operator()<1>(1);
      } else {
        weigh.template operator()<2>(0);
      }
    }
  });
}

}  // namespace ropewalk
