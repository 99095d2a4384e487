// The limits of a processor, for whoever wants to see how close a kernel comes to them: reading memory, and products of
// the kinds that the kernels are made of, on operands that stay in registers.
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// Sums that do not wait for each other: more than the cycles that one product takes, times products a cycle.
static constexpr int kProbeChains = 12;

// The sum of num_floats floats, a multiple of 64: it takes as long as reading them.
template <class V>
float probe_read(const float* floats, int64_t num_floats) noexcept {
  typename V::F32 sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i < num_floats; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sum[j] = V::add(sum[j], V::load(floats + i + j * kLanes));
  }
  return V::reduce_add(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
}

// `steps` times kProbeChains products of 16 lanes with as many sums; returns the operations, a product and a sum being
// two.  operands: [2][4], which a step uses in turn, so that no compiler computes the sums ahead.
template <class V>
int64_t probe_int8(int64_t steps, const int8_t* operands, float* out) {
  using Dot = typename V::template Dot<8>;
  typename Dot::Sum sum[kProbeChains];
  for (auto& part : sum) part = Dot::zero();
  const auto codes = Dot::first_half(reinterpret_cast<const uint8_t*>(out), 0);
  for (int64_t i = 0; i < steps; ++i) {
    const auto values = V::broadcast_quad(operands + i % 2 * 4);
    for (auto& part : sum) part = Dot::add(part, codes, values);
  }
  auto total = V::zero();
  for (auto& part : sum) total = V::add(total, Dot::to_f32(part));
  V::store(out, total);
  return steps * kProbeChains * kLanes * 8;
}

template <class V>
int64_t probe_f32(int64_t steps, float* out) {
  typename V::F32 sum[kProbeChains];
  for (auto& part : sum) part = V::zero();
  const auto factor = V::load(out);
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& part : sum) part = V::fma(factor, factor, part);
  }
  auto total = V::zero();
  for (auto& part : sum) total = V::add(total, part);
  V::store(out, total);
  return steps * kProbeChains * kLanes * 2;
}

template <class V>
int64_t probe_products(ProbeKind kind, int64_t steps, const int8_t* operands, float* out) noexcept {
  return kind == ProbeKind::int8 ? probe_int8<V>(steps, operands, out) : probe_f32<V>(steps, out);
}

}  // namespace ropewalk
