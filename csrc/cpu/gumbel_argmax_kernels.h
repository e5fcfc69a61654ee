// Kernels of gumbel_argmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// The maximum m of each of a few rows, and log sum exp(l - m) as log1p of what the others add to the maximum's own 1:
// the log-probability of a category that is nearly certain keeps its digits. `scratch` is for the exponentials.
template <class T>
FK_INLINE void normalisers(const ArgmaxArguments<T>& a, int64_t first, int64_t rows, T* scratch) {
  const int64_t classes = a.classes;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = scratch + r * classes;
    copy_to(row, &a.logits(first + r, 0), a.logits.column, classes);
    ArgMax<T> argmax;
    argmax.add(row, 0, classes);
    const int64_t top = argmax.index();
    const T m = row[top];
    for (int64_t c = 0; c < classes; ++c) row[c] -= m;
    // Where m is finite, its own term is taken out; an infinite one leaves its NaN.
    if (row[top] == T(0)) row[top] = -std::numeric_limits<T>::infinity();
    a.normaliser[2 * (first + r)] = m;
  }
  exp_in_place(scratch, rows * classes);
  for (int64_t r = 0; r < rows; ++r)
    a.normaliser[2 * (first + r) + 1] = math::log1p(sum_of_row(static_cast<const T*>(scratch + r * classes), classes));
}

template <class T>
void gumbel_argmax(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = NoiseTile<Noise::gumbel, T>::kElements;
  const int64_t classes = a.classes, piece = std::min(kTile, classes), step = std::max<int64_t>(1, kTile / classes);
  std::vector<T> scratch(step * classes);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first);
    normalisers(a, first, rows, scratch.data());
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
        a.log_prob[r * a.samples + s] = (a.logits(r, index) - a.normaliser[2 * r]) - a.normaliser[2 * r + 1];
      }
    }
  }
}

// The log-probability's derivative: for each category, the gradients of the samples that are it, minus all of them
// times its probability.
template <class T>
void gumbel_argmax_backward(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  std::vector<T> drawn(a.classes);
  for (int64_t r = begin; r < end; ++r) {
    const T m = a.normaliser_in[2 * r], log_sum = a.normaliser_in[2 * r + 1];
    T total = T(0);
    for (int64_t s = 0; s < a.samples; ++s) {
      total += a.grad(r, s);
      drawn[a.index_in(r, s)] += a.grad(r, s);
    }
    T* out = &a.grad_logits(r, 0);
    copy_to(out, &a.logits(r, 0), a.logits.column, a.classes);
    const T* own = drawn.data();
    for (int64_t c = 0; c < a.classes; ++c) out[c] = own[c] - total * math::exp((out[c] - m) - log_sum);
    for (int64_t s = 0; s < a.samples; ++s) drawn[a.index_in(r, s)] = T(0);
  }
}

}  // namespace fk::FK_ISA
