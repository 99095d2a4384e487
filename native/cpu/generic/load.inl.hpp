// Reading weights of any stored float type as f32 and packed codes of any width, and asking for bytes ahead of their
// use.
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// `count` elements from `index` on; lanes past them are zero.
template <class V, FloatType kType>
typename V::F32 load_weight(const void* weight, int64_t index, int64_t count) {
  if constexpr (kType == FloatType::f32) {
    const float* p = static_cast<const float*>(weight) + index;
    return count == kLanes ? V::load(p) : V::load_partial(p, count);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(weight) + index;
    uint16_t padded[kLanes] = {};
    if (count != kLanes) {
      for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
      p = padded;
    }
    return kType == FloatType::f16 ? V::load_f16(p) : V::load_bf16(p);
  }
}

// Calls visit.operator()<bits>() for the width of packed codes.
template <class Visit>
void for_code_bits(int32_t code_bits, Visit visit) {
  switch (code_bits) {
    case 2: return visit.template operator()<2>();
    case 3: return visit.template operator()<3>();
    case 4: return visit.template operator()<4>();
    default: return visit.template operator()<8>();
  }
}

// Into the second cache: more requests are under way at once than into the first (scripts/bench/attention.py).
template <class V>
void prefetch_bytes(const uint8_t* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) V::prefetch_far(p + i);
}

}  // namespace ropewalk
