// The mixture-of-logistics transform of Flow++, both directions and their derivatives, for `Lanes` elements at once:
//
//   P = sum_k pi_k sigmoid(v_k),  Q = 1 - P = sum_k pi_k sigmoid(-v_k),  v_k = (x - mean_k) / s_k
//   m = log P - log Q             y = sigma m + shift             log dm/dx = log(sum_k pi_k sigmoid(v_k) sigmoid(-v_k)
//   / s_k) - log P - log Q
//
// Parameters of an element are rows, [parameter][lane]: shift, scale, K logits of pi, K means, K logarithms of s. Each
// of the three sums is taken relative to its largest term, so neither tail nor the gap between far components
// underflows; pi is not normalised, because P + Q is what its sum would be.
#pragma once
#include "common/lanes.h"
#include "common/scales.h"

namespace fk {

inline constexpr int kMaxComponents = 64;

// Of an element with so many parameters; 0 where no mixture has so many.
inline std::int64_t mixture_components(std::int64_t count) {
  const std::int64_t components = (count - 2) / 3;
  return count == 3 * components + 2 && components >= 1 && components <= kMaxComponents ? components : 0;
}

template <class T>
struct MixtureOptions {
  int components;
  T min_log_scale;  // s_k >= exp(min_log_scale)
};

// 1 / s_k is in `Kept`: its own array, or a pointer to where a device has better room.
template <class T, int Lanes, class Kept = T[kMaxComponents * Lanes]>
struct MixtureWork {
  alignas(64) Kept inverse_scale;
  alignas(64) T m[Lanes], log_slope[Lanes];  // the transform and the logarithm of its derivative
  // P, Q and the density, pi not normalised: the logarithm of the largest term, and the sum relative to it.
  alignas(64) T most_below[Lanes], most_above[Lanes], most_density[Lanes], below[Lanes], above[Lanes], density[Lanes];
};

// The rows of one component.
template <class T, int Lanes>
struct MixtureComponent {
  const T *logit, *mean, *log_scale;
  FK_INLINE MixtureComponent(const T* logits, const T* means, const T* log_scales, int k)
      : logit(logits + k * Lanes), mean(means + k * Lanes), log_scale(log_scales + k * Lanes) {}
};

// What one component adds to the three sums, relative to their largest terms, and sigmoid(v), sigmoid(-v).
template <class T>
struct MixtureTerms {
  T v, up, down, below, above, density;
};

template <int Lanes, class T, class Kept>
FK_INLINE MixtureTerms<T> mixture_terms(T x, T logit, T mean, T log_scale, T inverse_scale,
                                        const MixtureWork<T, Lanes, Kept>& w, int i) {
  const T v = (x - mean) * inverse_scale, e = math::exp(-math::abs(v)), c = T(1) / (T(1) + e);
  return {v,
          v >= T(0) ? c : e * c,
          v >= T(0) ? e * c : c,
          math::exp(logit + math::min(T(0), v) - w.most_below[i]) * c,
          math::exp(logit - math::max(T(0), v) - w.most_above[i]) * c,
          math::exp(logit - math::abs(v) - log_scale - w.most_density[i]) * (c * c)};
}

// The sums at x.
template <int Lanes, class T, class Kept>
FK_INLINE void mixture_at(const T* x, const T* logits, const T* means, const T* log_scales, const MixtureOptions<T>& o,
                          MixtureWork<T, Lanes, Kept>& w) {
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    w.most_below[i] = w.most_above[i] = w.most_density[i] = -std::numeric_limits<T>::infinity();
    w.below[i] = w.above[i] = w.density[i] = T(0);
  }
  for (int k = 0; k < o.components; ++k) {
    const MixtureComponent<T, Lanes> of(logits, means, log_scales, k);
    const auto inverse_scale = w.inverse_scale + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T v = (x[i] - of.mean[i]) * inverse_scale[i], l = of.logit[i];
      w.most_below[i] = math::max(w.most_below[i], l + math::min(T(0), v));
      w.most_above[i] = math::max(w.most_above[i], l - math::max(T(0), v));
      w.most_density[i] = math::max(w.most_density[i], l - math::abs(v) - math::max(o.min_log_scale, of.log_scale[i]));
    }
  }
  for (int k = 0; k < o.components; ++k) {
    const MixtureComponent<T, Lanes> of(logits, means, log_scales, k);
    const auto inverse_scale = w.inverse_scale + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const MixtureTerms<T> t = mixture_terms(x[i], of.logit[i], of.mean[i],
                                              math::max(o.min_log_scale, of.log_scale[i]), inverse_scale[i], w, i);
      w.below[i] += t.below;
      w.above[i] += t.above;
      w.density[i] += t.density;
    }
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T below = w.most_below[i] + math::log(w.below[i]), above = w.most_above[i] + math::log(w.above[i]);
    const T density = w.most_density[i] + math::log(w.density[i]);
    const T larger = math::max(below, above), smaller = math::min(below, above);
    w.m[i] = below - above;
    // The first difference is of like numbers, the second the logarithm of a normalised probability above 1/2.
    w.log_slope[i] = (density - smaller) + math::log1p(math::exp(smaller - larger));
  }
}

