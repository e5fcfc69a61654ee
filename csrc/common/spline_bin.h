// One bin of a monotonic rational spline in its own coordinates: theta and eta run from 0 to 1 over its width w and its
// height h. With s = h / w, dy/dx = s deta/dtheta; d0 and d1 are dy/dx at its knots.
//
// Rational-quadratic (Durkan et al. 2019), with t = theta (1 - theta):
//   eta   = (s theta^2 + d0 t) / (s + (d0 + d1 - 2 s) t)
//   dy/dx = s^2 (d1 theta^2 + 2 s t + d0 (1 - theta)^2) / (s + (d0 + d1 - 2 s) t)^2
// The inverse solves for theta. With m = d0 (1 - eta) - d1 eta, b = m + 2 s eta, a = s - b:
//   b^2 + 4 a s eta = m^2 + 4 s^2 eta (1 - eta) = D      a sum of squares, never negative
//   theta = 2 s eta / (b + sqrt D) = (sqrt D - b) / (2 a)    the first where b >= 0, the second elsewhere: nothing
//   cancels
//
// Linear-rational (Dolatabadi et al. 2020), two pieces that meet at theta = lambda. The paper's weights of the three
// points, w_a = 1, w_b = sqrt(d0 / d1) and w_c, come to this: with g0 = sqrt d0, g1 = sqrt d1 and
// q = lambda g0 + (1 - lambda) g1, the left piece (p = theta, l = lambda, g = g0) is
//   eta   = l g^2 p / (s (l - p) + g q p)        dy/dx = (s l g / (s (l - p) + g q p))^2
//   p     = s l eta / (s eta + g (l g - q eta))
// and the right one is the same seen from the other end: p = 1 - theta, l = 1 - lambda, g = g1, 1 - eta. They meet at
// eta = lambda g0 / q. All terms are positive: nothing cancels, and there is no root.
#pragma once
#include "common/math.h"

namespace fk {

// Passed by value: a reference would keep a loop over lanes from being vectorised.
template <class T>
struct SplineBin {
  T s, d0, d1;
  T lambda;  // linear-rational only
};

template <class T>
struct BinValue {
  T eta, slope;  // slope: dy/dx
};

// A bin's value and its partial derivatives, those of the logarithm of the slope too.
template <class T>
struct BinRates {
  T eta, slope;
  T eta_s, eta_0, eta_1, eta_lambda;
  T log_theta, log_s, log_0, log_1, log_lambda;
};

struct RationalQuadratic {
  static constexpr bool has_lambda = false;

  template <class T>
  FK_INLINE static T theta_of(T eta, SplineBin<T> b) {
    const T m = b.d0 * (T(1) - eta) - b.d1 * eta, c = m + T(2) * b.s * eta;
    const T root = std::sqrt(m * m + T(4) * (b.s * eta) * (b.s * (T(1) - eta)));
    const T sum = math::abs(c) + root;
    return c >= T(0) ? T(2) * b.s * eta / sum : sum / (T(2) * (b.s + math::abs(c)));
  }

  template <class T>
  FK_INLINE static BinValue<T> value(T theta, SplineBin<T> b) {
    const T rest = T(1) - theta, t = theta * rest, s = b.s;
    const T denominator = s + (b.d0 + b.d1 - T(2) * s) * t;
    return {(s * theta * theta + b.d0 * t) / denominator,
            (b.d1 * theta * theta + T(2) * s * t + b.d0 * rest * rest) / denominator * s * (s / denominator)};
  }

