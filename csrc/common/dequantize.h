// From grey levels to a continuous number, of one element: p = margin + (1 - 2 margin) (x + noise) / levels, and the
// logit of it.
#pragma once
#include <cmath>

#include "common/math.h"

namespace fk {

template <class T>
struct Dequantization {
  T levels, margin, log_slope;  // log_slope = log of dp / dx
};

template <class T>
Dequantization<T> dequantization(std::int64_t levels, bool logit, double margin) {
  const double slope = (logit ? 1 - 2 * margin : 1.0) / static_cast<double>(levels);
  return {static_cast<T>(levels), static_cast<T>(margin), static_cast<T>(std::log(slope))};
}

template <class T>
struct Dequantized {
  T y, logdet;
};

// logit(p) and log(dy/dx) = log(dp/dx) - log p - log(1 - p). 1 - p comes from the other side, so nothing cancels
// near 1.
template <class T>
FK_INLINE Dequantized<T> dequantize_logit(T x, T noise, const Dequantization<T>& d) {
  const T scale = (T(1) - T(2) * d.margin) / d.levels;
  const T below = math::log(d.margin + scale * (x + noise));
  const T above = math::log(d.margin + scale * ((d.levels - T(1) - x) + (T(1) - noise)));
  return {below - above, d.log_slope - below - above};
}

// y without the logit; `step` is 1 / levels.
template <class T>
FK_INLINE T dequantize_plain(T x, T noise, T step) {
  return (x + noise) * step;
}

}  // namespace fk
