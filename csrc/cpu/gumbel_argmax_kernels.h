// Kernels of gumbel_argmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// log sum exp of each of a few rows, with `scratch` for the exponentials of all of them.
template <class T>
FK_INLINE void log_sum_exp(const ArgmaxArguments<T>& a, int64_t first, int64_t rows, T* scratch) {
  const int64_t classes = a.classes;
  T* top = a.logsumexp + first;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = scratch + r * classes;
    copy_to(row, &a.logits(first + r, 0), a.logits.column, classes);
    top[r] = max_of_row(row, classes);
    for (int64_t c = 0; c < classes; ++c) row[c] -= top[r];
  }
  exp_in_place(scratch, rows * classes);
  for (int64_t r = 0; r < rows; ++r) top[r] += math::log(sum_of_row(scratch + r * classes, classes));
}

template <class T>
void gumbel_argmax(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = NoiseTile<Noise::gumbel, T>::kElements;
  const int64_t classes = a.classes, piece = std::min(kTile, classes),
                step = std::max<int64_t>(1, kTile / classes);
  std::vector<T> scratch(step * classes);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first);
    log_sum_exp(a, first, rows, scratch.data());
    for (int64_t s = 0; s < a.samples; ++s) {
      NoiseTile<Noise::gumbel, T> tile({a.stream.seed, a.stream.stream + static_cast<std::uint64_t>(s)});
      T* several = classes <= kTile ? tile.at(first * classes, rows * classes) : nullptr;
      for (int64_t r = first; r < first + rows; ++r) {
        ArgMax<T> argmax;
        for (int64_t c = 0; c < classes; c += piece) {
          const int64_t n = std::min(piece, classes - c);
          T* z = several ? several + (r - first) * classes : tile.at(r * classes + c, n);
          add_to(z, &a.logits(r, c), a.logits.column, n);
          argmax.add(z, c, n);
        }
        const int64_t index = argmax.index();
        a.index[r * a.samples + s] = index;
        a.log_prob[r * a.samples + s] = a.logits(r, index) - a.logsumexp[r];
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
    T* out = &a.grad_logits(r, 0);
    copy_to(out, &a.logits(r, 0), a.logits.column, a.classes);
    for (int64_t c = 0; c < a.classes; ++c) out[c] = -total * math::exp(out[c] - a.logsumexp_in[r]);
    for (int64_t s = 0; s < a.samples; ++s) out[a.index_in(r, s)] += a.grad(r, s);
  }
}

}  // namespace fk::FK_ISA
