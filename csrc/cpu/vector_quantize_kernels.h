// Kernels of vector_quantize for one instruction set; included by foreach_isa.h.
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// The nearest code of a few samples at a time: samples side by side in a vector, `kCodes` dot products in
// registers, each code's coefficient broadcast from the packed codebook. Only the best score and its code
// ever leave the registers.
template <class T>
struct Search {
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Index IndexVector __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr int kSamples = FK_VECTOR_BYTES / sizeof(T);
  static constexpr int kCodes = FK_VECTOR_BYTES == 64 ? kPanel : kPanel / 2;

  // samples: (features, kSamples), in vectors. Writes the codes of the kSamples samples.
  static void nearest(const QuantizeArguments<T>& a, const Vector* samples, int64_t* codes) {
    Vector best = Vector{} + std::numeric_limits<T>::infinity();
    IndexVector where = {};
    for (int64_t first = 0; first < a.codes; first += kCodes) {
      const T* panel = a.packed + first / kPanel * kPanel * a.features + first % kPanel;
      Vector dot[kCodes] = {};
      for (int64_t f = 0; f < a.features; ++f) {
        const Vector x = samples[f];
        const T* code = panel + f * kPanel;
#pragma GCC unroll 16
        for (int j = 0; j < kCodes; ++j) dot[j] += x * code[j];
      }
#pragma GCC unroll 16
      for (int j = 0; j < kCodes; ++j) {
        // |x - e|^2 / 2 up to the sample's own |x|^2 / 2; the first of equal codes wins, padding has an
        // infinite norm.
        const Vector score = a.half_norm[first + j] - dot[j];
        const IndexVector closer = score < best;
        best = closer ? score : best;
        where = closer ? IndexVector{} + static_cast<Index>(first + j) : where;
      }
    }
    for (int i = 0; i < kSamples; ++i) codes[i] = where[i];
  }
};

// sum (x - e)^2.
template <class T>
FK_INLINE T squared_distance(const T* x, int64_t stride, const T* e, int64_t features, T* scratch) {
  copy_to(scratch, x, stride, features);
  for (int64_t f = 0; f < features; ++f) scratch[f] = (scratch[f] - e[f]) * (scratch[f] - e[f]);
  return sum_of_row(static_cast<const T*>(scratch), features);
}

template <class T>
void vector_quantize(const QuantizeArguments<T>& a, int64_t begin, int64_t end) {
  using S = Search<T>;
  using Vector = typename S::Vector;
  // Over-aligned by hand: one vector to spare.
  std::vector<T> memory((a.features + 1) * S::kSamples);
  void* start = memory.data();
  std::size_t space = memory.size() * sizeof(T);
  Vector* samples = static_cast<Vector*>(std::align(sizeof(Vector), a.features * sizeof(Vector), start, space));
  std::vector<T> scratch(a.features);
  T* transposed = reinterpret_cast<T*>(samples);
  for (int64_t first = begin; first < end; first += S::kSamples) {
    const int64_t rows = std::min<int64_t>(S::kSamples, end - first);
    for (int64_t i = 0; i < S::kSamples; ++i) {
      const T* x = &a.x(first + std::min(i, rows - 1), 0);
      for (int64_t f = 0; f < a.features; ++f) transposed[f * S::kSamples + i] = x[f * a.x.column];
    }
    int64_t codes[S::kSamples];
    S::nearest(a, samples, codes);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = first + i;
      const T* code = a.codebook + codes[i] * a.features;
      a.index[r] = codes[i];
      if (!a.quantized) continue;
      a.distance[r] = squared_distance(&a.x(r, 0), a.x.column, code, a.features, scratch.data());
      std::copy(code, code + a.features, a.quantized + r * a.features);
    }
  }
}

// grad_x = grad_quantized + 2 commitment grad_loss (x - e), one row after the other.
template <class T>
void vector_quantize_grad_x(const QuantizeArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* code = a.codebook + a.index_in[r] * a.features;
    const T scale = T(2) * a.weight * a.grad_loss[r];
    T* out = a.quantized + r * a.features;
    copy_to(out, &a.x(r, 0), a.x.column, a.features);
    for (int64_t f = 0; f < a.features; ++f) out[f] = scale * (out[f] - code[f]);
    add_to(out, &a.grad_quantized(r, 0), a.grad_quantized.column, a.features);
  }
}

// For the features begin .. end - 1 (in kLanes) of every code: the sum of what its samples bring, in the
// samples' order, so threads share no sum. Sums: x itself; gradient of the codebook: -2 weight grad_loss (x -
// e).
template <class T>
void vector_quantize_sums(const QuantizeArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t f = block * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, a.features - f));
    for (int64_t k = 0; k < a.codes; ++k) std::fill(a.sums + k * a.features + f, a.sums + k * a.features + f + n, T(0));
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t k = a.index_in[r];
      T* sum = a.sums + k * a.features + f;
      if (a.grad_loss) {
        const T* code = a.codebook + k * a.features + f;
        const T scale = T(-2) * a.weight * a.grad_loss[r];
        for (int i = 0; i < n; ++i) sum[i] += scale * (a.x(r, f + i) - code[i]);
      } else {
        add_to(sum, &a.x(r, f), a.x.column, n);
      }
    }
  }
}

}  // namespace fk::FK_ISA
