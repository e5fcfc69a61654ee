// ActNorm of one element, y = (x + t) sigma and back x = y / sigma - t, and its derivatives from the output.
// `factor` is sigma, or 1 / sigma when Inverse: there are as many as channels, so they are made once per call.
#pragma once
#include "common/math.h"

namespace fk {

template <bool Inverse, class T>
FK_INLINE T actnorm_of(T x, T shift, T factor) {
  return Inverse ? x * factor - shift : (x + shift) * factor;
}

template <class T>
struct ActnormGradient {
  T x, shift, log_scale;
};

// y is the output of the direction that is differentiated (the x of the flow when Inverse).
template <bool Inverse, class T>
FK_INLINE ActnormGradient<T> actnorm_backward_of(T grad_y, T y, T shift, T factor) {
  const T gx = grad_y * factor;
  if constexpr (Inverse) return {gx, -grad_y, -grad_y * (y + shift)};
  return {gx, gx, grad_y * y};
}

}  // namespace fk
