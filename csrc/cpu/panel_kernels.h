// Products of packed panels with rows of lanes, and products of rows of samples, for one instruction set. Part of
// kernels files: included inside foreach_isa.h.
#include "cpu/transpose_kernels.h"

namespace fk::FK_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FK_VECTOR_BYTES), aligned(sizeof(T))));
};

// ---------------------------------------------------------------------------------------------------------------------
// acc[row][lane] += sum over columns of weight[column][row] * a[column][lane]: all of the arithmetic happens here.
// The weights are read as broadcasts, one multiply-add each; accumulators stay in registers.

template <class T>
inline constexpr int kVectors = kLanes * sizeof(T) / FK_VECTOR_BYTES;  // registers per row of lanes

template <class T>
inline constexpr int kRows = FK_VECTOR_BYTES == 64 ? 16 / kVectors<T> : (8 / kVectors<T> > 0 ? 8 / kVectors<T> : 1);

// Columns are summed in slices of this many that are then added up: one long chain of additions would round off several
// times more than the sums of a matrix product elsewhere.
inline constexpr int64_t kSlice = 16;

template <int Rows, class T>
void multiply_add(T* acc, const T* weight, int64_t height, const T* a, int64_t columns) {
  using Vector = typename VectorOf<T>::type;
  constexpr int V = kVectors<T>, per = kLanes / V;
  // Few rows are few chains of dependent additions: split the columns over more accumulators to hide the latency.
  constexpr int Split = Rows * V >= 4 ? 1 : 4 / (Rows * V);
  for (int64_t begin = 0; begin < columns; begin += kSlice) {
    const int64_t end = std::min(columns, begin + kSlice);
    Vector sum[Split][Rows][V] = {};
    int64_t k = begin;
    for (; k + Split <= end; k += Split)
      for (int s = 0; s < Split; ++s) {
        Vector x[V];
        for (int v = 0; v < V; ++v) x[v] = *reinterpret_cast<const Vector*>(a + (k + s) * kLanes + v * per);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < V; ++v) sum[s][r][v] += weight[(k + s) * height + r] * x[v];
      }
    if constexpr (Split > 1)
      for (; k < end; ++k)
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < V; ++v)
            sum[0][r][v] += weight[k * height + r] * *reinterpret_cast<const Vector*>(a + k * kLanes + v * per);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < V; ++v) {
        for (int s = 1; s < Split; ++s) sum[0][r][v] += sum[s][r][v];
        *reinterpret_cast<Vector*>(acc + r * kLanes + v * per) += sum[0][r][v];
      }
  }
}

template <int Rows, class T>
FK_INLINE void multiply_add_rest(T* acc, const T* weight, int64_t height, const T* a, int64_t columns, int64_t rows) {
  if (rows >= Rows) {
    multiply_add<Rows>(acc, weight, height, a, columns);
    acc += Rows * kLanes;
    weight += Rows;
    rows -= Rows;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) multiply_add_rest<Rows / 2>(acc, weight, height, a, columns, rows);
  }
}

// Any number of rows that are neighbours in one panel.
template <class T>
void multiply_add_rows(T* acc, const T* weight, int64_t height, const T* a, int64_t columns, int64_t rows) {
  if (columns <= 0) return;
  for (; rows >= kRows<T>; rows -= kRows<T>, acc += kRows<T> * kLanes, weight += kRows<T>)
    multiply_add<kRows<T>>(acc, weight, height, a, columns);
  if constexpr (kRows<T> > 1)
    if (rows > 0) multiply_add_rest<kRows<T> / 2>(acc, weight, height, a, columns, rows);
}

// The same for one sample, whose columns are single numbers: here SIMD runs across the rows of a panel. Rows [first,
// first + rows) of the panel are wanted, the others are calculated along. Slices are summed side by side, to hide the
// latency of their additions.
template <int Height, class T>
void multiply_add_one_panel(T* acc, const T* weight, const T* a, int64_t columns, int64_t first, int64_t rows) {
  constexpr int kWidth = std::min<int>(Height & -Height, FK_VECTOR_BYTES / sizeof(T)), kParts = Height / kWidth;
  constexpr int kSide = 8 / kParts > 0 ? 8 / kParts : 1;
  typedef T Vector __attribute__((vector_size(kWidth * sizeof(T)), aligned(sizeof(T))));
  T total[Height] = {};
  for (int64_t r = 0; r < rows; ++r) total[first + r] = acc[r];
  auto slices = [&]<int N>(std::integral_constant<int, N>, int64_t begin, int64_t length) {
    Vector sum[N][kParts] = {};
    for (int64_t k = begin; k < begin + length; ++k)
      for (int s = 0; s < N; ++s) {
        const int64_t column = k + s * kSlice;
        for (int v = 0; v < kParts; ++v)
          sum[s][v] += *reinterpret_cast<const Vector*>(weight + column * Height + v * kWidth) * a[column];
      }
    for (int s = 0; s < N; ++s)
      for (int v = 0; v < kParts; ++v)
        for (int i = 0; i < kWidth; ++i) total[v * kWidth + i] += sum[s][v][i];
  };
  int64_t k = 0;
  for (; k + kSide * kSlice <= columns; k += kSide * kSlice) slices(std::integral_constant<int, kSide>{}, k, kSlice);
  for (; k < columns; k += kSlice) slices(std::integral_constant<int, 1>{}, k, std::min(kSlice, columns - k));
  for (int64_t r = 0; r < rows; ++r) acc[r] = total[first + r];
}

