// Kernels of gumbel_softmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// z = softmax((z - m) / tau) written to y, where m is the maximum of z. z is overwritten, and may be y.
template <class T>
FK_INLINE void softmax_row(T* z, T* y, int64_t classes, T m, T tau) {
  // A subnormal tau must not make inf * 0 out of the maximum itself.
  const T inverse = math::min(std::numeric_limits<T>::max(), T(1) / tau);
  T sum[kLanes] = {};
  for (int64_t c = 0; c < classes; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, classes - c));
    T e[kLanes];
    load_lanes(e, z + c, 1, n, -std::numeric_limits<T>::infinity());
    for (int i = 0; i < kLanes; ++i) {
      e[i] = math::exp((e[i] - m) * inverse);
      sum[i] += e[i];
    }
    store_lanes(z + c, 1, e, n);
  }
  const T scale = T(1) / sum_of_lanes(sum);
  for (int64_t c = 0; c < classes; ++c) y[c] = z[c] * scale;
}

// z += logits; the maximum of z goes to `lanes` (Hard: the argmax to `argmax`).
template <bool Hard, class T>
FK_INLINE void perturb(T* z, const T* logits, int64_t stride, int64_t begin, int64_t end, T (&lanes)[kLanes],
                       ArgMax<T>& argmax) {
  constexpr T kLow = -std::numeric_limits<T>::infinity();
  for (int64_t c = begin; c < end; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, end - c));
    T l[kLanes];
    load_lanes(l, logits + c * stride, stride, n, kLow);
    T* at = z + (c - begin);
    for (int i = 0; i < kLanes; ++i) l[i] += i < n ? at[i] : T(0);
    if constexpr (Hard) {
      argmax.add(l, static_cast<std::int32_t>(c / kLanes));
    } else {
      for (int i = 0; i < kLanes; ++i) lanes[i] = math::max(lanes[i], l[i]);
      store_lanes(at, 1, l, n);
    }
  }
}

template <bool Hard, class T>
void gumbel_softmax_rows(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  const int64_t classes = a.classes;
  const int64_t rows_per_tile = std::max<int64_t>(1, tile.kElements / classes);
  for (int64_t first = begin; first < end; first += rows_per_tile) {
    const int64_t rows = std::min(rows_per_tile, end - first);
    const bool whole = classes <= tile.kElements;
    T* noise = whole ? tile.at(first * classes, rows * classes) : nullptr;
    for (int64_t r = first; r < first + rows; ++r) {
      T lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = -std::numeric_limits<T>::infinity();
      ArgMax<T> argmax;
      T* y = &a.y(r, 0);
      T* z = whole ? noise + (r - first) * classes : y;
      if (whole) {
        perturb<Hard>(z, &a.logits(r, 0), a.logits.column, 0, classes, lanes, argmax);
      } else {
        // A row longer than a tile: perturbed logits wait in y.
        for (int64_t c = 0; c < classes; c += tile.kElements) {
          const int64_t n = std::min<int64_t>(tile.kElements, classes - c);
          T* piece = tile.at(r * classes + c, n);
          perturb<Hard>(piece, &a.logits(r, 0), a.logits.column, c, c + n, lanes, argmax);
          if constexpr (!Hard) std::copy(piece, piece + n, y + c);
        }
      }
      if constexpr (Hard)
        store_one_hot(y, classes, argmax.index(), argmax.proper());
      else
        softmax_row(z, y, classes, max_of_lanes(lanes), a.tau[r * a.tau_stride]);
    }
  }
}

template <class T>
void gumbel_softmax(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  a.hard ? gumbel_softmax_rows<true>(a, begin, end) : gumbel_softmax_rows<false>(a, begin, end);
}

// grad_logits = (y / tau) (grad - sum y grad);  grad_tau = -sum grad_logits log y.
// (The perturbed logits are tau log y up to a constant, and grad_logits sums to zero: no noise is needed.)
template <bool ForTau, class T>
void gumbel_softmax_backward_rows(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* y = &a.y_in(r, 0);
    const T* grad = &a.grad(r, 0);
    const T inverse = math::min(std::numeric_limits<T>::max(), T(1) / a.tau[r * a.tau_stride]);
    T dot[kLanes] = {}, tau[kLanes] = {};
    for (int64_t c = 0; c < a.classes; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.classes - c));
      T p[kLanes], g[kLanes];
      load_lanes(p, y + c * a.y_in.column, a.y_in.column, n, T(0));
      load_lanes(g, grad + c * a.grad.column, a.grad.column, n, T(0));
      for (int i = 0; i < kLanes; ++i) dot[i] += p[i] * g[i];
    }
    const T mean = sum_of_lanes(dot);
    for (int64_t c = 0; c < a.classes; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.classes - c));
      T p[kLanes], g[kLanes];
      load_lanes(p, y + c * a.y_in.column, a.y_in.column, n, T(0));
      load_lanes(g, grad + c * a.grad.column, a.grad.column, n, T(0));
      for (int i = 0; i < kLanes; ++i) {
        g[i] = (p[i] * inverse) * (g[i] - mean);
        if constexpr (ForTau) tau[i] -= g[i] * math::log(math::max(std::numeric_limits<T>::min(), p[i]));
      }
      store_lanes(&a.y(r, c), a.y.column, g, n);
    }
    if constexpr (ForTau) a.grad_tau[r] = sum_of_lanes(tau);
  }
}

template <class T>
void gumbel_softmax_backward(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  a.grad_tau ? gumbel_softmax_backward_rows<true>(a, begin, end) : gumbel_softmax_backward_rows<false>(a, begin, end);
}

}  // namespace fk::FK_ISA
