// The mixture-of-logistics transform of Flow++, both directions and their derivatives, for `Lanes` elements at once:
//
//   P = sum_k pi_k sigmoid(v_k),  Q = 1 - P = sum_k pi_k sigmoid(-v_k),  v_k = (x - mean_k) / s_k
//   m = log P - log Q             y = sigma m + shift             log dm/dx = log(sum_k pi_k sigmoid(v_k) sigmoid(-v_k) / s_k) - log P - log Q
//
// Parameters of an element are rows, [parameter][lane]: shift, scale, K logits of pi, K means, K logarithms of s. Each of the
// three sums is taken relative to its largest term, so neither tail nor the gap between far components underflows; pi is
// not normalised, because P + Q is what its sum would be.
#pragma once
#include "common/lanes.h"
#include "common/scales.h"

namespace fk {

inline constexpr int kMaxComponents = 64;

template <class T>
struct MixtureOptions {
  int components;
  T min_log_scale;  // s_k >= exp(min_log_scale)
};

template <class T, int Lanes>
struct MixtureWork {
  alignas(64) T inverse_scale[kMaxComponents * Lanes];
  alignas(64) T m[Lanes], log_slope[Lanes];                      // the transform and the logarithm of its derivative
  alignas(64) T below[Lanes], above[Lanes], density[Lanes];      // log P, log Q and log of the density, pi not normalised
  alignas(64) T log_total[Lanes];                                // log of the sum of pi
};

// The sums at x.
template <int Lanes, class T>
FK_INLINE void mixture_at(const T* x, const T* logits, const T* means, const T* log_scales, const MixtureOptions<T>& o,
                          MixtureWork<T, Lanes>& w) {
  alignas(64) T most_below[Lanes], most_above[Lanes], most_density[Lanes], below[Lanes], above[Lanes], density[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    most_below[i] = most_above[i] = most_density[i] = -std::numeric_limits<T>::infinity();
    below[i] = above[i] = density[i] = T(0);
  }
  for (int k = 0; k < o.components; ++k)
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T v = (x[i] - means[k * Lanes + i]) * w.inverse_scale[k * Lanes + i], l = logits[k * Lanes + i];
      most_below[i] = math::max(most_below[i], l + math::min(T(0), v));
      most_above[i] = math::max(most_above[i], l - math::max(T(0), v));
      most_density[i] =
          math::max(most_density[i], l - math::abs(v) - math::max(o.min_log_scale, log_scales[k * Lanes + i]));
    }
  for (int k = 0; k < o.components; ++k)
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T v = (x[i] - means[k * Lanes + i]) * w.inverse_scale[k * Lanes + i], l = logits[k * Lanes + i];
      const T c = T(1) / (T(1) + math::exp(-math::abs(v)));
      below[i] += math::exp(l + math::min(T(0), v) - most_below[i]) * c;
      above[i] += math::exp(l - math::max(T(0), v) - most_above[i]) * c;
      density[i] += math::exp(l - math::abs(v) - math::max(o.min_log_scale, log_scales[k * Lanes + i]) - most_density[i]) *
                    (c * c);
    }
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    w.below[i] = most_below[i] + math::log(below[i]);
    w.above[i] = most_above[i] + math::log(above[i]);
    w.density[i] = most_density[i] + math::log(density[i]);
    const T larger = math::max(w.below[i], w.above[i]), smaller = math::min(w.below[i], w.above[i]);
    w.log_total[i] = larger + math::log1p(math::exp(smaller - larger));
    w.m[i] = w.below[i] - w.above[i];
    // The first difference is of like numbers, the second is at most 0.
    w.log_slope[i] = (w.density[i] - smaller) + (w.log_total[i] - larger);
  }
}

template <int Lanes, class T>
FK_INLINE void mixture_scales(const T* log_scales, const MixtureOptions<T>& o, MixtureWork<T, Lanes>& w) {
  for (int k = 0; k < o.components; ++k)
    FK_SIMD
    for (int i = 0; i < Lanes; ++i)
      w.inverse_scale[k * Lanes + i] = math::exp(-math::max(o.min_log_scale, log_scales[k * Lanes + i]));
}

