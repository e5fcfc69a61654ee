// Monotonic rational splines: both directions and their derivatives, for `Lanes` elements at once. What happens inside
// a bin is in common/spline_bin.h.
//
// Parameters of an element are rows, [parameter][lane]: K widths, K heights, K - 1 inner slopes, and for the
// linear-rational spline K lambdas; a pointer, or a `Strided` one where they lie apart (In, Out). Finding the bin is a
// walk over all of them with selects, no branch and no gather, so that lanes become SIMD lanes. Inside, everything is a
// fraction of the interval [-bound, bound], counted from its middle: u = x / (2 bound), and likewise for y.
#pragma once
#include <type_traits>

#include "common/lanes.h"
#include "common/math.h"
#include "common/spline_bin.h"
#include "common/sums.h"

namespace fk {

// How parameters become bins (flowkernels/transforms.py).
//   nflows  min + (1 - K min) softmax(scale u), slope = min_slope + softplus(u)
//   zuko    softmax(u / (1 + |u| c)), slope = exp(u / (1 + |u| c'))
//   pyro    as nflows with scale 1, but the slope at both ends is 1 - min_slope
//   linear  as pyro, linear-rational, lambda = min_lambda + (1 - 2 min_lambda) sigmoid(u)
enum class SplineStyle : int { nflows, zuko, pyro, linear, count };

inline constexpr int kMaxBins = 64;

inline int64_t spline_parameters(int64_t bins, int64_t style) {
  return (static_cast<SplineStyle>(style) == SplineStyle::linear ? 4 : 3) * bins - 1;
}

template <class T>
struct SplineOptions {
  int bins;
  SplineStyle style;
  T bound, min_width, min_height;
  T slope;       // zuko: 1 / |log of the smallest slope|; others: the smallest slope
  T logit;       // zuko: 2 / |log of the smallest slope|; others: factor of the logits
  T end;         // the slope at both ends
  T min_lambda;  // linear
};

template <class T, class Numbers>
SplineOptions<T> spline_options_of(int64_t bins, int64_t code, const Numbers& numbers) {
  const auto style = static_cast<SplineStyle>(code);
  const bool pyro = style == SplineStyle::pyro || style == SplineStyle::linear;
  return {static_cast<int>(bins),
          style,
          static_cast<T>(numbers[0]),
          static_cast<T>(numbers[1]),
          static_cast<T>(numbers[2]),
          static_cast<T>(numbers[3]),
          pyro ? T(1) : static_cast<T>(numbers[4]),
          static_cast<T>(pyro ? 1 - numbers[3] : 1),
          static_cast<T>(numbers[4])};
}

template <SplineStyle S>
using BinFormula = std::conditional_t<S == SplineStyle::linear, LinearRational, RationalQuadratic>;

template <SplineStyle S, class T>
FK_INLINE T spline_logit(T u, const SplineOptions<T>& o) {
  return S != SplineStyle::zuko ? u * o.logit : u / (T(1) + math::abs(u) * o.logit);
}

// d spline_logit / du
template <SplineStyle S, class T>
FK_INLINE T spline_logit_rate(T u, const SplineOptions<T>& o) {
  if constexpr (S != SplineStyle::zuko) return o.logit;
  const T d = T(1) + math::abs(u) * o.logit;
  return T(1) / (d * d);
}

template <SplineStyle S, class T>
FK_INLINE T spline_slope(T u, const SplineOptions<T>& o) {
  return S != SplineStyle::zuko ? o.slope + math::softplus(u) : math::exp(u / (T(1) + math::abs(u) * o.slope));
}

// d spline_slope / du; `slope` is spline_slope(u).
template <SplineStyle S, class T>
FK_INLINE T spline_slope_rate(T u, T slope, const SplineOptions<T>& o) {
  if constexpr (S != SplineStyle::zuko) return math::sigmoid(u);
  const T d = T(1) + math::abs(u) * o.slope;
  return slope / (d * d);
}

template <class T>
FK_INLINE T spline_lambda(T u, const SplineOptions<T>& o) {
  return o.min_lambda + (T(1) - T(2) * o.min_lambda) * math::sigmoid(u);
}

// d spline_lambda / du
template <class T>
FK_INLINE T spline_lambda_rate(T u, const SplineOptions<T>& o) {
  return (T(1) - T(2) * o.min_lambda) * math::sigmoid(u) * math::sigmoid(-u);
}

// What is known of one axis. `exponentials` hold exp(logit - largest) per bin, in `Kept`: their own array, or a pointer
// to where a device has better room; `factor` makes fractions of them.
template <class T, int Lanes, class Kept = T[kMaxBins * Lanes]>
struct SplineAxis {
  alignas(64) Kept exponentials;
  alignas(64) T factor[Lanes], factor_rest[Lanes];       // (1 - K min) / sum, and what rounding took from it
  alignas(64) T start[Lanes], rest[Lanes], size[Lanes];  // of the bin: it starts at start + rest in [-1/2, 1/2]
};

// What one call over `Lanes` elements works with.
template <class T, int Lanes, class Kept = T[kMaxBins * Lanes]>
struct SplineWork {
  SplineAxis<T, Lanes, Kept> x, y;
  alignas(64) T bin[Lanes];  // its number, as a T so that selects stay in one register file
  alignas(64) T raw0[Lanes], raw1[Lanes], d0[Lanes], d1[Lanes];
  alignas(64) T raw_lambda[Lanes], lambda[Lanes];
  alignas(64) T theta[Lanes];

