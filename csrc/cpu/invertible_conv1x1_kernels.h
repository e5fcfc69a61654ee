// Kernels of invertible_conv1x1 for one instruction set; included by foreach_isa.h.
#include "cpu/transpose_kernels.h"

namespace fk::FK_ISA {

// Rows of lanes. A tile is the channels of some positions, which may belong to several rows of x: [channel][lane].
template <class T>
struct Tile {
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(FK_VECTOR_BYTES), aligned(sizeof(T))));
  static constexpr int kVectors = 4, kPer = FK_VECTOR_BYTES / sizeof(T), kLanes = kVectors * kPer;
  std::vector<T> memory;
  T* data;

  explicit Tile(int64_t rows) : memory(rows * kLanes + kPer) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
    data = reinterpret_cast<T*>((at + FK_VECTOR_BYTES - 1) / FK_VECTOR_BYTES * FK_VECTOR_BYTES);
  }
  FK_INLINE Vector* row(int64_t i) const { return reinterpret_cast<Vector*>(data + i * kLanes); }
};

// Calls use(first channel, integral constant N) for squares of N x N that together have all channels, some perhaps
// twice. False where there are too few channels.
template <class T, class Use>
bool squares(int64_t channels, const Use& use) {
  auto all = [&]<int N>(std::integral_constant<int, N> n) {
    for (int64_t c = 0; c < channels; c += N)
      for (int lane = 0; lane < Tile<T>::kLanes; lane += N) use(std::min(c, channels - N), lane, n);
    return true;
  };
  constexpr int kFew = std::min(4, Tile<T>::kPer);
  if (channels >= Tile<T>::kPer) return all(std::integral_constant<int, Tile<T>::kPer>{});
  return channels >= kFew && all(std::integral_constant<int, kFew>{});
}

// Positions e .. e + n of the tensor; channel c comes to row order[c] of the tile. Lanes that are left over are 0.
template <class T>
void load_tile(const Tile<T>& to, const T* from, const ConvArguments<T>& a, int64_t e, int n, const int64_t* order) {
  constexpr int L = Tile<T>::kLanes;
  auto square = [&]<int N>(int64_t c, int lane, std::integral_constant<int, N>) {
    transpose_square<N, T>([&](int i) { return from + (e + lane + i) * a.channels + c; },
                           [&](int i) { return to.data + (order ? order[c + i] : c + i) * L + lane; });
  };
  if (a.positions == 1 && n == L && squares<T>(a.channels, square)) return;
  if (n < L) std::fill_n(to.data, a.channels * L, T(0));
  for (int lane = 0; lane < n;) {
    const int64_t row = (e + lane) / a.positions, p = (e + lane) % a.positions;
    const int run = static_cast<int>(std::min<int64_t>(n - lane, a.positions - p));
    const T* source = from + row * a.channels * a.positions + p;
    for (int64_t c = 0; c < a.channels; ++c, source += a.positions) {
      T* target = to.data + (order ? order[c] : c) * L + lane;
      if (run == L)
        std::memcpy(target, source, L * sizeof(T));
      else
        for (int i = 0; i < run; ++i) target[i] = source[i];
    }
    lane += run;
  }
}

// The way back: channel c is row order[c] of the tile.
template <class T>
void store_tile(T* to, const Tile<T>& from, const ConvArguments<T>& a, int64_t e, int n, const int64_t* order) {
  constexpr int L = Tile<T>::kLanes;
  auto square = [&]<int N>(int64_t c, int lane, std::integral_constant<int, N>) {
    transpose_square<N, T>([&](int i) { return from.data + (order ? order[c + i] : c + i) * L + lane; },
                           [&](int i) { return to + (e + lane + i) * a.channels + c; });
  };
  if (a.positions == 1 && n == L && squares<T>(a.channels, square)) return;
  for (int lane = 0; lane < n;) {
    const int64_t row = (e + lane) / a.positions, p = (e + lane) % a.positions;
    const int run = static_cast<int>(std::min<int64_t>(n - lane, a.positions - p));
    T* target = to + row * a.channels * a.positions + p;
    for (int64_t c = 0; c < a.channels; ++c, target += a.positions) {
      const T* source = from.data + (order ? order[c] : c) * L + lane;
      if (run == L)
        std::memcpy(target, source, L * sizeof(T));
      else
        for (int i = 0; i < run; ++i) target[i] = source[i];
    }
    lane += run;
  }
}

