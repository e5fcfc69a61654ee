// The monotonic rational-quadratic spline: both directions and their derivatives, for `Lanes` elements at once.
//
// Parameters of an element are rows, [parameter][lane]: K widths, K heights, K - 1 inner slopes; a pointer, or a
// `Strided` one where they lie apart (In, Out). Finding the bin is a
// walk over all of them with selects, no branch and no gather, so that lanes become SIMD lanes. Inside, everything is a
// fraction of the interval [-bound, bound], counted from its middle: u = x / (2 bound), and likewise for y.
//
// In a bin of width w and height h, with s = h / w, slopes d0 and d1 at its knots, theta = (u - u0) / w, t = theta (1 -
// theta):
//   R = (s theta^2 + d0 t) / (s + (d0 + d1 - 2 s) t)     y = y0 + h R
//   dy/dx = s^2 (d1 theta^2 + 2 s t + d0 (1 - theta)^2) / (s + (d0 + d1 - 2 s) t)^2
// The inverse solves R = eta for theta. With m = d0 (1 - eta) - d1 eta, b = m + 2 s eta, a = s - b:
//   b^2 + 4 a s eta = m^2 + 4 s^2 eta (1 - eta) = D      a sum of squares, never negative
//   theta = 2 s eta / (b + sqrt D) = (sqrt D - b) / (2 a)    the first where b >= 0, the second elsewhere: nothing
//   cancels
#pragma once
#include "common/lanes.h"
#include "common/math.h"
#include "common/sums.h"

namespace fk {

// How parameters become bins (flowkernels/transforms.py).
//   nflows  min + (1 - K min) softmax(scale u), slope = min_slope + softplus(u)
//   zuko    softmax(u / (1 + |u| c)), slope = exp(u / (1 + |u| c'))
enum class SplineStyle : int { nflows, zuko, count };

inline constexpr int kMaxBins = 64;

template <class T>
struct SplineOptions {
  int bins;
  SplineStyle style;
  T bound, min_width, min_height;
  T slope;  // nflows: the smallest slope; zuko: 1 / |log of it|
  T logit;  // nflows: factor of the logits; zuko: 2 / |log smallest slope|
};

template <class T, class Numbers>
SplineOptions<T> spline_options_of(int64_t bins, int64_t style, const Numbers& numbers) {
  return {static_cast<int>(bins),     static_cast<SplineStyle>(style), static_cast<T>(numbers[0]),
          static_cast<T>(numbers[1]), static_cast<T>(numbers[2]),      static_cast<T>(numbers[3]),
          static_cast<T>(numbers[4])};
}

template <SplineStyle S, class T>
FK_INLINE T spline_logit(T u, const SplineOptions<T>& o) {
  return S == SplineStyle::nflows ? u * o.logit : u / (T(1) + math::abs(u) * o.logit);
}

// d spline_logit / du
template <SplineStyle S, class T>
FK_INLINE T spline_logit_rate(T u, const SplineOptions<T>& o) {
  if constexpr (S == SplineStyle::nflows) return o.logit;
  const T d = T(1) + math::abs(u) * o.logit;
  return T(1) / (d * d);
}

template <SplineStyle S, class T>
FK_INLINE T spline_slope(T u, const SplineOptions<T>& o) {
  return S == SplineStyle::nflows ? o.slope + math::softplus(u) : math::exp(u / (T(1) + math::abs(u) * o.slope));
}

// d spline_slope / du; `slope` is spline_slope(u).
template <SplineStyle S, class T>
FK_INLINE T spline_slope_rate(T u, T slope, const SplineOptions<T>& o) {
  if constexpr (S == SplineStyle::nflows) return math::sigmoid(u);
  const T d = T(1) + math::abs(u) * o.slope;
  return slope / (d * d);
}

// What is known of one axis. `exponentials` hold exp(logit - largest) per bin; `factor` makes fractions of them.
template <class T, int Lanes>
struct SplineAxis {
  alignas(64) T exponentials[kMaxBins * Lanes];
  alignas(64) T factor[Lanes], factor_rest[Lanes];       // (1 - K min) / sum, and what rounding took from it
  alignas(64) T start[Lanes], rest[Lanes], size[Lanes];  // of the bin: it starts at start + rest in [-1/2, 1/2]
};

// What one call over `Lanes` elements works with.
template <class T, int Lanes>
struct SplineWork {
  SplineAxis<T, Lanes> x, y;
  alignas(64) T bin[Lanes];  // its number, as a T so that selects stay in one register file
  alignas(64) T raw0[Lanes], raw1[Lanes], d0[Lanes], d1[Lanes];
  alignas(64) T theta[Lanes];
};

// exp(logit - largest) of every bin, and the factor that makes fractions of them.
template <SplineStyle S, int Lanes, class T, class In>
FK_INLINE void spline_exponentials(In logits, T least, const SplineOptions<T>& o, SplineAxis<T, Lanes>& axis) {
  alignas(64) T largest[Lanes], sum[Lanes], rest[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) largest[i] = sum[i] = rest[i] = T(0);
  if constexpr (S == SplineStyle::nflows) {  // zuko's logits stay below |log slope| / 2
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) largest[i] = spline_logit<S>(logits[i], o);
    for (int k = 1; k < o.bins; ++k) FK_SIMD
    for (int i = 0; i < Lanes; ++i) largest[i] = math::max(largest[i], spline_logit<S>(logits[k * Lanes + i], o));
  }
  for (int k = 0; k < o.bins; ++k) FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T e = math::exp(spline_logit<S>(logits[k * Lanes + i], o) - largest[i]);
    axis.exponentials[k * Lanes + i] = e;
    add_exactly(sum[i], rest[i], e);
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
template <bool Search, int Lanes, class T>
FK_INLINE void spline_find(const T* position, T least, int bins, SplineAxis<T, Lanes>& axis, T* bin) {
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
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const bool here = Search ? position[i] >= knot[i] : bin[i] == T(k);
      // The last bin ends at 1/2 exactly, whatever the sum was rounded to.
      const T size = last ? (T(0.5) - knot[i]) - rest[i] : least + axis.factor[i] * axis.exponentials[k * Lanes + i];
      if constexpr (Search) bin[i] = here ? T(k) : bin[i];
      axis.start[i] = here ? knot[i] : axis.start[i];
      axis.rest[i] = here ? rest[i] : axis.rest[i];
      axis.size[i] = here ? size : axis.size[i];
      add_exactly(knot[i], rest[i], size);
      rest[i] += axis.factor_rest[i] * axis.exponentials[k * Lanes + i];
    }
  }
}

