// Attention over the pages of keys and values: online softmax in ranges of 512 keys that are put together in order, at
// fixed positions (Dao et al. 2022, arXiv:2205.14135): a row's result does not depend on which rows are computed with
// it, how the prompt was cut into chunks, or the threads.
#pragma once

#include "attention_codes.inl.hpp"
#include "attention_floats.inl.hpp"
#include "attention_pairs.inl.hpp"
#include "kv_codes.inl.hpp"
#include "softmax.inl.hpp"

namespace ropewalk {

// Above this many rows an f16 tile is widened once instead of once per block of rows.
static constexpr int64_t kWidenRows = 16;

template <class V>
void widen(const uint8_t* halves, int64_t count, float* out) {
  const auto* p = reinterpret_cast<const uint16_t*>(halves);
  for (int64_t i = 0; i < count; i += kLanes) V::store(out + i, V::load_f16(p + i));
}

// tile.scores of some rows over a page, scaled.
template <class V>
void score_page(const AttendTile& tile, const KvView& kv, Compute compute, const PageRows& rows) {
  const int64_t begin = rows.row_begin, end = rows.row_end;
  if constexpr (V::kBf16Pairs) {
    if (in_pairs<V>(kv.keys, compute)) return score_pairs<V>(tile, rows, kv.head_dim);
  }
  const auto floats = [&]<KvType kType>(const float* q, const void* keys) {
    score_floats<V, kType>(tile, begin, end, q, keys, kv.head_dim);
  };
  if (code_bits(kv.keys) != 0) {
    for_bits(kv.keys, [&]<int kBits>() {
      if (compute == Compute::int8) return score_codes<V, kBits>(tile, rows);
      decode_keys<V, kBits>(rows.page.keys, kv.head_dim, tile.keys);
      floats.template operator()<KvType::f32>(is_rotated(kv.keys) ? tile.turned : tile.q, tile.keys);
    });
  } else if (kv.keys == KvType::f32) {
    floats.template operator()<KvType::f32>(tile.q, rows.page.keys);
  } else if (end - begin < kWidenRows) {
    prefetch_bytes<V>(rows.next.keys, key_bytes(kv.keys, kv.head_dim));
    floats.template operator()<KvType::f16>(tile.q, rows.page.keys);
  } else {
    widen<V>(rows.page.keys, kKvTile * kv.head_dim, tile.keys);
    floats.template operator()<KvType::f32>(tile.q, tile.keys);
  }
}

// Weights and weighted values in floats; num_keys: from the page's first, that any row sees.
template <class V>
void weigh_page(const AttendArgs& a, const AttendTile& tile, const KvView& kv, const PageRows& rows, int64_t num_keys) {
  softmax_floats<V>(a, tile, rows);
  const bool halves = kv.values == KvType::f16 && rows.row_end - rows.row_begin < kWidenRows;
  const void* values = kv.values == KvType::f32 || halves ? static_cast<const void*>(rows.page.values) : tile.values;
  if (halves) prefetch_bytes<V>(rows.next.values, value_bytes(kv.values, kv.head_dim));
  if (code_bits(kv.values) != 0) {
    for_bits(kv.values, [&]<int kBits>() {
      decode_values<V, kBits>(rows.page.values, kv.head_dim, tile.padded_dim, tile.values);
    });
  } else if (values == tile.values) {
    widen<V>(rows.page.values, num_keys * tile.padded_dim, tile.values);
  }
  // Zero times a hidden value would be NaN if the value is infinite, and the row would depend on what follows it.
  for_rows_alike(a, tile, rows, num_keys, [&](int64_t begin, int64_t end, KeyRange places) {
    if (halves) {
      weigh_floats<V, KvType::f16>(tile, begin, end, values, places);
    } else {
      weigh_floats<V, KvType::f32>(tile, begin, end, values, places);
    }
  });
}

// The same in products of pairs.
template <class V>
void weigh_paired_page(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, int64_t num_keys) {
  softmax_pairs<V>(a, tile, rows);
  const ValueHalves<V> values{reinterpret_cast<const uint16_t*>(rows.page.values), rows.next.values, tile.padded_dim,
                              num_keys};
  const auto weigh = [&](const auto& from) {
    for_rows_alike(a, tile, rows, num_keys, [&](int64_t begin, int64_t end, KeyRange places) {
      weigh_pairs<V>(tile, begin, end, from, places);
    });
  };
  if (rows.row_end - rows.row_begin <= V::kAttendRows) return weigh(values);
  weigh(paired_values<V>(tile, values));
}

// The same in integers, for coded values.
template <class V>
void weigh_coded_page(const AttendArgs& a, const AttendTile& tile, const KvView& kv, const PageRows& rows) {
  softmax_codes<V>(a, tile, rows);
  const auto* scales = reinterpret_cast<const uint16_t*>(rows.page.values + code_bytes(kv.values, kv.head_dim));
  for_rows_alike(a, tile, rows, kKvTile, [&](int64_t begin, int64_t end, KeyRange places) {
    load_value_scales<V>(tile, scales, places);
    for_bits(kv.values, [&]<int kBits>() { weigh_codes<V, kBits>(tile, rows, begin, end); });
  });
}

// tile.state with the keys [key_begin, key_end) of some pages, from the beginning of one on; rows(key): which rows of
// the tile read the page of that key.
template <class V, class Rows>
void attend_pages(const AttendArgs& a, const AttendTile& tile, const KvView& kv, int64_t key_begin, int64_t key_end,
                  Rows rows_of_page) {
  const int64_t all_end = tile_keys(a, tile).end;
  const bool integers = code_bits(kv.values) != 0 && a.compute == Compute::int8;
  for (int64_t key = key_begin; key < key_end; key += kKvTile) {
    PageRows rows{};
    rows_of_page(key, rows.row_begin, rows.row_end);
    if (rows.row_begin == rows.row_end) continue;
    const int64_t page = key / kKvTile;
    rows.page = head_page(kv, tile.head, page);
    // Past the last page of a range too: whoever computes it computes the next range after it, more often than not.
    rows.next = key + kKvTile < all_end ? head_page(kv, tile.head, page + 1) : rows.page;
    rows.first_key = key;
    score_page<V>(tile, kv, a.compute, rows);
    if (a.softcap != 0.0f) cap_scores<V>(tile, rows, a.softcap);
    const int64_t num_keys = key_end - key < kKvTile ? key_end - key : kKvTile;
    if (integers) {
      weigh_coded_page<V>(a, tile, kv, rows);
      continue;
    }
    if constexpr (V::kBf16Pairs) {
      if (in_pairs<V>(kv.values, a.compute)) {
        weigh_paired_page<V>(a, tile, rows, num_keys);
        continue;
      }
    }
    weigh_page<V>(a, tile, kv, rows, num_keys);
  }
}

// tile.state over those keys of a range that the rows see.  A row reads codes first and then the pages that it has as
// they were given: what was summed over rotated values is rotated back in between, so that a state never is.
template <class V>
void attend_keys(const AttendArgs& a, const AttendTile& tile, int64_t range) {
  for (int64_t i = 0; i < tile.num_rows * tile.padded_dim; i += kLanes) V::store(tile.state.out + i, V::zero());
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    tile.state.largest[row] = kNoScore;
    tile.state.sum[row] = 0.0f;
  }
  const KeyRange keys = tile_keys(a, tile);
  const int64_t begin = keys.begin > range * kKeyRange ? keys.begin : range * kKeyRange;
  const int64_t end = keys.end < (range + 1) * kKeyRange ? keys.end : (range + 1) * kKeyRange;
  attend_pages<V>(a, tile, a.kv, begin, end, [&](int64_t key, int64_t& row_begin, int64_t& row_end) {
    row_begin = rows_reading_recent(a, tile, key);
    row_end = tile.num_rows;
  });
  if (is_rotated(a.kv.values)) {
    for (int64_t row = rows_reading_recent(a, tile, begin); row < tile.num_rows; ++row) {
      hadamard<V>(tile.state.out + row * tile.padded_dim, a.kv.head_dim);
    }
  }
  if (rows_reading_recent(a, tile, (end - 1) / kKvTile * kKvTile) == 0) return;
  attend_pages<V>(a, tile, recent_view(a.kv), begin, end, [&](int64_t key, int64_t& row_begin, int64_t& row_end) {
    row_begin = 0;
    row_end = rows_reading_recent(a, tile, key);
  });
}