template <int Lanes, class T, class Kept>
FK_INLINE void mixture_scales(const T* log_scales, const MixtureOptions<T>& o, MixtureWork<T, Lanes, Kept>& w) {
  for (int k = 0; k < o.components; ++k) {
    const T* const log_scale = log_scales + k * Lanes;
    const auto inverse_scale = w.inverse_scale + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) inverse_scale[i] = math::exp(-math::max(o.min_log_scale, log_scale[i]));
  }
}

// x with m(x) = target. At x = mean_k + s_k target component k alone gives the target, so the smallest and the largest
// of these bracket the solution. Newton's step where it stays inside the bracket and has halved the residual, else a
// bisection; a lane stops when its bracket or its step cannot become smaller, and keeps its value while others go on.
template <int Lanes, class T, class Kept>
FK_INLINE void mixture_solve(const T* target, const T* logits, const T* means, const T* log_scales,
                             const MixtureOptions<T>& o, MixtureWork<T, Lanes, Kept>& w, T* x) {
  alignas(64) T low[Lanes], high[Lanes], last[Lanes], open[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    low[i] = std::numeric_limits<T>::infinity();
    high[i] = -low[i];
    last[i] = std::numeric_limits<T>::infinity();
    open[i] = T(1);
  }
  for (int k = 0; k < o.components; ++k) {
    const T* const mean = means + k * Lanes;
    const auto inverse_scale = w.inverse_scale + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T at = mean[i] + target[i] / inverse_scale[i];
      low[i] = math::min(low[i], at);
      high[i] = math::max(high[i], at);
    }
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) x[i] = T(0.5) * low[i] + T(0.5) * high[i];
  constexpr T eps = std::numeric_limits<T>::epsilon();
  constexpr int kSteps = std::numeric_limits<T>::digits * 5;
  for (int step = 0; step < kSteps; ++step) {
    mixture_at(x, logits, means, log_scales, o, w);
    alignas(64) T moves[Lanes];
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T residual = w.m[i] - target[i];
      low[i] = residual <= T(0) ? x[i] : low[i];
      high[i] = residual >= T(0) ? x[i] : high[i];
      const T newton = x[i] - residual * math::exp(-w.log_slope[i]);
      const bool good = newton >= low[i] && newton <= high[i] && math::abs(residual) <= T(0.5) * last[i];
      const T middle = T(0.5) * low[i] + T(0.5) * high[i];
      const T next = good ? newton : middle;
      const T least = eps * math::abs(x[i]);
      const bool done = math::abs(next - x[i]) <= least || high[i] - low[i] <= least || residual == T(0);
      last[i] = math::abs(residual);
      x[i] = open[i] > T(0) && residual != T(0) ? next : x[i];
      // A NaN ends the search: no step can repair it.
      open[i] = done || math::is_nan(residual) ? T(0) : open[i];
      moves[i] = open[i];
    }
    T any = T(0);
    for (int i = 0; i < Lanes; ++i) any += moves[i];
    if (any == T(0)) break;
  }
}

// sigma, log sigma and its slope of every lane: the law is looked up before, so that the mixture is compiled once and
// not once per law.
template <class T, int Lanes>
struct LaneScales {
  alignas(64) T sigma[Lanes], log_sigma[Lanes], slope[Lanes];
};

template <Law L, int Lanes, class T>
FK_INLINE void lane_scales(const T* u, const LawParameters<T>& law, LaneScales<T, Lanes>& out) {
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const Scale<T> s = scale_of<L>(u[i], law);
    out.sigma[i] = s.sigma;
    out.log_sigma[i] = s.log_sigma;
    out.slope[i] = scale_slope<L>(u[i], law);
  }
}

template <bool Inverse, int Lanes, class T, class Kept>
FK_INLINE void mixture_lanes(const T* x, const T* parameters, const MixtureOptions<T>& o, const LaneScales<T, Lanes>& s,
                             MixtureWork<T, Lanes, Kept>& w, T* y, T* logdet) {
  const int K = o.components;
  const T *shift = parameters, *logits = parameters + 2 * Lanes, *means = logits + K * Lanes,
          *log_scales = means + K * Lanes;
  mixture_scales(log_scales, o, w);
  if constexpr (Inverse) {
    alignas(64) T target[Lanes];
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) target[i] = (x[i] - shift[i]) / s.sigma[i];
    mixture_solve(target, logits, means, log_scales, o, w, y);
    mixture_at(y, logits, means, log_scales, o, w);
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) logdet[i] = -w.log_slope[i] - s.log_sigma[i];
  } else {
    mixture_at(x, logits, means, log_scales, o, w);
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      y[i] = s.sigma[i] * w.m[i] + shift[i];
      logdet[i] = w.log_slope[i] + s.log_sigma[i];
    }
  }
}

