// The kernel table of one instruction set, from its vector verbs.
#pragma once

#include "append.inl.hpp"
#include "attention.inl.hpp"
#include "feed_forward.inl.hpp"
#include "layer_norm.inl.hpp"
#include "linear.inl.hpp"
#include "low_rank.inl.hpp"
#include "pack.inl.hpp"
#include "prepare.inl.hpp"
#include "probe.inl.hpp"
#include "round.inl.hpp"
#include "rows.inl.hpp"

namespace ropewalk {

template <class V>
constexpr KernelTable make_table(const char* name) {
  return {
      .name = name,
      .pack = &pack<V>,
      .round_rows = &round_rows<V>,
      .prepare = &prepare<V>,
      .gptq_int8 = &gptq_int8<V>,
      .gptq_exact = &gptq_exact<V>,
      .dense = &dense<V>,
      .low_rank_inner = &low_rank_inner<V>,
      .low_rank = &low_rank<V>,
      .rms_norm = &rms_norm<V>,
      .rotate = &rotate<V>,
      .layer_norm = &layer_norm<V>,
      .activate = &activate<V>,
      .sigmoid_mul = &sigmoid_mul<V>,
      .route = &route<V>,
      .combine = &combine<V>,
      .add = &add<V>,
      .embed = &embed<V>,
      .append = &append<V>,
      .move_rows = &move_rows<V>,
      .attend = &attend<V>,
      .attend_range = &attend_range<V>,
      .attend_merge = &attend_merge<V>,
      .probe_read = &probe_read<V>,
      .probe_products = &probe_products<V>,
  };
}

}  // namespace ropewalk