  FK_INLINE SplineBin<T> bin_of(int i) const { return {y.size[i] / x.size[i], d0[i], d1[i], lambda[i]}; }
};

// exp(logit - largest) of every bin, and the factor that makes fractions of them.
template <SplineStyle S, int Lanes, class T, class In, class Kept>
FK_CALLED void spline_exponentials(In logits, T least, const SplineOptions<T>& o, SplineAxis<T, Lanes, Kept>& axis) {
  alignas(64) T largest[Lanes], sum[Lanes], rest[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) largest[i] = sum[i] = rest[i] = T(0);
  if constexpr (S != SplineStyle::zuko) {  // zuko's logits stay below |log slope| / 2
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) largest[i] = spline_logit<S>(logits[i], o);
    for (int k = 1; k < o.bins; ++k) {
      const In row = logits + k * Lanes;
      FK_SIMD
      for (int i = 0; i < Lanes; ++i) largest[i] = math::max(largest[i], spline_logit<S>(row[i], o));
    }
  }
  for (int k = 0; k < o.bins; ++k) {
    const In row = logits + k * Lanes;
    const auto exponentials = axis.exponentials + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T e = math::exp(spline_logit<S>(row[i], o) - largest[i]);
      exponentials[i] = e;
      add_exactly(sum[i], rest[i], e);
    }
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T total = sum[i] + rest[i], below = (sum[i] - total) + rest[i], part = T(1) - o.bins * least;
    axis.factor[i] = part / total;
    // The one error that all knots share: where bins are narrow it would be the largest.
    axis.factor_rest[i] = ((part - axis.factor[i] * total) - axis.factor[i] * below) / total;
  }
}

// Start and size of one bin per lane. Search: the bin that position[i] lies in, whose number is written to `bin`;
// otherwise the bin whose number is there.
template <bool Search, int Lanes, class T, class Kept>
FK_CALLED void spline_find(const T* position, T least, int bins, SplineAxis<T, Lanes, Kept>& axis, T* bin) {
  alignas(64) T knot[Lanes], rest[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    if constexpr (Search) bin[i] = T(0);
    axis.start[i] = knot[i] = T(-0.5);
    axis.rest[i] = rest[i] = T(0);
    axis.size[i] = least + axis.factor[i] * axis.exponentials[i];
    add_exactly(knot[i], rest[i], axis.size[i]);
    rest[i] += axis.factor_rest[i] * axis.exponentials[i];
  }
  for (int k = 1; k < bins; ++k) {
    const bool last = k == bins - 1;
    const auto exponentials = axis.exponentials + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const bool here = Search ? position[i] >= knot[i] : bin[i] == T(k);
      // The last bin ends at 1/2 exactly, whatever the sum was rounded to.
      const T size = last ? (T(0.5) - knot[i]) - rest[i] : least + axis.factor[i] * exponentials[i];
      if constexpr (Search) bin[i] = here ? T(k) : bin[i];
      axis.start[i] = here ? knot[i] : axis.start[i];
      axis.rest[i] = here ? rest[i] : axis.rest[i];
      axis.size[i] = here ? size : axis.size[i];
      add_exactly(knot[i], rest[i], size);
      rest[i] += axis.factor_rest[i] * exponentials[i];
    }
  }
}

