// Kernels of invertible_conv1x1 for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

// A tile is the channels of some positions, which may belong to several rows: [channel][lane]. Vectors are spelt out,
// because the compiler keeps an array of them in registers, and an array of numbers in memory.
template <class T>
struct Tile {
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr int kVectors = 4, kPer = FK_VECTOR_BYTES / sizeof(T), kLanes = kVectors * kPer;
  std::vector<T> memory;
  T* data;

  explicit Tile(int64_t channels) : memory(channels * kLanes + kPer) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
    data = reinterpret_cast<T*>((at + FK_VECTOR_BYTES - 1) / FK_VECTOR_BYTES * FK_VECTOR_BYTES);
  }
  FK_INLINE Vector* row(int64_t channel) const { return reinterpret_cast<Vector*>(data + channel * kLanes); }
};

// Positions e .. e + n of the tensor; channel c comes to row order[c] of the tile. Lanes that are left over are 0.
template <class T>
void load_tile(const Tile<T>& to, const T* from, const ConvArguments<T>& a, int64_t e, int n, const int64_t* order) {
  constexpr int L = Tile<T>::kLanes;
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

// sum over c in [begin, end) of weight[c] x[c], in slices: one long chain of additions would round off more than the
// sums of a matrix product elsewhere. Two sets of sums hide the latency of the additions.
template <class T>
FK_INLINE void weighted_sum(typename Tile<T>::Vector* out, const T* weight, const Tile<T>& x, int64_t begin,
                            int64_t end) {
  using Vector = typename Tile<T>::Vector;
  constexpr int V = Tile<T>::kVectors;
  Vector total[V] = {};
  for (int64_t slice = begin; slice < end; slice += 16) {
    const int64_t last = std::min<int64_t>(end, slice + 16);
    Vector even[V] = {}, odd[V] = {};
    int64_t c = slice;
    for (; c + 2 <= last; c += 2) {
      const Vector *first = x.row(c), *second = x.row(c + 1);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) even[v] += weight[c] * first[v];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) odd[v] += weight[c + 1] * second[v];
    }
    if (c < last) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) even[v] += weight[c] * x.row(c)[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[v] += even[v] + odd[v];
  }
  for (int v = 0; v < V; ++v) out[v] = total[v];
}

// to = matrix from
template <class T>
void multiply_tile(const Tile<T>& to, const T* matrix, const Tile<T>& from, int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) weighted_sum<T>(to.row(i), matrix + i * channels, from, 0, channels);
}

// Row i of x minus what the rows begin .. end contribute to it; a diagonal that is null is 1.
template <class T>
FK_INLINE void eliminate(const Tile<T>& x, int64_t i, const T* weight, const T* diagonal, int64_t begin, int64_t end) {
  typename Tile<T>::Vector sum[Tile<T>::kVectors];
  weighted_sum<T>(sum, weight, x, begin, end);
  for (int v = 0; v < Tile<T>::kVectors; ++v) {
    x.row(i)[v] -= sum[v];
    if (diagonal) x.row(i)[v] /= diagonal[i];
  }
}

// x <- second^-1 first^-1 x, the first lower, the second upper triangular.
template <class T>
void solve_tile(const Tile<T>& x, const ConvArguments<T>& a) {
  const int64_t C = a.channels;
  for (int64_t i = 0; i < C; ++i) eliminate(x, i, a.first + i * C, a.first_diagonal, 0, i);
  for (int64_t i = C - 1; i >= 0; --i) eliminate(x, i, a.second + i * C, a.second_diagonal, i + 1, C);
}

template <class T>
void invertible_conv1x1(const ConvArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int L = Tile<T>::kLanes;
  const Tile<T> in(a.channels), out(a.solve ? 0 : a.channels);
  const bool backward = a.flow_x != nullptr;
  const Tile<T> kept(backward ? a.channels : 0);
  const int64_t squared = a.channels * a.channels;
  // Products of gradient and x, a vector of partial sums for each weight.
  const Tile<T> products(backward ? (squared + Tile<T>::kVectors - 1) / Tile<T>::kVectors : 0);
  for (int64_t block = begin; block < end; ++block) {
    double* sums = a.sums + block * squared;
    const int64_t last = std::min(a.elements, (block + 1) * a.block);
    int held = 0;
    for (int64_t e = block * a.block; e < last; e += L) {
      const int n = static_cast<int>(std::min<int64_t>(L, last - e));
      load_tile(in, a.x, a, e, n, a.solve ? a.order_in : nullptr);
      const Tile<T>* result = &in;
      const int64_t* order = a.order_out;
      if (a.solve) {
        solve_tile(in, a);
      } else {
        multiply_tile(out, a.first, in, a.channels);
        result = &out;
      }
      store_tile(a.y, *result, a, e, n, order);
      if (!backward) continue;
      // Forward the gradient of y, in the inverse direction that of the input, both before they are reordered.
      load_tile(kept, a.flow_x, a, e, n, nullptr);
      auto* to = products.row(0);
      for (int64_t i = 0; i < a.channels; ++i) {
        const auto* g = in.row(order ? order[i] : i);
        for (int64_t j = 0; j < a.channels; ++j, ++to) {
          const auto* x = kept.row(j);
          *to += (g[0] * x[0] + g[1] * x[1]) + (g[2] * x[2] + g[3] * x[3]);
        }
      }
      if (++held == 16 || e + L >= last) {
        T* partial = products.data;
        for (int64_t i = 0; i < squared; ++i, partial += Tile<T>::kPer) {
          double sum = 0;
          for (int v = 0; v < Tile<T>::kPer; ++v) sum += static_cast<double>(partial[v]);
          sums[i] += sum;
        }
        std::fill_n(products.data, squared * Tile<T>::kPer, T(0));
        held = 0;
      }
    }
  }
}

}  // namespace fk::FK_ISA
