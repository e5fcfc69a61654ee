// Kernels of gumbel_argmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// argmax(logits + noise) over the columns begin .. end - 1, whose noise begins at `noise`.
template <class T>
FK_INLINE void add_perturbed(ArgMax<T>& argmax, const T* noise, const T* logits, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, end - c));
    T l[kLanes];
    load_lanes(l, logits + c * stride, stride, n, -std::numeric_limits<T>::infinity());
    for (int i = 0; i < kLanes; ++i) l[i] += i < n ? noise[c - begin + i] : T(0);
    argmax.add(l, static_cast<std::int32_t>(c / kLanes));
  }
}

template <class T>
FK_INLINE T log_sum_exp(const T* logits, int64_t stride, int64_t classes) {
  constexpr T kLow = -std::numeric_limits<T>::infinity();
  T top[kLanes], sum[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) top[i] = kLow;
  for (int64_t c = 0; c < classes; c += kLanes) {
    T l[kLanes];
    load_lanes(l, logits + c * stride, stride, static_cast<int>(std::min<int64_t>(kLanes, classes - c)), kLow);
    for (int i = 0; i < kLanes; ++i) top[i] = math::max(top[i], l[i]);
  }
  const T m = max_of_lanes(top);
  for (int64_t c = 0; c < classes; c += kLanes) {
    T l[kLanes];
    load_lanes(l, logits + c * stride, stride, static_cast<int>(std::min<int64_t>(kLanes, classes - c)), kLow);
    for (int i = 0; i < kLanes; ++i) sum[i] += math::exp(l[i] - m);
  }
  return m + math::log(sum_of_lanes(sum));
}

template <class T>
void gumbel_argmax(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t classes = a.classes, kTile = NoiseTile<Noise::gumbel, T>::kElements;
  const bool whole = classes <= kTile;
  const int64_t rows_per_tile = std::max<int64_t>(1, kTile / classes);
  for (int64_t first = begin; first < end; first += rows_per_tile) {
    const int64_t rows = std::min(rows_per_tile, end - first);
    for (int64_t r = first; r < first + rows; ++r)
      a.logsumexp[r] = log_sum_exp(&a.logits(r, 0), a.logits.column, classes);
    for (int64_t s = 0; s < a.samples; ++s) {
      NoiseTile<Noise::gumbel, T> tile({a.stream.seed, a.stream.stream + static_cast<std::uint64_t>(s)});
      const T* noise = whole ? tile.at(first * classes, rows * classes) : nullptr;
      for (int64_t r = first; r < first + rows; ++r) {
        ArgMax<T> argmax;
        const T* logits = &a.logits(r, 0);
        if (whole) {
          add_perturbed(argmax, noise + (r - first) * classes, logits, a.logits.column, 0, classes);
        } else {
          for (int64_t c = 0; c < classes; c += kTile) {
            const int64_t n = std::min<int64_t>(kTile, classes - c);
            add_perturbed(argmax, tile.at(r * classes + c, n), logits, a.logits.column, c, c + n);
          }
        }
        const int64_t index = argmax.index();
        a.index[r * a.samples + s] = index;
        a.log_prob[r * a.samples + s] = logits[index * a.logits.column] - a.logsumexp[r];
      }
    }
  }
}

// The log-probability's derivative: sum over samples of grad (one-hot - softmax).
template <class T>
void gumbel_argmax_backward(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T total = T(0);
    for (int64_t s = 0; s < a.samples; ++s) total += a.grad(r, s);
    for (int64_t c = 0; c < a.classes; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.classes - c));
      T l[kLanes];
      load_lanes(l, &a.logits(r, c), a.logits.column, n, -std::numeric_limits<T>::infinity());
      for (int i = 0; i < kLanes; ++i) l[i] = -total * math::exp(l[i] - a.logsumexp_in[r]);
      store_lanes(&a.grad_logits(r, c), a.grad_logits.column, l, n);
    }
    for (int64_t s = 0; s < a.samples; ++s) a.grad_logits(r, a.index_in(r, s)) += a.grad(r, s);
  }
}

}  // namespace fk::FK_ISA