template <class T>
FK_INLINE bool spline_inside(T x, const SplineOptions<T>& o) {
  return x >= -o.bound && x <= o.bound;
}

// Everything about the bin that each lane of x falls into; theta too, solved for when Inverse. Lanes outside the bounds
// are put at a bound, so that what follows is finite.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In, class Kept>
FK_INLINE void spline_locate(const T* x, In parameters, const SplineOptions<T>& o, SplineWork<T, Lanes, Kept>& s) {
  const int bins = o.bins;
  spline_exponentials<S>(parameters, o.min_width, o, s.x);
  spline_exponentials<S>(parameters + bins * Lanes, o.min_height, o, s.y);
  // position + rest = x / (2 bound), both parts: a small bin would show the rounding of the quotient.
  alignas(64) T position[Lanes], rest[Lanes];
  const T length = T(2) * o.bound;
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T inside = spline_inside(x[i], o) ? x[i] : T(0);
    position[i] = inside / length;
    rest[i] = (inside - position[i] * length) / length;
  }
  if constexpr (Inverse) {
    spline_find<true>(position, o.min_height, bins, s.y, s.bin);
    spline_find<false>(position, o.min_width, bins, s.x, s.bin);
  } else {
    spline_find<true>(position, o.min_width, bins, s.x, s.bin);
    spline_find<false>(position, o.min_height, bins, s.y, s.bin);
  }
  const In slopes = parameters + 2 * bins * Lanes;
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) s.raw0[i] = s.raw1[i] = T(0);
  for (int k = 0; k < bins - 1; ++k) {
    const In row = slopes + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T v = row[i];
      s.raw0[i] = s.bin[i] == T(k + 1) ? v : s.raw0[i];
      s.raw1[i] = s.bin[i] == T(k) ? v : s.raw1[i];
    }
  }
  const T end = o.end;  // a load under a condition would keep the loop from being vectorised
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T d0 = spline_slope<S>(s.raw0[i], o), d1 = spline_slope<S>(s.raw1[i], o);
    s.d0[i] = s.bin[i] == T(0) ? end : d0;
    s.d1[i] = s.bin[i] == T(bins - 1) ? end : d1;
    s.lambda[i] = T(0);
  }
  if constexpr (BinFormula<S>::has_lambda) {
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) s.raw_lambda[i] = T(0);
    for (int k = 0; k < bins; ++k) {
      const In row = slopes + (bins - 1 + k) * Lanes;
      FK_SIMD
      for (int i = 0; i < Lanes; ++i) s.raw_lambda[i] = s.bin[i] == T(k) ? row[i] : s.raw_lambda[i];
    }
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) s.lambda[i] = spline_lambda(s.raw_lambda[i], o);
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    T theta;
    if constexpr (Inverse) {
      const T eta =
          math::min(T(1), math::max(T(0), ((position[i] - s.y.start[i]) + (rest[i] - s.y.rest[i])) / s.y.size[i]));
      theta = BinFormula<S>::theta_of(eta, s.bin_of(i));
    } else {
      theta = ((position[i] - s.x.start[i]) + (rest[i] - s.x.rest[i])) / s.x.size[i];
    }
    s.theta[i] = math::min(T(1), math::max(T(0), theta));
  }
}

