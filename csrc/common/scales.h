// The named scale laws: sigma as a function of an unconstrained u. The table of flowkernels/scales.py, in C++.
//
//   exp       exp(gain u)                          a = gain
//   softplus  softplus(u + offset) + floor         a = offset, b = floor
//   sigmoid   sigmoid(u + offset) + floor          a = offset, b = floor
//   tanh      exp(bound tanh(u / bound))           a = bound
//   atan      exp(bound 0.636 atan(u / bound))     a = bound
//   softclip  log sigma = u / (1 + |u / log bound|)  a = bound
//   clip      exp(clamp(u, lo, hi))                a = lo, b = hi, c = 1: gradient passes through the clamp, 0: stops
//   unit      1
//
// log sigma comes from u wherever a rounded sigma would not do. Which formula holds is a select over finished numbers,
// not a branch: a loop over lanes stays one of vectors.
#pragma once
#include "common/math.h"

namespace fk {

enum class Law : int { exp, softplus, sigmoid, tanh, atan, softclip, clip, unit, count };

template <class T>
struct LawParameters {
  T a, b, c;
};

// FrEIA's factor: 0.636 ~ 2/pi makes the atan law saturate at +-bound.
template <class T>
inline constexpr T atan_factor = T(0.636);

template <class T>
struct Scale {
  T sigma, log_sigma;
};

// Without a floor, softplus(v) and its rate underflow; from here on down log softplus(v) is v, to half an ulp.
template <class T>
FK_INLINE bool softplus_is_exp(T v, const LawParameters<T>& p) {
  return p.b == T(0) && v < (sizeof(T) == 4 ? T(-16) : T(-36));
}

template <Law L, class T>
FK_INLINE Scale<T> scale_of(T u, const LawParameters<T>& p) {
  if constexpr (L == Law::softplus) {
    const T v = u + p.a;
    const T sigma = math::softplus(v) + p.b;
    const T log_sigma = math::log(sigma);
    return {sigma, softplus_is_exp(v, p) ? v : log_sigma};
  } else if constexpr (L == Law::sigmoid) {
    const T v = u + p.a;
    const T sigma = math::sigmoid(v) + p.b;
    return {sigma, p.b > T(0) ? math::log(sigma) : math::log_sigmoid(v)};
  } else if constexpr (L == Law::unit) {
    return {T(1), T(0)};
  } else {
    T s;
    if constexpr (L == Law::exp) s = p.a * u;
    if constexpr (L == Law::tanh) s = p.a * math::tanh(u / p.a);
    if constexpr (L == Law::atan) s = p.a * atan_factor<T> * math::atan(u / p.a);
    // p.c carries 1 / |log bound|, worked out once by the host.
    if constexpr (L == Law::softclip) s = u / (T(1) + math::abs(u) * p.c);
    // Written so that a NaN stays a NaN.
    if constexpr (L == Law::clip) s = u < p.a ? p.a : (u > p.b ? p.b : u);
    return {math::exp(s), s};
  }
}

// d log sigma / du.
template <Law L, class T>
FK_INLINE T scale_slope(T u, const LawParameters<T>& p) {
  if constexpr (L == Law::exp) return p.a;
  if constexpr (L == Law::softplus) {
    const T v = u + p.a;
    const T rate = math::sigmoid(v) / (math::softplus(v) + p.b);
    return softplus_is_exp(v, p) ? T(1) : rate;
  }
  if constexpr (L == Law::sigmoid) {
    const T v = u + p.a, s = math::sigmoid(v), complement = math::sigmoid(-v);
    return p.b > T(0) ? s * complement / (s + p.b) : complement;
  }
  if constexpr (L == Law::tanh) {
    const T t = math::tanh(u / p.a);
    return (T(1) - t) * (T(1) + t);
  }
  if constexpr (L == Law::atan) {
    const T v = u / p.a;
    return atan_factor<T> / (T(1) + v * v);
  }
  if constexpr (L == Law::softclip) {
    const T d = T(1) + math::abs(u) * p.c;
    return T(1) / (d * d);
  }
  if constexpr (L == Law::clip) return (u < p.a || u > p.b) ? p.c : T(1);
  return T(0);
}

// 1 - sigma without cancellation, for the gate form, whose law is always the sigmoid.
template <class T>
FK_INLINE T gate_complement(T u, const LawParameters<T>& p) {
  return math::sigmoid(-(u + p.a)) - p.b;
}

// Calls f.template operator()<L>() for the law named at run time.
template <class F>
void dispatch_law(Law law, F&& f) {
  switch (law) {
    case Law::exp:
      return f.template operator()<Law::exp>();
    case Law::softplus:
      return f.template operator()<Law::softplus>();
    case Law::sigmoid:
      return f.template operator()<Law::sigmoid>();
    case Law::tanh:
      return f.template operator()<Law::tanh>();
    case Law::atan:
      return f.template operator()<Law::atan>();
    case Law::softclip:
      return f.template operator()<Law::softclip>();
    case Law::clip:
      return f.template operator()<Law::clip>();
    default:
      return f.template operator()<Law::unit>();
  }
}

// The three numbers of flowkernels/scales.py, in the kernel's type.
template <class T, class Numbers>
LawParameters<T> law_parameters_of(const Numbers& numbers) {
  return {static_cast<T>(numbers[0]), static_cast<T>(numbers[1]), static_cast<T>(numbers[2])};
}

}  // namespace fk