// Gradients, from x and y of the forward direction: the solution is not sought again. For the inverse, with m the
// forward transform at fixed parameters and l its log slope, dx = (dm - m_parameters) / m_x (implicit function
// theorem). Gradients may be written over the parameters.
template <bool Inverse, int Lanes, class T, class Kept>
FK_INLINE void mixture_backward_lanes(const T* grad_out, const T* grad_logdet, const T* x, const T* parameters,
                                      const MixtureOptions<T>& o, const LaneScales<T, Lanes>& s,
                                      MixtureWork<T, Lanes, Kept>& w, T* grad_in, T* grad_parameters) {
  const int K = o.components;
  const T *logits = parameters + 2 * Lanes, *means = logits + K * Lanes, *log_scales = means + K * Lanes;
  T *g_shift = grad_parameters, *g_scale = grad_parameters + Lanes, *g_logits = grad_parameters + 2 * Lanes,
    *g_means = g_logits + K * Lanes, *g_log_scales = g_means + K * Lanes;
  mixture_scales(log_scales, o, w);
  mixture_at(x, logits, means, log_scales, o, w);
  alignas(64) T gm[Lanes], gl[Lanes], gx[Lanes], rate[Lanes], above[Lanes];
  if constexpr (Inverse) {
    // d log slope / dx first: the total derivative of the outputs along x.
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) rate[i] = T(0);
    for (int k = 0; k < K; ++k) {
      const MixtureComponent<T, Lanes> of(logits, means, log_scales, k);
      const auto inverse_scale = w.inverse_scale + k * Lanes;
      FK_SIMD
      for (int i = 0; i < Lanes; ++i) {
        const T inv = inverse_scale[i];
        const MixtureTerms<T> t =
            mixture_terms(x[i], of.logit[i], of.mean[i], math::max(o.min_log_scale, of.log_scale[i]), inv, w, i);
        const T p = t.below / w.below[i], q = t.above / w.above[i], r = t.density / w.density[i];
        rate[i] += inv * ((q - r) * t.up - (p - r) * t.down);
      }
    }
  }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    const T sigma = s.sigma[i], slope = s.slope[i];
    if constexpr (Inverse) {
      const T along = grad_out[i] - grad_logdet[i] * rate[i];
      // Between far components m is flat and 1 / m_x overflows; what nothing depends on stays zero.
      const T gz = along == T(0) ? T(0) : along * math::exp(-w.log_slope[i]);
      grad_in[i] = gz / sigma;
      g_shift[i] = -grad_in[i];
      g_scale[i] = -(gz * w.m[i] + grad_logdet[i]) * slope;
      gm[i] = -gz;
      gl[i] = -grad_logdet[i];
    } else {
      gm[i] = grad_out[i] * sigma;
      gl[i] = grad_logdet[i];
      g_shift[i] = grad_out[i];
      g_scale[i] = (gm[i] * w.m[i] + gl[i]) * slope;
    }
    gx[i] = T(0);
    above[i] = math::sigmoid(-w.m[i]);
  }
  for (int k = 0; k < K; ++k) {
    const MixtureComponent<T, Lanes> of(logits, means, log_scales, k);
    const auto inverse_scale = w.inverse_scale + k * Lanes;
    T *const g_logit = g_logits + k * Lanes, *const g_mean = g_means + k * Lanes;
    T* const g_log_scale = g_log_scales + k * Lanes;
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T inv = inverse_scale[i];
      const MixtureTerms<T> t =
          mixture_terms(x[i], of.logit[i], of.mean[i], math::max(o.min_log_scale, of.log_scale[i]), inv, w, i);
      // Shares of the component in P, Q and the density; its weight is p P + q Q, which makes pi - p = Q (q - p).
      const T p = t.below / w.below[i], q = t.above / w.above[i], r = t.density / w.density[i];
      const T a = gm[i] * (p * t.down + q * t.up) + gl[i] * ((q - r) * t.up - (p - r) * t.down);
      gx[i] += a * inv;
      g_mean[i] = -a * inv;
      g_logit[i] = gm[i] * (p - q) + gl[i] * ((r - q) + above[i] * (q - p));
      g_log_scale[i] = of.log_scale[i] < o.min_log_scale ? T(0) : -a * t.v - gl[i] * r;
    }
  }
  if constexpr (!Inverse) {
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) grad_in[i] = gx[i];
  }
}

}  // namespace fk
