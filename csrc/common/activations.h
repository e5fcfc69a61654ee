// The activation functions of the conditioner networks and their derivatives.
#pragma once
#include "common/math.h"

namespace fk {

enum class Activation : int { identity, relu, tanh, elu, silu, leaky_relu, gelu, sigmoid, softplus, count };

template <class T>
inline constexpr T leaky_slope = T(0.01);  // torch.nn.LeakyReLU's default

template <Activation A, class T>
FK_INLINE T activate(T v) {
  if constexpr (A == Activation::relu) return v < T(0) ? T(0) : v;  // keeps a NaN
  if constexpr (A == Activation::tanh) return math::tanh(v);
  if constexpr (A == Activation::elu) return v > T(0) ? v : math::expm1(v);
  if constexpr (A == Activation::silu) return v * math::sigmoid(v);
  if constexpr (A == Activation::leaky_relu) return v > T(0) ? v : leaky_slope<T> * v;
  if constexpr (A == Activation::gelu) return v * math::normal_cdf(v);
  if constexpr (A == Activation::sigmoid) return math::sigmoid(v);
  if constexpr (A == Activation::softplus) return math::softplus(v);
  return v;
}

// d activate / dv, from v: silu and gelu are not monotonic, so the output would not do.
template <Activation A, class T>
FK_INLINE T activate_slope(T v) {
  if constexpr (A == Activation::relu) return v > T(0) ? T(1) : T(0);
  if constexpr (A == Activation::tanh) {
    const T t = math::tanh(v);
    return (T(1) - t) * (T(1) + t);
  }
  if constexpr (A == Activation::elu) return v > T(0) ? T(1) : math::exp(v);
  if constexpr (A == Activation::silu) {
    const T s = math::sigmoid(v);
    return s * (T(1) + v * (T(1) - s));
  }
  if constexpr (A == Activation::leaky_relu) return v > T(0) ? T(1) : leaky_slope<T>;
  if constexpr (A == Activation::gelu)
    return math::normal_cdf(v) + v * T(0.3989422804014327) * math::exp(T(-0.5) * v * v);
  if constexpr (A == Activation::sigmoid) {
    const T s = math::sigmoid(v);
    return s * (T(1) - s);
  }
  if constexpr (A == Activation::softplus) return math::sigmoid(v);
  return T(1);
}

}  // namespace fk
