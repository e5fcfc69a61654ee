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

// Where the slope can be had from the output alone, nothing but the output needs to be kept for the backward pass.
inline constexpr bool slope_needs_input(Activation a) { return a == Activation::silu || a == Activation::gelu; }

// d activate / dv from a = activate(v); for silu and gelu the argument is v itself.
template <Activation A, class T>
FK_INLINE T slope_from_kept(T a) {
  if constexpr (slope_needs_input(A)) return activate_slope<A>(a);
  if constexpr (A == Activation::relu) return a > T(0) ? T(1) : T(0);
  if constexpr (A == Activation::tanh) return (T(1) - a) * (T(1) + a);
  if constexpr (A == Activation::elu) return a > T(0) ? T(1) : a + T(1);
  if constexpr (A == Activation::leaky_relu) return a > T(0) ? T(1) : leaky_slope<T>;
  if constexpr (A == Activation::sigmoid) return a * (T(1) - a);
  if constexpr (A == Activation::softplus) return -math::expm1(-a);
  return T(1);
}

// Calls f.template operator()<A>() for an activation named at run time.
template <class F>
decltype(auto) dispatch_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
    case Activation::elu:
      return f.template operator()<Activation::elu>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::leaky_relu:
      return f.template operator()<Activation::leaky_relu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::softplus:
      return f.template operator()<Activation::softplus>();
    default:
      return f.template operator()<Activation::identity>();
  }
}

}  // namespace fk