// Calls use(r, v, sum over c of weight(r, c) x[c][v]) for V vectors of every row r. In slices: one long chain of
// additions would round off more than the sums of a matrix product elsewhere.
template <int Rows, int V, class T, class Use>
FK_INLINE void weighted_sums(int64_t rows, View<const T> weight, const T* x, int64_t x_stride, int64_t count,
                             const Use& use) {
  using Vector = typename Tile<T>::Vector;
  int64_t r0 = 0;
  for (; r0 + Rows <= rows; r0 += Rows, weight.data += Rows * weight.row) {
    Vector total[Rows][V] = {};
    for (int64_t slice = 0; slice < count; slice += 16) {
      Vector sum[Rows][V] = {};
      for (int64_t c = slice; c < std::min<int64_t>(count, slice + 16); ++c) {
        Vector in[V];
        for (int v = 0; v < V; ++v)
          in[v] = *reinterpret_cast<const typename Tile<T>::Unaligned*>(x + c * x_stride + v * Tile<T>::kPer);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += weight(r, c) * in[v];
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < V; ++v) total[r][v] += sum[r][v];
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < V; ++v) use(r0 + r, v, total[r][v]);
  }
  if constexpr (Rows > 1)
    weighted_sums<1, V>(rows - r0, weight, x, x_stride, count,
                        [&](int64_t r, int v, Vector sum) { use(r0 + r, v, sum); });
}

// Rows whose sums fill the registers.
inline constexpr int kConvRows = FK_VECTOR_BYTES == 64 ? 4 : 2;

// to = a b for matrices (C, C), from the terms [begin, end) = terms(row, first column, last column).
template <class Terms>
FK_INLINE void multiply_matrices(double* to, const double* a, const double* b, int64_t C, const Terms& terms) {
  constexpr int N = Tile<double>::kPer;
  for (int64_t r = 0; r < C; ++r, a += C, to += C) {
    int64_t c = 0;
    auto columns = [&]<int V>(std::integral_constant<int, V>) {
      for (; c + V * N <= C; c += V * N) {
        const auto [begin, end] = terms(r, c, c + V * N - 1);
        weighted_sums<1, V>(
            1, View<const double>{a + begin, 0, 1}, b + begin * C + c, C, end - begin,
            [&](int64_t, int v, typename Tile<double>::Vector sum) { std::memcpy(to + c + v * N, &sum, sizeof(sum)); });
      }
    };
    columns(std::integral_constant<int, Tile<double>::kVectors>{});
    columns(std::integral_constant<int, 1>{});
    for (; c < C; ++c) {
      const auto [begin, end] = terms(r, c, c);
      to[c] = 0;
      for (int64_t k = begin; k < end; ++k) to[c] += a[k] * b[k * C + c];
    }
  }
}

// L U, with their diagonals.
inline void multiply_factors(double* to, const double* left, const double* right, int64_t C) {
  multiply_matrices(to, left, right, C, [](int64_t r, int64_t, int64_t last) {
    return std::pair<int64_t, int64_t>(0, std::min(r, last) + 1);
  });
}

// The gradients of L and of U from that of their product: g U', of which what lies below the diagonal counts, and L' g,
// of which the rest does.
inline void factor_gradients(double* of_left, double* of_right, const double* g, const double* left_transposed,
                             const double* right_transposed, int64_t C) {
  multiply_matrices(of_left, g, right_transposed, C,
                    [&](int64_t, int64_t first, int64_t) { return std::pair<int64_t, int64_t>(first, C); });
  multiply_matrices(of_right, left_transposed, g, C,
                    [&](int64_t r, int64_t, int64_t) { return std::pair<int64_t, int64_t>(r, C); });
}

// to = matrix from
template <class T>
void multiply_tile(const Tile<T>& to, const T* matrix, const Tile<T>& from, int64_t channels) {
  weighted_sums<kConvRows, Tile<T>::kVectors>(
      channels, View<const T>{matrix, channels, 1}, from.data, Tile<T>::kLanes, channels,
      [&](int64_t r, int v, typename Tile<T>::Vector sum) { to.row(r)[v] = sum; });
}

// Rows [first, last) of x minus what its rows [begin, end) contribute to them.
template <class T>
FK_INLINE void eliminate(const Tile<T>& x, const T* matrix, int64_t channels, int64_t first, int64_t last,
                         int64_t begin, int64_t end) {
  if (begin == end) return;
  weighted_sums<kConvRows, Tile<T>::kVectors>(
      last - first, View<const T>{matrix + first * channels + begin, channels, 1}, x.data + begin * Tile<T>::kLanes,
      Tile<T>::kLanes, end - begin,
      [&](int64_t r, int v, typename Tile<T>::Vector sum) { x.row(first + r)[v] -= sum; });
}

template <class T>
FK_INLINE void divide(const Tile<T>& x, int64_t i, const T* diagonal) {
  for (int v = 0; diagonal && v < Tile<T>::kVectors; ++v) x.row(i)[v] /= diagonal[i];
}

