// Functions of 16 numbers: activations, and the bound of a soft cap.
#pragma once

#include "rows.inl.hpp"

namespace ropewalk {

// 1 / (1 + exp(-x))
template <class V>
typename V::F32 sigmoid_f32(typename V::F32 x) {
  const auto one = V::broadcast(1.0f);
  return V::div(one, V::add(one, exp_f32<V>(V::sub(V::zero(), x))));
}

// tanh(x) = e / (e + 2), e = exp(2 x) - 1 = 2^n (e^r - 1) + (2^n - 1), n = round(2 x / ln 2): no digits are lost near 0.
// An infinity gives NaN: scores that are not numbers must not look like scores.
template <class V>
typename V::F32 tanh_f32(typename V::F32 x) {
  const auto one = V::broadcast(1.0f);
  const auto y = V::max(V::broadcast(-40.0f), V::min(V::broadcast(40.0f), V::add(x, x)));
  typename V::F32 n, r;
  split_by_ln2<V>(y, n, r);
  const auto small = V::fma(V::mul(exp_rest<V>(r), r), r, r);  // e^r - 1
  const auto power = V::mul_pow2(one, n);
  const auto e = V::fma(power, small, V::sub(power, one));
  return V::add(V::div(e, V::add(e, V::broadcast(2.0f))), V::sub(x, x));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), Phi the normal distribution: both sides of 0 keep their digits.
// Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + 0.21 a), P fitted to 1.4e-8 of the value for a up to 13, where the
// exponential has vanished.
template <class V>
typename V::F32 gelu_f32(typename V::F32 x) {
  constexpr float kP[] = {-0.07208427786827087f, 0.2857018709182739f,  -0.3347145915031433f,
                          0.35465237498283386f,  -0.09769011288881302f, 0.12655410170555115f,
                          0.06873587518930435f,  0.08513759821653366f,  0.08370717614889145f};
  const auto one = V::broadcast(1.0f);
  const auto a = V::abs(x);
  const auto t = V::div(one, V::fma(a, V::broadcast(0.21f), one));
  auto p = V::broadcast(kP[0]);
  for (int i = 1; i < 9; ++i) p = V::fma(p, t, V::broadcast(kP[i]));
  const auto power = exp_f32<V>(V::mul(V::mul(x, x), V::broadcast(-0.5f)));
  return V::fnma(V::mul(a, power), V::mul(p, t), V::max(V::zero(), x));
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
typename V::F32 gelu_tanh_f32(typename V::F32 x) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  const auto cube = V::mul(V::mul(x, x), V::broadcast(kTwice * 0.044715f));
  return V::mul(x, sigmoid_f32<V>(V::mul(x, V::add(cube, V::broadcast(kTwice)))));
}

template <class V, Activation kActivation>
typename V::F32 activated(typename V::F32 x) {
  if constexpr (kActivation == Activation::gelu) return gelu_f32<V>(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh_f32<V>(x);
  return V::mul(x, sigmoid_f32<V>(x));
}

// Calls visit.operator()<activation>().
template <class Visit>
void for_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::silu: return visit.template operator()<Activation::silu>();
    case Activation::gelu: return visit.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return visit.template operator()<Activation::gelu_tanh>();
  }
}

}  // namespace ropewalk
