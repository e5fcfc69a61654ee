// Kernels of masked_linear for one instruction set; included by foreach_isa.h.
#include "cpu/panel_kernels.h"

namespace fk::FK_ISA {

// Rows of lanes from a (samples, columns) matrix, sorted by `perm`; lanes beyond the last sample are zero.
template <class T>
void load_tile(T* rows, View<const T> from, const int64_t* perm, int64_t count, int64_t first, int64_t samples) {
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kLanes; ++i) rows[k * kLanes + i] = i < samples ? from(first + i, perm[k]) : T(0);
}

template <class T>
void masked_linear(const MaskedLinearCall<T>& call, int64_t begin, int64_t end) {
  const Layer& layer = *call.layer;
  T* columns = scratch().template get<T>((layer.columns + kPanelRows) * kLanes);
  T* rows = columns + layer.columns * kLanes;
  const RowsFunction<T> act = activation_function<T>(layer.activation);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kLanes, count = std::min<int64_t>(kLanes, call.samples - first);
    load_tile(columns, call.input, call.column_perm, layer.columns, first, count);
    for (int64_t p = 0; p < layer.panels; ++p) {
      const Panel& panel = layer.panel[p];
      for (int64_t r = 0; r < panel.rows; ++r)
        for (int i = 0; i < kLanes; ++i) rows[r * kLanes + i] = call.bias ? call.bias[layer.perm[panel.row + r]] : T(0);
      multiply_add_rows(rows, call.packed + panel.offset, panel.height, columns, panel.depth, panel.rows);
      act(rows, rows, panel.rows * kLanes);
      for (int64_t r = 0; r < panel.rows; ++r)
        for (int64_t i = 0; i < count; ++i) call.output(first + i, layer.perm[panel.row + r]) = rows[r * kLanes + i];
    }
  }
}

