// Where a page has the keys and values of a head, and their elements where they are floats.  Layouts in
// native/README.md, "Pages of keys and values".
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// The keys and the values of one head in a page: floats, or codes with their scales behind them.
struct HeadPage {
  uint8_t* keys;
  uint8_t* values;
};

static inline HeadPage head_page(const KvView& kv, int64_t head, int64_t page) {
  const int64_t keys = key_bytes(kv.keys, kv.head_dim);
  uint8_t* base = kv.pages[page] + kv.offset + head * (keys + value_bytes(kv.values, kv.head_dim));
  return {base, base + keys};
}

// The last positions as they are kept besides the codes: pages of f16.
static inline KvView recent_view(const KvView& kv) {
  return {KvType::f16, KvType::f16, kv.num_heads, kv.head_dim, kv.recent_pages, kv.recent_offset, 0, nullptr, 0};
}

// (2^b - 1) / 2: a value is scale * (code - zero), so the codes cover a symmetric range, all of them used.
static constexpr float zero_point(int bits) { return static_cast<float>((1 << bits) - 1) / 2.0f; }

// Calls visit.operator()<bits>() with the bits of a coded type.
template <class Visit>
void for_bits(KvType type, Visit visit) {
  switch (type) {
    case KvType::q8: return visit.template operator()<8>();
    case KvType::q6: return visit.template operator()<6>();
    case KvType::q4: return visit.template operator()<4>();
    default: return;
  }
}

// Element access for floats: f16 is stored rounded to nearest even.
template <class V, KvType kType>
struct KvElement;

template <class V>
struct KvElement<V, KvType::f32> {
  using Stored = float;
  static typename V::F32 load(const float* p) { return V::load(p); }
  static void store(float* p, typename V::F32 v) { V::store(p, v); }
};

template <class V>
struct KvElement<V, KvType::f16> {
  using Stored = uint16_t;
  static typename V::F32 load(const uint16_t* p) { return V::load_f16(p); }
  static void store(uint16_t* p, typename V::F32 v) { V::store_f16(p, v); }
};

}  // namespace ropewalk