// x <- second^-1 first^-1 x, the first lower, the second upper triangular; a diagonal that is null is 1. Row by row
// within a few rows, all others at once.
template <class T>
void solve_tile(const Tile<T>& x, const ConvArguments<T>& a) {
  const int64_t C = a.channels;
  for (int64_t first = 0; first < C; first += kConvRows) {
    const int64_t last = std::min<int64_t>(C, first + kConvRows);
    eliminate(x, a.first, C, first, last, 0, first);
    for (int64_t i = first; i < last; ++i) {
      eliminate(x, a.first, C, i, i + 1, first, i);
      divide(x, i, a.first_diagonal);
    }
  }
  for (int64_t last = C; last > 0; last -= kConvRows) {
    const int64_t first = std::max<int64_t>(0, last - kConvRows);
    eliminate(x, a.second, C, first, last, last, C);
    for (int64_t i = last - 1; i >= first; --i) {
      eliminate(x, a.second, C, i, i + 1, i + 1, last);
      divide(x, i, a.second_diagonal);
    }
  }
}

// x of positions e .. e + n, lane by lane: [lane][channel], `stride` apart. `tile` is scratch.
template <class T>
void load_lanes(T* to, int64_t stride, const Tile<T>& tile, const T* from, const ConvArguments<T>& a, int64_t e,
                int n) {
  if (a.positions == 1) {
    for (int lane = 0; lane < n; ++lane) std::copy_n(from + (e + lane) * a.channels, a.channels, to + lane * stride);
    return;
  }
  constexpr int N = Tile<T>::kPer;
  load_tile(tile, from, a, e, n, nullptr);
  for (int64_t c = 0; c < a.channels; c += N)
    for (int lane = 0; lane < Tile<T>::kLanes; lane += N)
      transpose_square<N, T>([&](int i) { return tile.data + (c + i) * Tile<T>::kLanes + lane; },
                             [&](int i) { return to + (lane + i) * stride + c; });
}

// Calls use(r, c, count, values) for `count` columns from c on of every row r of weight x; x has room for whole
// vectors.
template <class T, class Use>
void multiply_rows(int64_t rows, View<const T> weight, const T* x, int64_t x_stride, int64_t columns, int64_t count,
                   const Use& use) {
  constexpr int V = Tile<T>::kVectors, N = Tile<T>::kPer;
  int64_t c = 0;
  auto values = [&](int64_t r, int v, typename Tile<T>::Vector sum) {
    T lane[N];
    std::memcpy(lane, &sum, sizeof(sum));
    const int64_t left = columns - c - v * N;
    if (left >= N)
      use(r, c + v * N, std::integral_constant<int64_t, N>{}, lane);
    else
      use(r, c + v * N, left, lane);
  };
  for (; c + V * N <= columns; c += V * N) weighted_sums<kConvRows, V>(rows, weight, x + c, x_stride, count, values);
  for (; c < columns; c += N) weighted_sums<kConvRows, 1>(rows, weight, x + c, x_stride, count, values);
}

template <class T>
void invertible_conv1x1(const ConvArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int L = Tile<T>::kLanes;
  const Tile<T> in(a.channels), out(a.solve ? 0 : a.channels);
  const bool backward = a.flow_x != nullptr;
  const Tile<T> scratch(backward ? a.padded : 0);
  std::vector<T> kept(backward ? a.padded * L : 0);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = std::min(a.elements, (block + 1) * a.block);
    for (int64_t e = block * a.block; e < last; e += L) {
      const int n = static_cast<int>(std::min<int64_t>(L, last - e));
      View<const T> g{in.data, L, 1};  // channel, lane
      if (a.matrix_transposed) {
        // Vectors as they lie: lanes are outputs.
        const View<const T> rows{a.x + e * a.channels, a.channels, 1};
        multiply_rows(n, rows, a.matrix_transposed, a.padded, a.channels, a.channels,
                      [&](int64_t r, int64_t c, auto count, const T* from) {
                        std::copy_n(from, count, a.y + (e + r) * a.channels + c);
                      });
        g = {rows.data, 1, a.channels};
      } else {
        load_tile(in, a.x, a, e, n, a.solve ? a.order_in : nullptr);
        if (a.solve)
          solve_tile(in, a);
        else
          multiply_tile(out, a.first, in, a.channels);
        store_tile(a.y, a.solve ? in : out, a, e, n, a.order_out);
      }
      if (!backward) continue;
      // Forward g is the gradient of y, in the inverse direction that of the input, both before they are reordered.
      load_lanes(kept.data(), a.padded, scratch, a.flow_x, a, e, n);
      double* sums = a.sums + block * a.channels * a.channels;
      multiply_rows(a.channels, g, kept.data(), a.padded, a.channels, n,
                    [&](int64_t r, int64_t c, auto count, const T* from) {
                      double* to = sums + r * a.channels + c;
                      for (int64_t i = 0; i < count; ++i) to[i] += static_cast<double>(from[i]);
                    });
    }
  }
}

}  // namespace fk::FK_ISA