// y and the log-det of every lane. Exponentials may be kept in place of the logits.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In, class Kept>
FK_INLINE void rq_spline_lanes(const T* x, In parameters, const SplineOptions<T>& o, SplineWork<T, Lanes, Kept>& w,
                               T* y, T* logdet) {
  spline_locate<S, Inverse>(x, parameters, o, w);
  // One loop would have the compiler branch around all of it for lanes outside the bounds, one lane at a time.
  alignas(64) T unit[Lanes], log_slope[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T theta = w.theta[i];
    const BinValue<T> at = BinFormula<S>::value(theta, w.bin_of(i));
    log_slope[i] = at.slope;
    unit[i] = Inverse ? w.x.start[i] + (w.x.rest[i] + w.x.size[i] * theta)
                      : w.y.start[i] + (w.y.rest[i] + w.y.size[i] * at.eta);
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) log_slope[i] = math::log(log_slope[i]);
  const T length = T(2) * o.bound, sign = Inverse ? T(-1) : T(1);
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const bool inside = spline_inside(x[i], o);
    y[i] = inside ? length * unit[i] : x[i];
    logdet[i] = inside ? sign * log_slope[i] : T(0);
  }
}

template <SplineStyle S, bool Inverse, int Lanes, class T, class In>
FK_INLINE void rq_spline_lanes(const T* x, In parameters, const SplineOptions<T>& o, T* y, T* logdet) {
  SplineWork<T, Lanes> w;
  rq_spline_lanes<S, Inverse>(x, parameters, o, w, y, logdet);
}

// Gradient of the logits of one axis: every fraction before the bin gets `before`, the bin's own gets `own`.
template <SplineStyle S, int Lanes, class T, class In, class Kept, class Out>
FK_CALLED void spline_logit_gradients(In logits, const SplineAxis<T, Lanes, Kept>& axis, const T* bin, const T* before,
                                      const T* own, T least, const SplineOptions<T>& o, Out grad) {
  // With f_j = least + factor e_j, sum over j of g_j (f_j - least) needs only the fractions up to the bin, which are
  // known.
  alignas(64) T mean[Lanes];
  const T scale = T(1) / (T(1) - o.bins * least);
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T fractions = (axis.start[i] + T(0.5)) + axis.rest[i];
    mean[i] = (before[i] * (fractions - bin[i] * least) + own[i] * (axis.size[i] - least)) * scale;
  }
  for (int k = 0; k < o.bins; ++k) {
    const In row = logits + k * Lanes;
    const Out to = grad + k * Lanes;
    const auto exponentials = axis.exponentials + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T g = bin[i] > T(k) ? before[i] : (bin[i] == T(k) ? own[i] : T(0));
      to[i] = axis.factor[i] * exponentials[i] * (g - mean[i]) * spline_logit_rate<S>(row[i], o);
    }
  }
}