template <class T>
FK_INLINE bool spline_inside(T x, const SplineOptions<T>& o) {
  return x >= -o.bound && x <= o.bound;
}

// Everything about the bin that each lane of x falls into; theta too, solved for when Inverse. Lanes outside the bounds
// are put at a bound, so that what follows is finite.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In>
FK_INLINE void spline_locate(const T* x, In parameters, const SplineOptions<T>& o, SplineWork<T, Lanes>& s) {
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
  for (int k = 0; k < bins - 1; ++k) FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T v = slopes[k * Lanes + i];
    s.raw0[i] = s.bin[i] == T(k + 1) ? v : s.raw0[i];
    s.raw1[i] = s.bin[i] == T(k) ? v : s.raw1[i];
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T d0 = spline_slope<S>(s.raw0[i], o), d1 = spline_slope<S>(s.raw1[i], o);
    s.d0[i] = s.bin[i] == T(0) ? T(1) : d0;
    s.d1[i] = s.bin[i] == T(bins - 1) ? T(1) : d1;
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    T theta;
    if constexpr (Inverse) {
      const T d0 = s.d0[i], d1 = s.d1[i], slope = s.y.size[i] / s.x.size[i];
      const T eta =
          math::min(T(1), math::max(T(0), ((position[i] - s.y.start[i]) + (rest[i] - s.y.rest[i])) / s.y.size[i]));
      const T m = d0 * (T(1) - eta) - d1 * eta, b = m + T(2) * slope * eta;
      const T root = std::sqrt(m * m + T(4) * (slope * eta) * (slope * (T(1) - eta)));
      const T sum = math::abs(b) + root;
      theta = b >= T(0) ? T(2) * slope * eta / sum : sum / (T(2) * (slope + math::abs(b)));
    } else {
      theta = ((position[i] - s.x.start[i]) + (rest[i] - s.x.rest[i])) / s.x.size[i];
    }
    s.theta[i] = math::min(T(1), math::max(T(0), theta));
  }
}

// y and the log-det of every lane.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In>
FK_INLINE void rq_spline_lanes(const T* x, In parameters, const SplineOptions<T>& o, T* y, T* logdet) {
  SplineWork<T, Lanes> w;
  spline_locate<S, Inverse>(x, parameters, o, w);
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T theta = w.theta[i], rest = T(1) - theta, t = theta * rest, d0 = w.d0[i], d1 = w.d1[i];
    const T s = w.y.size[i] / w.x.size[i], denominator = s + (d0 + d1 - T(2) * s) * t;
    const T slope = (d1 * theta * theta + T(2) * s * t + d0 * rest * rest) / denominator * s * (s / denominator);
    const T log_slope = math::log(slope);
    const T unit = Inverse ? w.x.start[i] + (w.x.rest[i] + w.x.size[i] * theta)
                           : w.y.start[i] + (w.y.rest[i] + w.y.size[i] * ((s * theta * theta + d0 * t) / denominator));
    const bool inside = spline_inside(x[i], o);
    y[i] = inside ? T(2) * o.bound * unit : x[i];
    logdet[i] = inside ? (Inverse ? -log_slope : log_slope) : T(0);
  }
}

