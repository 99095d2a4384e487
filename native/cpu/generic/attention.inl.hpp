// The key/value cache and attention over it: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al.
// 2022, arXiv:2205.14135) over pages of 64 keys, in ranges of 512 that are put together in order, at fixed positions: a
// row's result does not depend on which rows are computed with it, how the prompt was cut into chunks, or the threads.
#pragma once

#include "ropewalk/kernels.hpp"
#include "linear.inl.hpp"
#include "rows.inl.hpp"

namespace ropewalk {

// Element access for a cache type: f16 is stored rounded to nearest even.
template <class V, FloatType kType>
struct KvElement;

template <class V>
struct KvElement<V, FloatType::f32> {
  using Stored = float;
  static typename V::F32 load(const float* p) { return V::load(p); }
  static void store(float* p, typename V::F32 v) { V::store(p, v); }
};

template <class V>
struct KvElement<V, FloatType::f16> {
  using Stored = uint16_t;
  static typename V::F32 load(const uint16_t* p) { return V::load_f16(p); }
  static void store(uint16_t* p, typename V::F32 v) { V::store_f16(p, v); }
};

// Where a page has the keys and values of one head.
template <class Stored>
struct HeadPage {
  Stored* keys;    // [4][D][16]
  Stored* values;  // [64][padded_dim]
};

template <class Stored>
static HeadPage<Stored> head_page(const KvView& kv, int64_t head, int64_t page) {
  Stored* keys =
      reinterpret_cast<Stored*>(kv.pages[page] + kv.offset) + head * kKvTile * (kv.head_dim + kv.padded_dim);
  return {keys, keys + kKvTile * kv.head_dim};
}

template <class V, FloatType kType>
void append_head(const AppendArgs& a, int64_t head) {
  using Element = KvElement<V, kType>;
  using Stored = typename Element::Stored;
  const KvView& kv = a.kv;
  const int64_t d_size = kv.head_dim;
  for (int64_t t = 0; t < a.num_rows; ++t) {
    const HeadPage<Stored> page = head_page<Stored>(kv, head, (a.start + t) / kKvTile);
    const int64_t place = (a.start + t) % kKvTile;
    const float* k = a.k + t * a.k_stride + head * d_size;
    const float* v = a.v + t * a.v_stride + head * d_size;
    Stored* key_lane = page.keys + place / kLanes * kLanes * d_size + place % kLanes;
    for (int64_t d = 0; d < d_size; d += kLanes) {
      const int64_t count = d_size - d < kLanes ? d_size - d : kLanes;
      Stored lanes[kLanes];
      Element::store(lanes, V::load_partial(k + d, count));
      for (int64_t i = 0; i < count; ++i) key_lane[(d + i) * kLanes] = lanes[i];
      Element::store(page.values + place * kv.padded_dim + d, V::load_partial(v + d, count));
    }
  }
}

template <class V>
void append(const AppendArgs& a, int64_t head_begin, int64_t head_end) noexcept {
  for (int64_t head = head_begin; head < head_end; ++head) {
    if (a.kv.type == FloatType::f16) {
      append_head<V, FloatType::f16>(a, head);
    } else {
      append_head<V, FloatType::f32>(a, head);
    }
  }
}

// The softmax of some rows so far, over the keys of one range or of all.
struct SoftmaxState {
  float* out;      // [rows][padded_dim], unnormalised
  float* largest;  // [rows] running maximum of the scores
  float* sum;      // [rows] running sum of exp(score - largest)
};

static inline SoftmaxState state_at(float* memory, int64_t num_rows, int64_t padded_dim) {
  float* largest = memory + num_rows * padded_dim;
  return {memory, largest, largest + num_rows};
}

// What one item works on: up to kQueryRows (token, head) rows of one key/value head, and its scratch.
struct AttendTile {
  int64_t head;
  int64_t num_rows;
  int64_t first_row;      // flattened: row / group = token, row % group = head within the group
  int64_t group;          // query heads per key/value head
  int64_t padded_dim;
  float* q;               // [num_rows][padded_dim], scaled
  float* keys;            // [kKvTile / 16][D][16] as f32
  float* values;          // [kKvTile][padded_dim] as f32
  float* scores;          // [num_rows][kKvTile]
  float* correction;      // [num_rows] exp(previous largest - largest) of this step
  SoftmaxState state;     // of the keys that are being walked
};

static inline AttendTile tile_of(const AttendArgs& a, int64_t item) {
  AttendTile tile{};
  const int64_t items = attend_items_per_head(a.num_rows, a.num_query_heads, a.kv.num_heads);
  tile.group = a.num_query_heads / a.kv.num_heads;
  tile.head = item / items;
  tile.first_row = item % items * kQueryRows;
  const int64_t remaining = a.num_rows * tile.group - tile.first_row;
  tile.num_rows = remaining < kQueryRows ? remaining : kQueryRows;
  tile.padded_dim = a.kv.padded_dim;
  return tile;
}

// Takes the scratch of a tile; returns what is left of it, room for two states.
static inline float* carve_scratch(AttendTile& tile, float* scratch) {
  const auto take = [&scratch](int64_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  };
  tile.q = take(kQueryRows * tile.padded_dim);
  tile.keys = take(kKvTile * tile.padded_dim);
  tile.values = take(kKvTile * tile.padded_dim);
  tile.scores = take(kQueryRows * kKvTile);
  tile.correction = take(kQueryRows);
  return scratch;
}

// The keys [begin, end) that a row sees.
struct KeyRange {
  int64_t begin, end;
};

static inline KeyRange visible_keys(const AttendArgs& a, const AttendTile& tile, int64_t row) {
  const int64_t position = a.start + (tile.first_row + row) / tile.group;
  const int64_t begin = a.window > 0 && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  return {begin, position + 1};
}

// scores[m][16 keys] = sum over d of q[m][d] * key[d][16], for kRows rows and kTiles key tiles.
template <class V, FloatType kType, int kRows, int kTiles>
void score_block(const float* q, int64_t q_stride, const typename KvElement<V, kType>::Stored* keys, int64_t head_dim,
                 float* scores) {
  typename V::F32 total[kRows][kTiles];
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) total[m][j] = V::zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    typename V::F32 key[kTiles];
    for (int j = 0; j < kTiles; ++j) key[j] = KvElement<V, kType>::load(keys + (j * head_dim + d) * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const auto value = V::broadcast(q[m * q_stride + d]);
      for (int j = 0; j < kTiles; ++j) total[m][j] = V::fma(value, key[j], total[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < kTiles; ++j) V::store(scores + m * kKvTile + j * kLanes, total[m][j]);
  }
}

// out[m] = out[m] * correction[m] + sum over keys j of p[m][j] * value[j], for kRows rows and kChunks * 16 dims.
template <class V, FloatType kType, int kRows, int kChunks>
void weigh_block(const float* p, const float* correction, const typename KvElement<V, kType>::Stored* values,
                 int64_t padded_dim, int64_t num_keys, float* out) {
  typename V::F32 total[kRows][kChunks];
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kChunks; ++c) {
      total[m][c] = V::mul(V::broadcast(correction[m]), V::load(out + m * padded_dim + c * kLanes));
    }
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    typename V::F32 value[kChunks];
    for (int c = 0; c < kChunks; ++c) value[c] = KvElement<V, kType>::load(values + j * padded_dim + c * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const auto weight = V::broadcast(p[m * kKvTile + j]);
      for (int c = 0; c < kChunks; ++c) total[m][c] = V::fma(weight, value[c], total[m][c]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kChunks; ++c) V::store(out + m * padded_dim + c * kLanes, total[m][c]);
  }
}