// Gradients of x and of all parameters. For the inverse, x stands for its input, the flow's y: with f the forward
// transform at fixed parameters and l its log slope, dx = (dy - df) / f' and d(-l) = -(l_x dx + dl), so the forward
// derivatives serve with other cotangents. Gradients may be written over the parameters; exponentials may be kept in
// place of the logits except where the style is zuko's, whose rates need these again.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In, class Kept, class Out>
FK_INLINE void rq_spline_backward_lanes(const T* grad_y, const T* grad_logdet, const T* x, In parameters,
                                        const SplineOptions<T>& o, SplineWork<T, Lanes, Kept>& w, T* grad_x,
                                        Out grad_parameters) {
  spline_locate<S, Inverse>(x, parameters, o, w);
  const int bins = o.bins;
  const T length = T(2) * o.bound;
  alignas(64) T before_u[Lanes], own_u[Lanes], before_y[Lanes], own_y[Lanes];
  alignas(64) T grad0[Lanes], grad1[Lanes], grad_lambda[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T theta = w.theta[i], s = w.y.size[i] / w.x.size[i];
    const BinRates<T> r = BinFormula<S>::rates(theta, w.bin_of(i));
    const bool inside = spline_inside(x[i], o);
    T gy = inside ? grad_y[i] * length : T(0), gl = inside ? grad_logdet[i] : T(0), per_width;
    if constexpr (Inverse) {
      const T gu = (gy - gl * r.log_theta / w.x.size[i]) / r.slope;
      grad_x[i] = inside ? gu / length : grad_y[i];
      per_width = -gy;  // what the line of the forward direction comes to, without its cancellation
      gy = -gu;
      gl = -gl;
    } else {
      per_width = gy * r.slope + gl * r.log_theta / w.x.size[i];
      grad_x[i] = inside ? per_width / length : grad_y[i];
    }
    const T gr = gy * w.y.size[i];
    const T gs = gr * r.eta_s + gl * r.log_s;
    // The last bin ends at the bound, so its start alone moves: a softmax does not mind if its own share is taken off
    // all gradients, and they do not cancel later.
    const bool last = w.bin[i] == T(bins - 1);
    const T stretch = gs / w.x.size[i];
    before_u[i] = last ? stretch * s - per_width * (T(1) - theta) : -per_width;
    own_u[i] = last ? T(0) : -per_width * theta - stretch * s;
    before_y[i] = last ? gy * (T(1) - r.eta) - stretch : gy;
    own_y[i] = last ? T(0) : gy * r.eta + stretch;
    grad0[i] = (gr * r.eta_0 + gl * r.log_0) * spline_slope_rate<S>(w.raw0[i], w.d0[i], o);
    grad1[i] = (gr * r.eta_1 + gl * r.log_1) * spline_slope_rate<S>(w.raw1[i], w.d1[i], o);
    if constexpr (BinFormula<S>::has_lambda)
      grad_lambda[i] = (gr * r.eta_lambda + gl * r.log_lambda) * spline_lambda_rate(w.raw_lambda[i], o);
  }
  spline_logit_gradients<S>(parameters, w.x, w.bin, before_u, own_u, o.min_width, o, grad_parameters);
  spline_logit_gradients<S>(parameters + bins * Lanes, w.y, w.bin, before_y, own_y, o.min_height, o,
                            grad_parameters + bins * Lanes);
  const Out slopes = grad_parameters + 2 * bins * Lanes;
  for (int k = 0; k < bins - 1; ++k) {
    const Out to = slopes + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i)
      to[i] = (w.bin[i] == T(k + 1) ? grad0[i] : T(0)) + (w.bin[i] == T(k) ? grad1[i] : T(0));
  }
  if constexpr (BinFormula<S>::has_lambda) {
    for (int k = 0; k < bins; ++k) {
      const Out to = slopes + (bins - 1 + k) * Lanes;
      FK_SIMD
      for (int i = 0; i < Lanes; ++i) to[i] = w.bin[i] == T(k) ? grad_lambda[i] : T(0);
    }
  }
}

template <SplineStyle S, bool Inverse, int Lanes, class T, class In, class Out>
FK_INLINE void rq_spline_backward_lanes(const T* grad_y, const T* grad_logdet, const T* x, In parameters,
                                        const SplineOptions<T>& o, T* grad_x, Out grad_parameters) {
  SplineWork<T, Lanes> w;
  rq_spline_backward_lanes<S, Inverse>(grad_y, grad_logdet, x, parameters, o, w, grad_x, grad_parameters);
}

// Calls f.template operator()<Style, Inverse>(); pyro's quadratic spline is nflows' with other options.
template <class Function>
void dispatch_spline(SplineStyle style, bool inverse, Function&& f) {
  const auto in_style = [&]<SplineStyle S>() {
    inverse ? f.template operator()<S, true>() : f.template operator()<S, false>();
  };
  if (style == SplineStyle::zuko)
    in_style.template operator()<SplineStyle::zuko>();
  else if (style == SplineStyle::linear)
    in_style.template operator()<SplineStyle::linear>();
  else
    in_style.template operator()<SplineStyle::nflows>();
}

}  // namespace fk
