// Kernels of gumbel_softmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// a / b by way of its rounded reciprocal: with a fused multiply-add as exact as the division, and much
// cheaper.
template <class T>
FK_INLINE T divide(T a, T b, T reciprocal) {
  const T q = a * reciprocal;
  return q + (a - q * b) * reciprocal;
}

// A subnormal tau would have an infinite reciprocal; at the smallest normal one the softmax is one-hot
// already.
template <class T>
FK_INLINE T usable(T tau) {
  return math::max(std::numeric_limits<T>::min(), tau);
}

// z = (z - max z) / tau, what the softmax exponentiates. A maximum of +-inf leaves a NaN, as it should.
template <class T>
FK_INLINE void normalise_row(T* z, int64_t classes, T tau) {
  const T m = max_of_row(z, classes), t = usable(tau), reciprocal = T(1) / t;
  // e^-2000 is 0 in every type; cut off there, -inf does not turn the remainder of the division into a NaN.
  const T low = math::max(-std::numeric_limits<T>::max(), T(-2000) * t);
  for (int64_t c = 0; c < classes; ++c) z[c] = divide(math::max(low, z[c] - m), t, reciprocal);
}

template <class T>
FK_INLINE void divide_by_sum(const T* e, T* y, int64_t classes) {
  const T sum = sum_of_row(e, classes), reciprocal = T(1) / sum;
  for (int64_t c = 0; c < classes; ++c) y[c] = divide(e[c], sum, reciprocal);
}

// Rows that fit into a tile: noise, logits, exponentials and their sum all happen in the first-level cache.
template <bool Hard, class T>
void gumbel_softmax_short(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  const int64_t classes = a.classes, step = tile.kElements / classes;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first);
    T* z = tile.at(first * classes, rows * classes);
    for (int64_t r = 0; r < rows; ++r) {
      T* row = z + r * classes;
      add_to(row, &a.logits(first + r, 0), a.logits.column, classes);
      if constexpr (Hard) {
        ArgMax<T> argmax;
        argmax.add(row, 0, classes);
        store_one_hot(&a.y(first + r, 0), classes, argmax.index(), argmax.proper());
      } else {
        normalise_row(row, classes, a.tau[(first + r) * a.tau_stride]);
      }
    }
    if constexpr (!Hard) {
      exp_in_place(z, rows * classes);
      for (int64_t r = 0; r < rows; ++r) divide_by_sum(z + r * classes, &a.y(first + r, 0), classes);
    }
  }
}

// Rows longer than a tile: the perturbed logits wait in y.
template <bool Hard, class T>
void gumbel_softmax_long(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  for (int64_t r = begin; r < end; ++r) {
    T* y = &a.y(r, 0);
    ArgMax<T> argmax;
    for (int64_t c = 0; c < a.classes; c += tile.kElements) {
      const int64_t n = std::min<int64_t>(tile.kElements, a.classes - c);
      T* z = tile.at(r * a.classes + c, n);
      add_to(z, &a.logits(r, c), a.logits.column, n);
      if constexpr (Hard)
        argmax.add(z, c, n);
      else
        copy_to(y + c, z, 1, n);
    }
    if constexpr (Hard) {
      store_one_hot(y, a.classes, argmax.index(), argmax.proper());
    } else {
      normalise_row(y, a.classes, a.tau[r * a.tau_stride]);
      exp_in_place(y, a.classes);
      divide_by_sum(y, y, a.classes);
    }
  }
}

template <class T>
void gumbel_softmax(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  if (a.classes <= NoiseTile<Noise::gumbel, T>::kElements)
    a.hard ? gumbel_softmax_short<true>(a, begin, end) : gumbel_softmax_short<false>(a, begin, end);
  else
    a.hard ? gumbel_softmax_long<true>(a, begin, end) : gumbel_softmax_long<false>(a, begin, end);
}

// grad_logits = (y / tau) (grad - sum y grad);  grad_tau = -sum grad_logits log(y / max y).
// (The perturbed logits are tau log y up to a constant, and grad_logits sums to zero: no noise is needed.)
template <class T>
void gumbel_softmax_backward(const GumbelArguments<T>& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  // y and grad are read in place where they are contiguous, through copies elsewhere.
  std::vector<T> copies(3 * a.classes);
  T *y_copy = copies.data(), *grad_copy = y_copy + a.classes, *terms = grad_copy + a.classes;
  for (int64_t r = begin; r < end; ++r) {
    const T *y = &a.y_in(r, 0), *grad = &a.grad(r, 0);
    if (a.y_in.column != 1) {
      copy_to(y_copy, y, a.y_in.column, a.classes);
      y = y_copy;
    }
    if (a.grad.column != 1) {
      copy_to(grad_copy, grad, a.grad.column, a.classes);
      grad = grad_copy;
    }
    // grad counts from its value at the largest y: near one-hot, that y has an absolute rounding error as
    // large as all the others together, and so its term must not enter the mean.
    ArgMax<T> argmax;
    argmax.add(y, 0, a.classes);
    const T origin = a.classes > 0 ? grad[argmax.index()] : T(0);
    typename L::Vector dot[L::kVectors] = {};
    int64_t c = 0;
    for (; c + kLanes <= a.classes; c += kLanes)
      for (int v = 0; v < L::kVectors; ++v)
        dot[v] += L::load(y + c + v * L::kWidth) * (L::load(grad + c + v * L::kWidth) - origin);
    T lanes[kLanes], mean = T(0);
    std::memcpy(lanes, dot, sizeof(lanes));
    for (int i = 0; i < kLanes; ++i) mean += lanes[i];
    for (; c < a.classes; ++c) mean += y[c] * (grad[c] - origin);

    const T tau = usable(a.tau[r * a.tau_stride]);
    T* out = &a.y(r, 0);
    for (int64_t i = 0; i < a.classes; ++i) out[i] = y[i] / tau * ((grad[i] - origin) - mean);
    if (a.grad_tau) {
      constexpr T kTiny = std::numeric_limits<T>::min();
      const T highest = a.classes > 0 ? math::log(y[argmax.index()]) : T(0);
      for (int64_t i = 0; i < a.classes; ++i) terms[i] = -out[i] * (math::log(math::max(kTiny, y[i])) - highest);
      a.grad_tau[r] = sum_of_row(terms, a.classes);
    }
  }
}

}  // namespace fk::FK_ISA