// Below every score that counts: the running maximum of a row that has seen no key.
static constexpr float kNoScore = -3.0e38f;

// scores -> exp(score - largest), masked; updates the running maximum, sum and correction of one row.
template <class V>
void softmax_row(const AttendTile& tile, int64_t row, int64_t first_key, KeyRange range) {
  float* scores = tile.scores + row * kKvTile;
  const int64_t begin = range.begin > first_key ? range.begin - first_key : 0;
  const int64_t end = range.end - first_key < kKvTile ? range.end - first_key : kKvTile;
  if (begin >= end) {  // nothing of this tile is visible: the row keeps its state, bit for bit
    for (int64_t j = 0; j < kKvTile; j += kLanes) V::store(scores + j, V::zero());
    tile.correction[row] = 1.0f;
    return;
  }
  const auto hidden = V::broadcast(kNoScore);
  auto highest = hidden;
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    highest = V::max(highest, V::select_range(V::load(scores + j), hidden, begin - j, end - j));
  }
  const float previous = tile.state.largest[row];
  const float candidate = V::reduce_max(highest);
  const float largest = candidate > previous ? candidate : previous;
  auto total = V::zero();
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    auto p = exp_f32<V>(V::sub(V::load(scores + j), V::broadcast(largest)));
    p = V::select_range(p, V::zero(), begin - j, end - j);
    V::store(scores + j, p);
    total = V::add(total, p);
  }
  const float correction = previous == largest ? 1.0f : V::first(exp_f32<V>(V::broadcast(previous - largest)));
  tile.state.largest[row] = largest;
  tile.correction[row] = correction;
  tile.state.sum[row] = tile.state.sum[row] * correction + V::reduce_add(total);
}