// A matrix (samples, columns), sorted by `perm`, in chunks [chunk][sample][column] as weight_gradient reads them.
template <class T>
void keep_matrix(View<const T> from, const int64_t* perm, int64_t count, int64_t samples, int64_t stride, T* kept,
                 int64_t begin, int64_t end) {
  for (int64_t c = 0; c < count; c += kLanes, kept += stride * kLanes)
    for (int64_t s = begin * kLanes; s < end * kLanes; ++s)
      for (int64_t i = 0; i < kLanes; ++i)
        kept[s * kLanes + i] = s < samples && c + i < count ? from(s, perm[c + i]) : T(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Few samples: products with the weight as it lies, eight rows at a time.

template <class T>
struct FewVectors {
  static constexpr int kPer = FK_VECTOR_BYTES / sizeof(T);
  using Vector = typename VectorOf<T>::type;
  using Unaligned = typename VectorOf<T>::unaligned;
  using Degree = typename FewSamples<T>::Degree;
  typedef Degree Degrees __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef Degree UnalignedDegrees __attribute__((vector_size(FK_VECTOR_BYTES), aligned(sizeof(T))));
};

// Rows of the weight from `first` on. Those beyond the last are like the last, and read nothing.
template <int Rows, class T>
struct WeightRows {
  using V = FewVectors<T>;
  const T* row[Rows];
  typename V::Degree reads[Rows], most = FewSamples<T>::kNothing;

  WeightRows(const FewSamples<T>& f, int64_t first) {
    for (int r = 0; r < Rows; ++r) {
      row[r] = f.row(std::min(first + r, f.outputs - 1));
      reads[r] = f.out[first + r];
      most = std::max(most, reads[r]);
    }
  }

  // Columns k, k + 1, ... of row r where they exist, else zero.
  FK_INLINE typename V::Vector load(int r, int64_t k, typename V::Degrees in) const {
    const typename V::Vector w = *reinterpret_cast<const typename V::Unaligned*>(row[r] + k);
    return in <= reads[r] ? w : typename V::Vector{};
  }
};

// Lanes of a and b, added in pairs that lie W apart: a's sums come where bit W of the lane's index is clear.
template <int W, class V, int... J>
FK_INLINE V add_pairs(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int N = sizeof...(J);
  return __builtin_shufflevector(a, b, (J & W ? N + J - W : J)...) +
         __builtin_shufflevector(a, b, (J & W ? N + J : J + W)...);
}

// Lane j of v[0] becomes the sum of all lanes of v[j], for up to as many vectors as a vector has lanes.
template <int W, class T, int M>
FK_INLINE void sum_lanes(typename VectorOf<T>::type (&v)[M]) {
  constexpr int N = FewVectors<T>::kPer;
  if constexpr (W < N) {
    for (int i = 0; i < std::max(1, M / (2 * W)); ++i)
      v[i] = add_pairs<W>(v[W < M ? 2 * i : i], v[W < M ? 2 * i + 1 : i], std::make_integer_sequence<int, N>{});
    sum_lanes<2 * W, T>(v);
  }
}

// Some outputs of some samples. A block of columns is one slice of the sum, see kSlice.
template <int Rows, int Samples, class T>
void few_outputs_of(const FewSamples<T>& f, int64_t first, int64_t sample) {
  using V = FewVectors<T>;
  constexpr int kSums = Rows * Samples, kTogether = std::min<int>(kSums, V::kPer);
  const WeightRows<Rows, T> weight(f, first);
  typename V::Vector total[kSums] = {};
  for (int64_t b = 0; b < f.blocks(); ++b) {
    if (f.lowest[b] > weight.most) continue;
    typename V::Vector sum[kSums] = {};
    const int64_t last = std::min((b + 1) * kFewColumns, f.inputs);
    for (int64_t k = b * kFewColumns; k < last; k += V::kPer) {
      const auto in = *reinterpret_cast<const typename V::UnalignedDegrees*>(f.in.data() + k);
      typename V::Vector x[Samples];
      for (int s = 0; s < Samples; ++s)
        x[s] = *reinterpret_cast<const typename V::Unaligned*>(f.x + (sample + s) * f.x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const auto w = weight.load(r, k, in);
        for (int s = 0; s < Samples; ++s) sum[s * Rows + r] += w * x[s];
      }
    }
    for (int i = 0; i < kSums; ++i) total[i] += sum[i];
  }
  T y[kSums];
  for (int i = 0; i < kSums; i += kTogether) {
    typename V::Vector together[kTogether];
    for (int j = 0; j < kTogether; ++j) together[j] = total[i + j];
    sum_lanes<1, T>(together);
    std::memcpy(y + i, &together[0], kTogether * sizeof(T));
  }
  const int64_t rows = std::min<int64_t>(Rows, f.outputs - first);
  for (int s = 0; s < Samples; ++s)
    for (int64_t r = 0; r < rows; ++r)
      f.to[(sample + s) * f.outputs + first + r] = y[s * Rows + r] + (f.bias ? f.bias[first + r] : T(0));
}

template <class T>
void few_outputs(const FewSamples<T>& f, int64_t begin, int64_t end) {
  // As many sums as registers hold.
  constexpr int kRows = 4, kSamples = FK_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t first = begin * kFewRows; first < end * kFewRows; first += kRows) {
    int64_t s = 0;
    for (; s + kSamples <= f.samples; s += kSamples) few_outputs_of<kRows, kSamples>(f, first, s);
    if (kSamples > 2 && s + 2 <= f.samples) {
      few_outputs_of<kRows, 2>(f, first, s);
      s += 2;
    }
    if (s < f.samples) few_outputs_of<kRows, 1>(f, first, s);
  }
  const RowsFunction<T> act = activation_function<T>(f.activation);
  const int64_t first = begin * kFewRows, last = std::min(end * kFewRows, f.outputs);
  for (int64_t s = 0; s < f.samples; ++s) {
    T* y = f.to + s * f.outputs + first;
    act(y, y, last - first);
  }
}

// The gradient of x, of some blocks of its columns.
template <class T>
void few_inputs(const FewSamples<T>& f, int64_t begin, int64_t end) {
  using V = FewVectors<T>;
  for (int64_t first = 0; first < f.outputs; first += kFewRows) {
    const WeightRows<kFewRows, T> weight(f, first);
    for (int64_t b = begin; b < end; ++b) {
      if (f.lowest[b] > weight.most) continue;
      const int64_t last = std::min((b + 1) * kFewColumns, f.inputs);
      for (int64_t k = b * kFewColumns; k < last; k += V::kPer) {
        const auto in = *reinterpret_cast<const typename V::UnalignedDegrees*>(f.in.data() + k);
        typename V::Vector w[kFewRows];
#pragma GCC unroll 8
        for (int r = 0; r < kFewRows; ++r) w[r] = weight.load(r, k, in);
        for (int64_t s = 0; s < f.samples; ++s) {
          const T* g = f.g + s * f.g_stride + first;
          typename V::Vector sum = {};
#pragma GCC unroll 8
          for (int r = 0; r < kFewRows; ++r) sum += w[r] * g[r];
          *reinterpret_cast<typename V::Unaligned*>(f.to + s * f.x_stride + k) += sum;
        }
      }
    }
  }
}

// The gradient of some rows of the weight; zero where none exists.
template <class T>
void few_weights(const FewSamples<T>& f, int64_t begin, int64_t end) {
  using V = FewVectors<T>;
  constexpr int kVectors = 4, kColumns = kVectors * V::kPer;
  static_assert(kFewColumns % kColumns == 0);
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t k = 0; k < f.inputs; k += kColumns) {
      T* to = f.to + o * f.inputs + k;
      const int64_t columns = std::min<int64_t>(kColumns, f.inputs - k);
      const int64_t samples = f.lowest[k / kFewColumns] > f.out[o] ? 0 : f.samples;
      typename V::Vector sum[kVectors] = {};
      for (int64_t s = 0; s < samples; ++s) {
        const T g = f.g[s * f.g_stride + o];
        const T* x = f.x + s * f.x_stride + k;
        for (int v = 0; v < kVectors; ++v)
          sum[v] += g * *reinterpret_cast<const typename V::Unaligned*>(x + v * V::kPer);
      }
      T rest[kColumns];
      T* at = columns == kColumns ? to : rest;
      for (int v = 0; v < kVectors; ++v) {
        const auto in = *reinterpret_cast<const typename V::UnalignedDegrees*>(f.in.data() + k + v * V::kPer);
        *reinterpret_cast<typename V::Unaligned*>(at + v * V::kPer) = in <= f.out[o] ? sum[v] : typename V::Vector{};
      }
      if (at == rest) std::copy_n(rest, columns, to);
    }
  }
}

}  // namespace fk::FK_ISA
