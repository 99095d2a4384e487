// Row-wise kernels of feed-forward blocks: activations, gates, and which experts a row goes to.
#pragma once

#include "functions.inl.hpp"
#include "ropewalk/limits.hpp"

namespace ropewalk {

// out = f(x), or f(gate) * up
template <class V>
void activate(const ActivateArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for_activation(a.activation, [&]<Activation kActivation>() {
    for (int64_t t = row_begin; t < row_end; ++t) {
      const float* x = a.x + t * a.x_stride;
      for (int64_t i = 0; i < a.size; i += kLanes) {
        const int64_t count = a.size - i < kLanes ? a.size - i : kLanes;
        auto y = activated<V, kActivation>(V::load_partial(x + i, count));
        if (a.gated) y = V::mul(y, V::load_partial(x + a.size + i, count));
        V::store_partial(a.out + t * a.size + i, y, count);
      }
    }
  });
}

// out = sigmoid(gate) * x
template <class V>
void sigmoid_mul(const SigmoidMulArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    const auto factor = sigmoid_f32<V>(V::broadcast(a.gate[t * a.gate_stride]));
    for (int64_t i = 0; i < a.size; i += kLanes) {
      const int64_t count = a.size - i < kLanes ? a.size - i : kLanes;
      V::store_partial(a.out + t * a.size + i, V::mul(factor, V::load_partial(a.x + t * a.x_stride + i, count)), count);
    }
  }
}

// The largest of the logits that are not yet chosen, the first of equal ones; where all that are left are NaN, the first
// of these: there are always top_k different experts.
static inline int64_t next_expert(const float* logits, int64_t num_experts, const uint8_t* chosen) {
  int64_t best = -1;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (chosen[e] == 0 && (best < 0 || logits[e] > logits[best])) best = e;
  }
  return best;
}

// exp(logit - largest) of all experts into `shares`, zero past them; returns their sum.
template <class V>
float exponentials(const float* logits, int64_t num_experts, float* shares) {
  auto highest = V::broadcast(logits[0]);
  for (int64_t e = 0; e < num_experts; e += kLanes) {
    const int64_t count = num_experts - e < kLanes ? num_experts - e : kLanes;
    const auto lanes = V::load_partial(logits + e, count);
    highest = V::max(highest, V::select_range(lanes, highest, 0, count));
  }
  const auto largest = V::broadcast(V::reduce_max(highest));
  auto total = V::zero();
  for (int64_t e = 0; e < num_experts; e += kLanes) {
    const int64_t count = num_experts - e < kLanes ? num_experts - e : kLanes;
    const auto power = exp_f32<V>(V::sub(V::load_partial(logits + e, count), largest));
    const auto share = V::select_range(power, V::zero(), 0, count);
    V::store(shares + e, share);
    total = V::add(total, share);
  }
  return V::reduce_add(total);
}

template <class V>
void route(const RouteArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  alignas(64) float shares[kMostExperts];
  uint8_t chosen[kMostExperts];
  for (int64_t t = row_begin; t < row_end; ++t) {
    const float* logits = a.logits + t * a.logits_stride;
    const float total = exponentials<V>(logits, a.num_experts, shares);
    for (int64_t e = 0; e < a.num_experts; ++e) chosen[e] = 0;
    float kept = 0.0f;
    for (int64_t i = 0; i < a.top_k; ++i) {
      const int64_t expert = next_expert(logits, a.num_experts, chosen);
      chosen[expert] = 1;
      kept += shares[expert];
    }
    // A NaN may hide from the largest logit: every share of such a row is NaN.
    float poison = 0.0f;
    for (int64_t e = 0; e < a.num_experts; ++e) poison += logits[e] - logits[e];
    const float divisor = (a.normalised ? kept : total) + poison;
    float* numbers = a.out + t * 2 * a.top_k;
    int64_t place = 0;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      if (chosen[e] == 0) continue;
      numbers[place] = static_cast<float>(e);
      numbers[a.top_k + place++] = shares[e] / divisor;
    }
  }
}

// out = sum over i of share[i] * y[place[i]], in order
template <class V>
void combine(const CombineArgs& a, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t t = row_begin; t < row_end; ++t) {
    const int32_t* places = a.places + t * a.top_k;
    const float* shares = a.shares + t * a.shares_stride;
    for (int64_t i = 0; i < a.size; i += kLanes) {
      const int64_t count = a.size - i < kLanes ? a.size - i : kLanes;
      auto sum = V::zero();
      for (int64_t k = 0; k < a.top_k; ++k) {
        sum = V::fma(V::broadcast(shares[k]), V::load_partial(a.y + places[k] * a.size + i, count), sum);
      }
      V::store_partial(a.out + t * a.size + i, sum, count);
    }
  }
}

}  // namespace ropewalk