// total <- total with the keys of a later range.  A row takes in a range as it would alone: not at all if it sees none
// of its keys, and as it is if it has seen no key before.
template <class V>
void merge_range(const AttendArgs& a, const AttendTile& tile, int64_t range, const SoftmaxState& part,
                 const SoftmaxState& total) {
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const KeyRange seen = visible_keys(a, tile, row);
    if (seen.begin >= (range + 1) * kKeyRange || seen.end <= range * kKeyRange) continue;
    const bool first = seen.begin >= range * kKeyRange;
    const float largest =
        first || part.largest[row] > total.largest[row] ? part.largest[row] : total.largest[row];
    const float keep = total.largest[row] == largest ? 1.0f : V::first(exp_f32<V>(V::broadcast(total.largest[row] - largest)));
    const float take = part.largest[row] == largest ? 1.0f : V::first(exp_f32<V>(V::broadcast(part.largest[row] - largest)));
    float* out = total.out + row * tile.padded_dim;
    const float* more = part.out + row * tile.padded_dim;
    for (int64_t d = 0; d < tile.padded_dim; d += kLanes) {
      const auto value = V::load(more + d);
      V::store(out + d, first ? value : V::fma(value, V::broadcast(take), V::mul(V::load(out + d), V::broadcast(keep))));
    }
    total.sum[row] = first ? part.sum[row] : total.sum[row] * keep + part.sum[row] * take;
    total.largest[row] = largest;
  }
}

