// Keys and values of new rows into the pages, and of rows that move to other positions.
#pragma once

#include "kv_codes.inl.hpp"
#include "rows.inl.hpp"

namespace ropewalk {

// x: [D] to lane `place` of the K tiles.
template <class V, KvType kType>
void put_float_key(uint8_t* keys, int64_t head_dim, int64_t place, const float* x) {
  using Element = KvElement<V, kType>;
  using Stored = typename Element::Stored;
  Stored* lane = reinterpret_cast<Stored*>(keys) + place / kLanes * kLanes * head_dim + place % kLanes;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t count = head_dim - d < kLanes ? head_dim - d : kLanes;
    Stored lanes[kLanes];
    Element::store(lanes, V::load_partial(x + d, count));
    for (int64_t i = 0; i < count; ++i) lane[(d + i) * kLanes] = lanes[i];
  }
}

template <class V, KvType kType>
void put_float_value(uint8_t* values, int64_t head_dim, int64_t place, const float* x) {
  using Element = KvElement<V, kType>;
  auto* row = reinterpret_cast<typename Element::Stored*>(values) + place * round_up(head_dim, kLanes);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Element::store(row + d, V::load_partial(x + d, head_dim - d < kLanes ? head_dim - d : kLanes));
  }
}

template <class V>
void put_key(KvType type, uint8_t* keys, int64_t head_dim, int64_t place, const float* x, CodedRow& coded) {
  if (type == KvType::f32) return put_float_key<V, KvType::f32>(keys, head_dim, place, x);
  if (type == KvType::f16) return put_float_key<V, KvType::f16>(keys, head_dim, place, x);
  code_row<V>(x, head_dim, type, coded);
  put_keys(keys, type, head_dim, place, coded);
}

template <class V>
void put_value(KvType type, uint8_t* values, int64_t head_dim, int64_t place, const float* x, CodedRow& coded) {
  if (type == KvType::f32) return put_float_value<V, KvType::f32>(values, head_dim, place, x);
  if (type == KvType::f16) return put_float_value<V, KvType::f16>(values, head_dim, place, x);
  code_row<V>(x, head_dim, type, coded);
  put_values(values, type, head_dim, place, coded);
}

template <class V>
void append_to(const AppendArgs& a, const KvView& kv, int64_t head, CodedRow& coded) {
  for (int64_t t = 0; t < a.num_rows; ++t) {
    const HeadPage page = head_page(kv, head, (a.start + t) / kKvTile);
    const int64_t place = (a.start + t) % kKvTile;
    put_key<V>(kv.keys, page.keys, kv.head_dim, place, a.k + t * a.k_stride + head * kv.head_dim, coded);
    put_value<V>(kv.values, page.values, kv.head_dim, place, a.v + t * a.v_stride + head * kv.head_dim, coded);
  }
}

template <class V>
void append(const AppendArgs& a, int64_t head_begin, int64_t head_end) noexcept {
  CodedRow coded;
  for (int64_t head = head_begin; head < head_end; ++head) {
    append_to<V>(a, a.kv, head, coded);
    if (a.kv.recent > 0) append_to<V>(a, recent_view(a.kv), head, coded);
  }
}

// The key at a place of a page as it was before it was written: [D rounded up to 32] f32.
template <class V, KvType kType>
void take_float_key(const uint8_t* keys, int64_t head_dim, int64_t place, float* row) {
  using Element = KvElement<V, kType>;
  using Stored = typename Element::Stored;
  const Stored* lane = reinterpret_cast<const Stored*>(keys) + place / kLanes * kLanes * head_dim + place % kLanes;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Stored lanes[kLanes] = {};
    for (int64_t i = 0; i < kLanes && d + i < head_dim; ++i) lanes[i] = lane[(d + i) * kLanes];
    V::store(row + d, Element::load(lanes));
  }
}

template <class V>
void take_key(KvType type, uint8_t* keys, int64_t head_dim, int64_t place, float* row, CodedRow& coded) {
  if (type == KvType::f32) return take_float_key<V, KvType::f32>(keys, head_dim, place, row);
  if (type == KvType::f16) return take_float_key<V, KvType::f16>(keys, head_dim, place, row);
  take_keys(keys, type, head_dim, place, coded);
  decode_row<V>(coded, head_dim, type, row);
}

// Values stay as they are: floats, or codes and scales.
static inline void move_value(KvType type, uint8_t* source, int64_t source_place, uint8_t* target, int64_t target_place,
                              int64_t head_dim, CodedRow& coded) {
  if (code_bits(type) != 0) {
    take_values(source, type, head_dim, source_place, coded);
    put_values(target, type, head_dim, target_place, coded);
    return;
  }
  const int64_t row_bytes = value_bytes(type, head_dim) / kKvTile;
  __builtin_memmove(target + target_place * row_bytes, source + source_place * row_bytes,
                    static_cast<size_t>(row_bytes));
}

// A key that is not turned stays as it is, code for code.
template <class V>
void move_key(KvType type, uint8_t* source, int64_t source_place, uint8_t* target, int64_t target_place,
              int64_t head_dim, float* row, CodedRow& coded) {
  if (code_bits(type) == 0) {
    take_key<V>(type, source, head_dim, source_place, row, coded);
    put_key<V>(type, target, head_dim, target_place, row, coded);
    return;
  }
  take_keys(source, type, head_dim, source_place, coded);
  put_keys(target, type, head_dim, target_place, coded);
}

template <class V>
void move_rows(const MoveArgs& a, int64_t item_begin, int64_t item_end) noexcept {
  alignas(64) float row[kMostHeadDim];
  CodedRow coded;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t head = item % a.source.num_heads, instance = item / a.source.num_heads;
    const int64_t table = a.tables[instance];
    KvView source = a.source, target = a.target;
    source.offset += instance * a.instance_bytes;
    target.offset += instance * a.instance_bytes;
    const int64_t d_size = source.head_dim;
    for (int64_t t = 0; t < a.num_rows; ++t) {
      const int64_t from = a.source_start + t, to = a.target_start + t;
      const HeadPage old_page = head_page(source, head, from / kKvTile);
      const HeadPage new_page = head_page(target, head, to / kKvTile);
      if (table < 0) {
        move_key<V>(source.keys, old_page.keys, from % kKvTile, new_page.keys, to % kKvTile, d_size, row, coded);
      } else {
        const int64_t angles = (table * a.num_rows + t) * a.half;
        take_key<V>(source.keys, old_page.keys, d_size, from % kKvTile, row, coded);
        rotate_head<V>(row, a.cos + angles, a.sin + angles, a.half);
        put_key<V>(target.keys, new_page.keys, d_size, to % kKvTile, row, coded);
      }
      move_value(source.values, old_page.values, from % kKvTile, new_page.values, to % kKvTile, d_size, coded);
    }
  }
}

}  // namespace ropewalk