template <class T>
void multiply_add_one(T* acc, const T* weight, int64_t height, const T* a, int64_t columns, int64_t first,
                      int64_t rows) {
  if (columns <= 0) return;
  switch (height) {
    case 4:
      return multiply_add_one_panel<4>(acc, weight, a, columns, first, rows);
    case 8:
      return multiply_add_one_panel<8>(acc, weight, a, columns, first, rows);
    case 12:
      return multiply_add_one_panel<12>(acc, weight, a, columns, first, rows);
    default:
      return multiply_add_one_panel<16>(acc, weight, a, columns, first, rows);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations over rows of lanes.

template <class T>
using RowsFunction = void (*)(const T* in, T* out, int64_t count);
template <class T>
using SlopeFunction = void (*)(const T* kept, T* grad, int64_t count);

template <Activation A, class T>
void activate_rows(const T* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = activate<A>(in[i]);
}

template <Activation A, class T>
void slope_row(const T* kept, T* grad, int64_t) {
  for (int i = 0; i < kLanes; ++i) grad[i] *= slope_from_kept<A>(kept[i]);
}

template <class T>
RowsFunction<T> activation_function(int64_t a) {
  return dispatch_activation(static_cast<Activation>(a),
                             []<Activation A>() -> RowsFunction<T> { return activate_rows<A, T>; });
}

template <class T>
SlopeFunction<T> slope_function(int64_t a) {
  return dispatch_activation(static_cast<Activation>(a),
                             []<Activation A>() -> SlopeFunction<T> { return slope_row<A, T>; });
}

// ---------------------------------------------------------------------------------------------------------------------
// What is kept for the backward pass lies in chunks of kLanes rows, [chunk][sample][row], so that the gradient of a
// weight, a sum over samples, is the same product again: columns are samples, "weights" are gradients.

// Transposes a kLanes x kLanes block.
template <class T>
FK_INLINE void transpose_block(const T* from, T* to) {
  constexpr int N = FK_VECTOR_BYTES / sizeof(T);
  for (int bi = 0; bi < kLanes; bi += N)
    for (int bj = 0; bj < kLanes; bj += N)
      transpose_square<N, T>([&](int i) { return from + (bi + i) * kLanes + bj; },
                             [&](int i) { return to + (bj + i) * kLanes + bi; });
}

// `rows` rows of lanes of one tile into their chunks. Rows that fill up the last chunk and lanes beyond the last sample
// are written as zero: sums over samples run over whole tiles.
template <class T>
void keep_rows(const T* rows, int64_t count, int64_t samples, T* kept, int64_t stride, int64_t first) {
  alignas(64) T block[kLanes * kLanes];
  for (int64_t r = 0; r < count; r += kLanes, kept += stride * kLanes) {
    const T* from = rows + r * kLanes;
    const int64_t n = std::min<int64_t>(kLanes, count - r);
    if (n < kLanes || samples < kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t j = 0; j < kLanes; ++j) block[i * kLanes + j] = i < n && j < samples ? from[i * kLanes + j] : T(0);
      from = block;
    }
    transpose_block(from, kept + first * kLanes);
  }
}

// And back. `rows` has room for whole chunks.
template <class T>
void load_rows(T* rows, int64_t count, const T* kept, int64_t stride, int64_t first) {
  for (int64_t r = 0; r < count; r += kLanes, kept += stride * kLanes)
    transpose_block(kept + first * kLanes, rows + r * kLanes);
}

// The gradients of the weights of one chunk of rows.
template <class T>
void weight_gradient(const WeightGradient<T>& w, int64_t chunk) {
  const int64_t r0 = chunk * kLanes, rows = std::min<int64_t>(kLanes, w.rows - r0);
  const T* g = w.g + chunk * w.stride * kLanes;
  alignas(64) T sum[kLanes * kLanes] = {};
  for (int64_t begin = 0; begin < w.samples; begin += kSlice) {
    T part[kLanes] = {};
    for (int64_t s = begin; s < std::min(begin + kSlice, w.samples); ++s)
      for (int i = 0; i < kLanes; ++i) part[i] += g[s * kLanes + i];
    for (int i = 0; i < kLanes; ++i) sum[i] += part[i];
  }
  for (int64_t r = 0; r < rows; ++r) w.bias[w.row_perm[r0 + r]] = sum[r];
  const int64_t depth = w.chunk_depth[chunk];
  for (int64_t k = 0; k < depth; k += kLanes) {
    std::memset(sum, 0, sizeof(sum));
    multiply_add_rows(sum, g, kLanes, w.a + k * w.stride, w.samples, rows);
    const int64_t columns = std::min(kLanes + int64_t{0}, depth - k);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = w.row_perm[r0 + r] * w.weight_columns;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t at = row + w.column_perm[k + c];
        const bool exists = w.mask ? w.mask[at] : k + c < w.row_depth[r0 + r];
        w.weight[at] = exists ? sum[r * kLanes + c] : T(0);
      }
    }
  }
}

}  // namespace fk::FK_ISA