// Ask for the first page of an item; from then on each page asks for the next.
template <class V>
void prefetch_page(const KvView& kv, int64_t head, int64_t page) {
  const HeadPage first = head_page(kv, head, page);
  prefetch_bytes<V>(first.keys, key_bytes(kv.keys, kv.head_dim));
  prefetch_bytes<V>(first.values, value_bytes(kv.values, kv.head_dim));
}

// tile.q, and what the scores of coded keys are computed from.
template <class V>
void load_queries(const AttendArgs& a, const AttendTile& tile) {
  const int64_t d_size = a.kv.head_dim;
  const int bits = code_bits(a.kv.keys);
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t token = (tile.first_row + row) / tile.group;
    const int64_t query_head = tile.head * tile.group + (tile.first_row + row) % tile.group;
    const float* q = a.q + token * a.q_stride + query_head * d_size;
    float* target = tile.q + row * tile.block_dim;
    float* turned = tile.turned + row * tile.block_dim;
    for (int64_t d = 0; d < tile.block_dim; d += kLanes) {
      const int64_t count = d_size - d < 0 ? 0 : d_size - d < kLanes ? d_size - d : kLanes;
      const auto scaled = V::mul(V::load_partial(q + d, count), V::broadcast(a.scale));
      V::store(target + d, scaled);
      if constexpr (V::kBf16Pairs) V::store_bf16(tile.halves + row * tile.block_dim + d, scaled);
      if (is_rotated(a.kv.keys)) V::store(turned + d, scaled);
    }
    if (is_rotated(a.kv.keys)) hadamard<V>(turned, d_size);
    if (bits == 0 || a.compute == Compute::exact) continue;
    quantise_query<V>(tile, row, is_rotated(a.kv.keys) ? turned : target, zero_point(bits));
  }
}

template <class V>
void store_outputs(const AttendArgs& a, const AttendTile& tile, const SoftmaxState& total) {
  const int64_t d_size = a.kv.head_dim;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t token = (tile.first_row + row) / tile.group;
    const int64_t query_head = tile.head * tile.group + (tile.first_row + row) % tile.group;
    float* out = a.out + (token * a.num_query_heads + query_head) * d_size;
    // If every score is minus infinity (an infinite query or key), the result is NaN, as with softmax.
    const auto inverse = V::broadcast(total.largest[row] > kNoScore ? 1.0f / total.sum[row] : __builtin_nanf(""));
    for (int64_t d = 0; d < d_size; d += kLanes) {
      const int64_t count = d_size - d < kLanes ? d_size - d : kLanes;
      V::store_partial(out + d, V::mul(V::load(total.out + row * tile.padded_dim + d), inverse), count);
    }
  }
}

template <class V>
void attend(const AttendArgs& a, int64_t item_begin, int64_t item_end, float* scratch) noexcept {
  for (int64_t item = item_begin; item < item_end; ++item) {
    AttendTile tile = tile_of(a, item);
    float* rest = carve_scratch(tile, scratch);
    prefetch_page<V>(a.kv, tile.head, tile_keys(a, tile).begin / kKvTile);
    const SoftmaxState total = state_at(rest, kQueryRows, tile.padded_dim);
    float* second = rest + attend_part_floats(kQueryRows, a.kv.head_dim);
    const SoftmaxState part = state_at(second, kQueryRows, tile.padded_dim);
    load_queries<V>(a, tile);
    const KeyRange keys = tile_keys(a, tile);
    const int64_t first = keys.begin / kKeyRange;
    for (int64_t range = first; range * kKeyRange < keys.end; ++range) {
      tile.state = range == first ? total : part;
      attend_keys<V>(a, tile, range);
      if (range != first) merge_range<V>(a, tile, range, part, total);
    }
    store_outputs<V>(a, tile, total);
  }
}

template <class V>
void attend_range(const AttendArgs& a, int64_t item, int64_t range, float* part, float* scratch) noexcept {
  AttendTile tile = tile_of(a, item);
  carve_scratch(tile, scratch);
  tile.state = state_at(part, tile.num_rows, tile.padded_dim);
  load_queries<V>(a, tile);
  attend_keys<V>(a, tile, range);
}

template <class V>
void attend_merge(const AttendArgs& a, int64_t item, int64_t range_begin, int64_t range_end, float* parts) noexcept {
  const AttendTile tile = tile_of(a, item);
  const int64_t floats = attend_part_floats(tile.num_rows, a.kv.head_dim);
  const SoftmaxState total = state_at(parts, tile.num_rows, tile.padded_dim);
  for (int64_t range = range_begin + 1; range < range_end; ++range) {
    const float* part = parts + (range - range_begin) * floats;
    merge_range<V>(a, tile, range, state_at(const_cast<float*>(part), tile.num_rows, tile.padded_dim), total);
  }
  store_outputs<V>(a, tile, total);
}

}  // namespace ropewalk