// Gradient of the logits of one axis: every fraction before the bin gets `before`, the bin's own gets `own`.
template <SplineStyle S, int Lanes, class T, class In, class Out>
FK_INLINE void spline_logit_gradients(In logits, const SplineAxis<T, Lanes>& axis, const T* bin, const T* before,
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
  for (int k = 0; k < o.bins; ++k) FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T g = bin[i] > T(k) ? before[i] : (bin[i] == T(k) ? own[i] : T(0));
    grad[k * Lanes + i] = axis.factor[i] * axis.exponentials[k * Lanes + i] * (g - mean[i]) *
                          spline_logit_rate<S>(logits[k * Lanes + i], o);
  }
}

// Gradients of x and of all parameters. For the inverse, x stands for its input, the flow's y: with f the forward
// transform at fixed parameters and l its log slope, dx = (dy - df) / f' and d(-l) = -(l_x dx + dl), so the forward
// derivatives serve with other cotangents.
template <SplineStyle S, bool Inverse, int Lanes, class T, class In, class Out>
FK_INLINE void rq_spline_backward_lanes(const T* grad_y, const T* grad_logdet, const T* x, In parameters,
                                        const SplineOptions<T>& o, T* grad_x, Out grad_parameters) {
  SplineWork<T, Lanes> w;
  spline_locate<S, Inverse>(x, parameters, o, w);
  const int bins = o.bins;
  const T length = T(2) * o.bound;
  alignas(64) T before_u[Lanes], own_u[Lanes], before_y[Lanes], own_y[Lanes], grad0[Lanes], grad1[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T theta = w.theta[i], rest = T(1) - theta, t = theta * rest, d0 = w.d0[i], d1 = w.d1[i];
    const T s = w.y.size[i] / w.x.size[i], bend = d0 + d1 - T(2) * s, inv = T(1) / (s + bend * t);
    const T n = d1 * theta * theta + T(2) * s * t + d0 * rest * rest, inv_n = T(1) / n;
    const T slope = s * (n * inv) * (s * inv), ratio = (s * theta * theta + d0 * t) * inv;
    const T turn = T(1) - T(2) * theta;
    // d log slope / d theta
    const T l_theta = T(2) * (d1 * theta + s * turn - d0 * rest) * inv_n - T(2) * bend * turn * inv;
    const bool inside = spline_inside(x[i], o);
    T gy = inside ? grad_y[i] * length : T(0), gl = inside ? grad_logdet[i] : T(0), per_width;
    if constexpr (Inverse) {
      const T gu = (gy - gl * l_theta / w.x.size[i]) / slope;
      grad_x[i] = inside ? gu / length : grad_y[i];
      per_width = -gy;  // what the line of the forward direction comes to, without its cancellation
      gy = -gu;
      gl = -gl;
    } else {
      per_width = gy * slope + gl * l_theta / w.x.size[i];
      grad_x[i] = inside ? per_width / length : grad_y[i];
    }
    const T gr = gy * w.y.size[i];
    const T gs = gr * (theta * theta - ratio * (T(1) - T(2) * t)) * inv +
                 gl * (T(2) / s + T(2) * t * inv_n - T(2) * (T(1) - T(2) * t) * inv);
    grad0[i] = gr * t * (T(1) - ratio) * inv + gl * (rest * rest * inv_n - T(2) * t * inv);
    grad1[i] = -gr * ratio * t * inv + gl * (theta * theta * inv_n - T(2) * t * inv);
    // The last bin ends at the bound, so its start alone moves: a softmax does not mind if its own share is taken off
    // all gradients, and they do not cancel later.
    const bool last = w.bin[i] == T(bins - 1);
    const T stretch = gs / w.x.size[i];
    before_u[i] = last ? stretch * s - per_width * rest : -per_width;
    own_u[i] = last ? T(0) : -per_width * theta - stretch * s;
    before_y[i] = last ? gy * (T(1) - ratio) - stretch : gy;
    own_y[i] = last ? T(0) : gy * ratio + stretch;
    grad0[i] *= spline_slope_rate<S>(w.raw0[i], d0, o);
    grad1[i] *= spline_slope_rate<S>(w.raw1[i], d1, o);
  }
  spline_logit_gradients<S>(parameters, w.x, w.bin, before_u, own_u, o.min_width, o, grad_parameters);
  spline_logit_gradients<S>(parameters + bins * Lanes, w.y, w.bin, before_y, own_y, o.min_height, o,
                            grad_parameters + bins * Lanes);
  const Out slopes = grad_parameters + 2 * bins * Lanes;
  for (int k = 0; k < bins - 1; ++k) FK_SIMD
  for (int i = 0; i < Lanes; ++i)
    slopes[k * Lanes + i] = (w.bin[i] == T(k + 1) ? grad0[i] : T(0)) + (w.bin[i] == T(k) ? grad1[i] : T(0));
}

// Calls f.template operator()<Style, Inverse>().
template <class Function>
void dispatch_spline(SplineStyle style, bool inverse, Function&& f) {
  if (style == SplineStyle::zuko)
    inverse ? f.template operator()<SplineStyle::zuko, true>() : f.template operator()<SplineStyle::zuko, false>();
  else
    inverse ? f.template operator()<SplineStyle::nflows, true>() : f.template operator()<SplineStyle::nflows, false>();
}

}  // namespace fk