// weigh_block over rows [row_begin, row_end), all dims, and keys [key_begin, key_end) of the tile.
template <class V, FloatType kType>
void weigh_rows(const AttendTile& tile, int64_t row_begin, int64_t row_end,
                const typename KvElement<V, kType>::Stored* values, int64_t key_begin, int64_t key_end) {
  const auto* first = values + key_begin * tile.padded_dim;
  const int64_t num_keys = key_end - key_begin;
  for_blocks<V::kAttendRows>(row_begin, row_end, [&]<int kRows>(int64_t row) {
    constexpr int kChunks = kRows == V::kAttendRows ? 2 : 4;
    const float* p = tile.scores + row * kKvTile + key_begin;
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

template <class V, FloatType kType>
void kv_step(const AttendArgs& a, const AttendTile& tile, const typename KvElement<V, kType>::Stored* keys,
             const typename KvElement<V, kType>::Stored* values, int64_t first_key, int64_t num_keys) {
  const int64_t d_size = a.kv.head_dim;
  for_blocks<V::kAttendRows>(0, tile.num_rows, [&]<int kRows>(int64_t row) {
    constexpr int kTiles = kRows == V::kAttendRows ? 2 : 4;
    for (int64_t j = 0; j < kKvTile; j += kTiles * kLanes) {
      score_block<V, kType, kRows, kTiles>(tile.q + row * tile.padded_dim, tile.padded_dim, keys + j * d_size, d_size,
                                           tile.scores + row * kKvTile + j);
    }
  });
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    softmax_row<V>(tile, row, first_key, visible_keys(a, tile, row));
  }
  const bool all_visible = visible_keys(a, tile, tile.num_rows - 1).begin <= first_key &&
                           visible_keys(a, tile, 0).end >= first_key + num_keys;
  if (all_visible) {
    weigh_rows<V, kType>(tile, 0, tile.num_rows, values, 0, num_keys);
    return;
  }
  // The rows of one token see the same keys, and only those are weighed: zero times a hidden value would be NaN if the
  // value is infinite, and the row would depend on what follows it.
  for (int64_t row = 0; row < tile.num_rows;) {
    const int64_t next_token = ((tile.first_row + row) / tile.group + 1) * tile.group - tile.first_row;
    const int64_t row_end = next_token < tile.num_rows ? next_token : tile.num_rows;
    const KeyRange range = visible_keys(a, tile, row);
    const int64_t begin = range.begin > first_key ? range.begin - first_key : 0;
    const int64_t end = range.end - first_key < num_keys ? range.end - first_key : num_keys;
    if (begin < end) weigh_rows<V, kType>(tile, row, row_end, values, begin, end);
    row = row_end;
  }
}

// Above this many rows an f16 tile is widened once instead of once per block of rows.
static constexpr int64_t kWidenRows = 16;

template <class V, FloatType kType>
void attend_typed(const AttendArgs& a, const AttendTile& tile, int64_t key_begin, int64_t key_end) {
  using Element = KvElement<V, kType>;
  const KvView& kv = a.kv;
  for (int64_t key = key_begin; key < key_end; key += kKvTile) {
    const int64_t num_keys = key_end - key < kKvTile ? key_end - key : kKvTile;
    const auto page = head_page<const typename Element::Stored>(kv, tile.head, key / kKvTile);
    if (kType == FloatType::f32 || tile.num_rows < kWidenRows) {
      kv_step<V, kType>(a, tile, page.keys, page.values, key, num_keys);
      continue;
    }
    for (int64_t i = 0; i < kKvTile * kv.head_dim; i += kLanes) V::store(tile.keys + i, Element::load(page.keys + i));
    for (int64_t i = 0; i < num_keys * kv.padded_dim; i += kLanes) {
      V::store(tile.values + i, Element::load(page.values + i));
    }
    kv_step<V, FloatType::f32>(a, tile, tile.keys, tile.values, key, num_keys);
  }
}

// The keys that any row of a tile sees, from the beginning of a page on.
static inline KeyRange tile_keys(const AttendArgs& a, const AttendTile& tile) {
  return {visible_keys(a, tile, 0).begin / kKvTile * kKvTile, visible_keys(a, tile, tile.num_rows - 1).end};
}

// tile.state over those keys of a range that the rows see.
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
  if (a.kv.type == FloatType::f16) {
    attend_typed<V, FloatType::f16>(a, tile, begin, end);
  } else {
    attend_typed<V, FloatType::f32>(a, tile, begin, end);
  }
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

template <class V>
void load_queries(const AttendArgs& a, const AttendTile& tile) {
  const int64_t d_size = a.kv.head_dim;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t token = (tile.first_row + row) / tile.group;
    const int64_t query_head = tile.head * tile.group + (tile.first_row + row) % tile.group;
    const float* q = a.q + token * a.q_stride + query_head * d_size;
    for (int64_t d = 0; d < tile.padded_dim; d += kLanes) {
      const int64_t count = d_size - d < kLanes ? d_size - d : kLanes;
      V::store(tile.q + row * tile.padded_dim + d, V::mul(V::load_partial(q + d, count), V::broadcast(a.scale)));
    }
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
    const SoftmaxState total = state_at(rest, kQueryRows, tile.padded_dim);
    const SoftmaxState part = state_at(rest + attend_part_floats(kQueryRows, a.kv.head_dim), kQueryRows, tile.padded_dim);
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
