// Kernels of gumbel_argmax for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// The maximum m of each of a few rows, and log sum exp(l - m) as log1p of what the others add to the maximum's own 1:
// the log-probability of a category that is nearly certain keeps its digits. Leaves exp(l - m) in `scratch`.
template <class T>
FK_INLINE void normalisers(const ArgmaxArguments<T>& a, int64_t first, int64_t rows, T* scratch) {
  const int64_t classes = a.classes;
  std::vector<int64_t> tops(rows);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = scratch + r * classes;
    copy_to(row, &a.logits(first + r, 0), a.logits.column, classes);
    ArgMax<T> argmax;
    argmax.add(row, 0, classes);
    const int64_t top = tops[r] = argmax.index();
    const T m = row[top];
    for (int64_t c = 0; c < classes; ++c) row[c] -= m;
    // Where m is finite, its own term is taken out; an infinite one leaves its NaN.
    if (row[top] == T(0)) row[top] = -std::numeric_limits<T>::infinity();
    a.normaliser[2 * (first + r)] = m;
  }
  exp_in_place(scratch, rows * classes);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = scratch + r * classes;
    a.normaliser[2 * (first + r) + 1] = math::log1p(sum_of_row(static_cast<const T*>(row), classes));
    if (row[tops[r]] == T(0)) row[tops[r]] = T(1);
  }
}

template <class T>
FK_INLINE void store_sample(const ArgmaxArguments<T>& a, int64_t r, int64_t sample, int64_t index) {
  a.index[sample] = index;
  a.log_prob[sample] = (a.logits(r, index) - a.normaliser[2 * r]) - a.normaliser[2 * r + 1];
}

template <class T>
void gumbel_argmax(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = NoiseTile<Noise::gumbel, T>::kElements;
  const int64_t classes = a.classes, piece = std::min(kTile, classes), step = std::max<int64_t>(1, kTile / classes);
  std::vector<T> scratch(step * classes);
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first);
    normalisers(a, first, rows, scratch.data());
    T* several = classes <= kTile ? tile.at(first * classes, rows * classes) : nullptr;
    for (int64_t r = first; r < first + rows; ++r) {
      ArgMax<T> argmax;
      for (int64_t c = 0; c < classes; c += piece) {
        const int64_t n = std::min(piece, classes - c);
        T* z = several ? several + (r - first) * classes : tile.at(r * classes + c, n);
        add_to(z, &a.logits(r, c), a.logits.column, n);
        argmax.add(z, c, n);
      }
      store_sample(a, r, r, argmax.index());
    }
  }
}

// Sums of p[0 .. i] for each i. Four at a time, for one addition after the other waits for its result.
template <class T>
FK_INLINE void cumulate(const T* p, double* sums, int64_t n) {
  double before = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const double first = p[i], second = first + p[i + 1], third = p[i + 2], fourth = third + p[i + 3];
    sums[i] = before + first;
    sums[i + 1] = before + second;
    sums[i + 2] = before + (second + third);
    before = sums[i + 3] = before + (second + fourth);
  }
  for (; i < n; ++i) before = sums[i] = before + p[i];
}

// Several samples of a row: where uniform numbers fall among the cumulated probabilities.
template <class T>
void gumbel_argmax_several(const ArgmaxArguments<T>& a, int64_t begin, int64_t end) {
  using Words = NoiseTile<Noise::bits, std::uint32_t>;
  constexpr int64_t kDrawn = Words::kElements / 2, kTogether = 16;
  const int64_t classes = a.classes, step = std::max<int64_t>(1, Words::kElements / classes);
  std::vector<T> scratch(step * classes);
  std::vector<double> sums(step * classes);
  Words tile(a.stream);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first), base = first * a.samples, count = rows * a.samples;
    normalisers(a, first, rows, scratch.data());
    for (int64_t r = 0; r < rows; ++r) cumulate(&scratch[r * classes], &sums[r * classes], classes);
    const std::uint32_t* words = nullptr;
    int64_t row = 0, s = 0;
    for (int64_t i = 0; i < count; i += kTogether) {
      if (i % kDrawn == 0) words = tile.at(2 * (base + i), 2 * std::min(kDrawn, count - i));
      // The first sum above `at`, for several samples whose searches need not wait for each other.
      double at[kTogether] = {};
      int64_t rows_of[kTogether] = {}, low[kTogether] = {};
      const int64_t together = std::min(kTogether, count - i);
      for (int64_t l = 0; l < together; ++l) {
        const std::uint32_t* word = words + 2 * (i % kDrawn + l);
        rows_of[l] = row;
        low[l] = row * classes;
        at[l] = sums[low[l] + classes - 1] * uniform_of_words(word[0], word[1]);
        if (++s == a.samples) ++row, s = 0;
      }
      for (int64_t n = classes; n > 1; n -= n / 2)
        for (int64_t l = 0; l < kTogether; ++l) low[l] += sums[low[l] + n / 2 - 1] <= at[l] ? n / 2 : 0;
      for (int64_t l = 0; l < together; ++l)
        store_sample(a, first + rows_of[l], base + i + l, low[l] - rows_of[l] * classes);
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