// x with m(x) = target. At x = mean_k + s_k target component k alone gives the target, so the smallest and the largest of
// these bracket the solution. Newton's step where it stays inside the bracket and has halved the residual, else a
// bisection; a lane stops when its bracket or its step cannot become smaller, and keeps its value while others go on.
template <int Lanes, class T>
FK_INLINE void mixture_solve(const T* target, const T* logits, const T* means, const T* log_scales,
                             const MixtureOptions<T>& o, MixtureWork<T, Lanes>& w, T* x) {
  alignas(64) T low[Lanes], high[Lanes], last[Lanes], open[Lanes];
  FK_SIMD
  for (int i = 0; i < Lanes; ++i) {
    low[i] = std::numeric_limits<T>::infinity();
    high[i] = -low[i];
    last[i] = std::numeric_limits<T>::infinity();
    open[i] = T(1);
  }
  for (int k = 0; k < o.components; ++k)
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T at = means[k * Lanes + i] + target[i] / w.inverse_scale[k * Lanes + i];
      low[i] = math::min(low[i], at);
      high[i] = math::max(high[i], at);
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

// sigma, log sigma and its slope of every lane: the law is looked up before, so that the mixture is compiled once and not
// once per law.
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

template <bool Inverse, int Lanes, class T>
FK_INLINE void mixture_lanes(const T* x, const T* parameters, const MixtureOptions<T>& o, const LaneScales<T, Lanes>& s,
                             T* y, T* logdet) {
  MixtureWork<T, Lanes> w;
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

// Gradients, from x and y of the forward direction: the solution is not sought again. For the inverse, with m the forward
// transform at fixed parameters and l its log slope, dx = (dm - m_parameters) / m_x (implicit function theorem).
template <bool Inverse, int Lanes, class T>
FK_INLINE void mixture_backward_lanes(const T* grad_out, const T* grad_logdet, const T* x, const T* parameters,
                                      const MixtureOptions<T>& o, const LaneScales<T, Lanes>& s, T* grad_in,
                                      T* grad_parameters) {
  MixtureWork<T, Lanes> w;
  const int K = o.components;
  const T *logits = parameters + 2 * Lanes, *means = logits + K * Lanes, *log_scales = means + K * Lanes;
  T *g_shift = grad_parameters, *g_scale = grad_parameters + Lanes, *g_logits = grad_parameters + 2 * Lanes,
    *g_means = g_logits + K * Lanes, *g_log_scales = g_means + K * Lanes;
  mixture_scales(log_scales, o, w);
  mixture_at(x, logits, means, log_scales, o, w);
  alignas(64) T gm[Lanes], gl[Lanes], gx[Lanes], rate[Lanes];
  if constexpr (Inverse) {
    // d log slope / dx first: the total derivative of the outputs along x.
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) rate[i] = T(0);
    for (int k = 0; k < K; ++k)
      FK_SIMD
      for (int i = 0; i < Lanes; ++i) {
        const T inv = w.inverse_scale[k * Lanes + i], v = (x[i] - means[k * Lanes + i]) * inv, l = logits[k * Lanes + i];
        const T e = math::exp(-math::abs(v)), c = T(1) / (T(1) + e);
        const T up = v >= T(0) ? c : e * c, down = v >= T(0) ? e * c : c;  // sigmoid(v), sigmoid(-v)
        const T p = math::exp(l + math::min(T(0), v) - w.below[i]) * c, q = math::exp(l - math::max(T(0), v) - w.above[i]) * c;
        const T r = math::exp(l - math::abs(v) - w.density[i]) * (c * c * inv);
        rate[i] += inv * (r * (down - up) - p * down + q * up);
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
  }
  for (int k = 0; k < K; ++k)
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) {
      const T inv = w.inverse_scale[k * Lanes + i], v = (x[i] - means[k * Lanes + i]) * inv, l = logits[k * Lanes + i];
      const T e = math::exp(-math::abs(v)), c = T(1) / (T(1) + e);
      const T up = v >= T(0) ? c : e * c, down = v >= T(0) ? e * c : c;
      // Shares of the component in P, Q, the density and pi.
      const T p = math::exp(l + math::min(T(0), v) - w.below[i]) * c, q = math::exp(l - math::max(T(0), v) - w.above[i]) * c;
      const T r = math::exp(l - math::abs(v) - w.density[i]) * (c * c * inv), pi = math::exp(l - w.log_total[i]);
      const T a = (gm[i] - gl[i]) * (p * down) + (gm[i] + gl[i]) * (q * up) + gl[i] * (r * (down - up));
      gx[i] += a * inv;
      g_means[k * Lanes + i] = -a * inv;
      g_logits[k * Lanes + i] = gm[i] * (p - q) + gl[i] * (r - p - q + pi);
      g_log_scales[k * Lanes + i] = log_scales[k * Lanes + i] < o.min_log_scale ? T(0) : -a * v - gl[i] * r;
    }
  if constexpr (!Inverse) {
    FK_SIMD
    for (int i = 0; i < Lanes; ++i) grad_in[i] = gx[i];
  }
}

}  // namespace fk
