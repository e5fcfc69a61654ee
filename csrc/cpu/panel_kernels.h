// Products of packed panels with rows of lanes, and products of rows of samples, for one instruction set. Part of kernels files:
// included inside foreach_isa.h, includes nothing.
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

template <int Rows, class T>
void multiply_add(T* acc, const T* weight, int64_t height, const T* a, int64_t columns) {
  using Vector = typename VectorOf<T>::type;
  constexpr int V = kVectors<T>, per = kLanes / V;
  // Few rows are few chains of dependent additions: split the columns over more accumulators to hide the latency.
  constexpr int Split = Rows * V >= 4 ? 1 : 4 / (Rows * V);
  Vector sum[Split][Rows][V];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < V; ++v) {
      sum[0][r][v] = *reinterpret_cast<const Vector*>(acc + r * kLanes + v * per);
      for (int s = 1; s < Split; ++s) sum[s][r][v] = Vector{};
    }
  int64_t k = 0;
  for (; k + Split <= columns; k += Split)
    for (int s = 0; s < Split; ++s) {
      Vector x[V];
      for (int v = 0; v < V; ++v) x[v] = *reinterpret_cast<const Vector*>(a + (k + s) * kLanes + v * per);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < V; ++v) sum[s][r][v] += weight[(k + s) * height + r] * x[v];
    }
  if constexpr (Split > 1)
    for (; k < columns; ++k)
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < V; ++v)
          sum[0][r][v] += weight[k * height + r] * *reinterpret_cast<const Vector*>(a + k * kLanes + v * per);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < V; ++v) {
      for (int s = 1; s < Split; ++s) sum[0][r][v] += sum[s][r][v];
      *reinterpret_cast<Vector*>(acc + r * kLanes + v * per) = sum[0][r][v];
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
// Gradients of weights: products of rows of samples, G (rows of gradients) with A (rows of outputs of the layer before).

template <class T>
FK_INLINE T sum_of(typename VectorOf<T>::type v) {
  constexpr int N = FK_VECTOR_BYTES / sizeof(T);
  alignas(64) T lanes[N];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = N / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int Rows, int Columns, class T>
void dot_block(const T* g, int64_t g_stride, const T* a, int64_t a_stride, int64_t samples, T* out) {
  using Vector = typename VectorOf<T>::unaligned;
  constexpr int N = FK_VECTOR_BYTES / sizeof(T);
  typename VectorOf<T>::type sum[Rows][Columns] = {};
  for (int64_t i = 0; i < samples; i += N) {
    typename VectorOf<T>::type x[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) x[c] = *reinterpret_cast<const Vector*>(a + c * a_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename VectorOf<T>::type y = *reinterpret_cast<const Vector*>(g + r * g_stride + i);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[r][c] += y * x[c];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r * Columns + c] = sum_of<T>(sum[r][c]);
}

inline constexpr int kDotRows = 4;
inline constexpr int kDotColumns = FK_VECTOR_BYTES == 64 ? 6 : 2;

template <int Rows, class T>
void dot_rows(int64_t rows, const T* g, int64_t g_stride, const T* a, int64_t a_stride, int64_t samples, T* out) {
  if (rows == Rows) return dot_block<Rows, kDotColumns>(g, g_stride, a, a_stride, samples, out);
  if constexpr (Rows > 1) dot_rows<Rows - 1>(rows, g, g_stride, a, a_stride, samples, out);
}

// The rows of some panels. A few columns stay in the first-level cache while all rows of a panel pass by.
template <class T>
void weight_gradient(const WeightGradient<T>& w, int64_t panel_begin, int64_t panel_end) {
  const Layer& layer = *w.layer;
  alignas(64) T out[kDotRows * kDotColumns];
  for (int64_t i = panel_begin; i < panel_end; ++i) {
    const Panel& panel = layer.panel[i];
    for (int64_t r = 0; r < panel.rows; ++r) {
      const T* g = w.g - (panel.row + r) * w.g_stride;
      typename VectorOf<T>::type sum = {};
      for (int64_t s = 0; s < w.samples; s += FK_VECTOR_BYTES / sizeof(T))
        sum += *reinterpret_cast<const typename VectorOf<T>::unaligned*>(g + s);
      w.bias[layer.perm[panel.row + r]] = sum_of<T>(sum);
    }
    for (int64_t k = 0; k < panel.depth; k += kDotColumns) {
      const int64_t columns = std::min<int64_t>(kDotColumns, panel.depth - k);
      for (int64_t r = 0; r < panel.rows; r += kDotRows) {
        const int64_t rows = std::min<int64_t>(kDotRows, panel.rows - r);
        const T* g = w.g - (panel.row + r) * w.g_stride;
        const T* a = w.a + k * w.a_stride;
        if (columns == kDotColumns)
          dot_rows<kDotRows>(rows, g, -w.g_stride, a, w.a_stride, w.samples, out);
        else
          for (int64_t x = 0; x < columns; ++x)
            for (int64_t y = 0; y < rows; ++y)
              dot_block<1, 1>(g - y * w.g_stride, 0, a + x * w.a_stride, 0, w.samples, out + y * kDotColumns + x);
        for (int64_t y = 0; y < rows; ++y) {
          const int64_t row = layer.perm[panel.row + r + y] * layer.weight_columns;
          for (int64_t x = 0; x < columns; ++x) {
            const int64_t at = row + w.column_perm[k + x];
            const bool exists = w.mask ? w.mask[at] : k + x < w.row_depth[panel.row + r + y];
            w.weight[at] = exists ? out[y * kDotColumns + x] : T(0);
          }
        }
      }
    }
  }
}

}  // namespace fk::FK_ISA