  template <class T>
  FK_INLINE static BinRates<T> rates(T theta, SplineBin<T> b) {
    const T rest = T(1) - theta, t = theta * rest, s = b.s, turn = T(1) - T(2) * theta;
    const T bend = b.d0 + b.d1 - T(2) * s, inv = T(1) / (s + bend * t);
    const T n = b.d1 * theta * theta + T(2) * s * t + b.d0 * rest * rest, inv_n = T(1) / n;
    const T eta = (s * theta * theta + b.d0 * t) * inv;
    BinRates<T> r;
    r.eta = eta;
    r.slope = s * (n * inv) * (s * inv);
    r.eta_s = (theta * theta - eta * (T(1) - T(2) * t)) * inv;
    r.eta_0 = t * (T(1) - eta) * inv;
    r.eta_1 = -eta * t * inv;
    r.eta_lambda = T(0);
    r.log_theta = T(2) * (b.d1 * theta + s * turn - b.d0 * rest) * inv_n - T(2) * bend * turn * inv;
    r.log_s = T(2) / s + T(2) * t * inv_n - T(2) * (T(1) - T(2) * t) * inv;
    r.log_0 = rest * rest * inv_n - T(2) * t * inv;
    r.log_1 = theta * theta * inv_n - T(2) * t * inv;
    r.log_lambda = T(0);
    return r;
  }
};

struct LinearRational {
  static constexpr bool has_lambda = true;

  // The piece on one side of lambda: `g` is the root of the slope at its own knot, `k` at the other one.
  template <class T>
  struct Piece {
    T l, g, k, q;
  };

  template <class T>
  FK_INLINE static Piece<T> piece(bool left, T g0, T g1, T lambda) {
    const T l = left ? lambda : T(1) - lambda, g = left ? g0 : g1, k = left ? g1 : g0;
    return {l, g, k, l * g + (T(1) - l) * k};
  }

  template <class T>
  FK_INLINE static T theta_of(T eta, SplineBin<T> b) {
    const T g0 = std::sqrt(b.d0), g1 = std::sqrt(b.d1);
    const bool left = eta * (b.lambda * g0 + (T(1) - b.lambda) * g1) <= b.lambda * g0;
    const Piece<T> m = piece(left, g0, g1, b.lambda);
    const T e = left ? eta : T(1) - eta;
    const T p = e * b.s * m.l / (e * b.s + m.g * math::max(T(0), m.l * m.g - e * m.q));
    return left ? p : T(1) - p;
  }

  template <class T>
  FK_INLINE static BinValue<T> value(T theta, SplineBin<T> b) {
    const bool left = theta <= b.lambda;
    const Piece<T> m = piece(left, std::sqrt(b.d0), std::sqrt(b.d1), b.lambda);
    const T p = left ? theta : T(1) - theta, inv = T(1) / (b.s * (m.l - p) + m.g * m.q * p);
    const T e = m.l * m.g * m.g * p * inv, root = b.s * (m.l * m.g * inv);
    return {left ? e : T(1) - e, root * root};
  }

  template <class T>
  FK_INLINE static BinRates<T> rates(T theta, SplineBin<T> b) {
    const bool left = theta <= b.lambda;
    const Piece<T> m = piece(left, std::sqrt(b.d0), std::sqrt(b.d1), b.lambda);
    const T l = m.l, g = m.g, k = m.k, s = b.s, p = left ? theta : T(1) - theta;
    const T gap = s * (l - p), inv = T(1) / (gap + g * m.q * p);
    const T e = l * g * g * p * inv, root = s * (l * g * inv), sign = left ? T(1) : T(-1);
    const T near = T(0.5) / (g * g), far = T(0.5) / k;  // dg/dd over g, dk/dd
    const T other = g * p * (T(1) - l) * inv;           // -dlog(denominator)/dk
    const T eta_near = sign * e * (T(2) * gap + g * k * p * (T(1) - l)) * inv * near;
    const T eta_far = -sign * e * other * far;
    const T log_near = T(2) * (gap - g * g * l * p) * inv * near, log_far = T(-2) * other * far;
    BinRates<T> r;
    r.eta = left ? e : T(1) - e;
    r.slope = root * root;
    r.eta_s = -sign * e * (l - p) * inv;
    r.eta_0 = left ? eta_near : eta_far;
    r.eta_1 = left ? eta_far : eta_near;
    r.eta_lambda = g * g * (p * inv) * (p * inv) * (g * k - s);
    r.log_theta = T(-2) * sign * (g * m.q - s) * inv;
    r.log_s = T(2) * g * m.q * p * inv / s;
    r.log_0 = left ? log_near : log_far;
    r.log_1 = left ? log_far : log_near;
    r.log_lambda = T(2) * sign * p * (g * k - s) * inv / l;
    return r;
  }
};

}  // namespace fk
