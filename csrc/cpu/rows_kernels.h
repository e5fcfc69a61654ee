// Reductions over rows for one instruction set. Included by the kernels of the categorical operators.
//
// Every sum, maximum and argmax runs over kLanes partial results, in the same order for every instruction
// set. Elementwise work is written as plain loops over whole tiles instead, which the compiler turns into
// vectors whatever the row length is.
namespace fk::FK_ISA {

inline constexpr int kLanes = 16;

template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Int IntVector __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr int kWidth = FK_VECTOR_BYTES / sizeof(T), kVectors = kLanes / kWidth;

  static FK_INLINE Vector load(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
};

// Calls f(p, c) for the chunks of kLanes elements of from[0 .. n), p pointing to the elements c .. c + kLanes
// - 1; the last chunk is filled up with `fill`.
template <class T, class F>
FK_INLINE void for_chunks(const T* from, int64_t n, T fill, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) f(from + c, c);
  if (c == n) return;
  T rest[kLanes];
  for (int i = 0; i < kLanes; ++i) rest[i] = fill;
  for (int64_t i = c; i < n; ++i) rest[i - c] = from[i];
  f(static_cast<const T*>(rest), c);
}

template <class T>
FK_INLINE T sum_of_row(const T* row, int64_t n) {
  using L = Lanes<T>;
  typename L::Vector total[L::kVectors] = {};
  for_chunks(row, n, T(0), [&](const T* p, int64_t) {
    for (int v = 0; v < L::kVectors; ++v) total[v] += L::load(p + v * L::kWidth);
  });
  T lanes[kLanes], sum = T(0);
  std::memcpy(lanes, total, sizeof(lanes));
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// The largest element; NaNs are passed over.
template <class T>
FK_INLINE T max_of_row(const T* row, int64_t n) {
  using L = Lanes<T>;
  constexpr T kLow = -std::numeric_limits<T>::infinity();
  typename L::Vector top[L::kVectors];
  for (int v = 0; v < L::kVectors; ++v) top[v] = typename L::Vector{} + kLow;
  for_chunks(row, n, kLow, [&](const T* p, int64_t) {
    for (int v = 0; v < L::kVectors; ++v) {
      const typename L::Vector x = L::load(p + v * L::kWidth);
      top[v] = x > top[v] ? x : top[v];
    }
  });
  T lanes[kLanes];
  std::memcpy(lanes, top, sizeof(lanes));
  T best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// A running argmax; the first of equal values wins.
template <class T>
class ArgMax {
  using L = Lanes<T>;

 public:
  FK_INLINE ArgMax() {
    for (int v = 0; v < L::kVectors; ++v) best_[v] = typename L::Vector{} - std::numeric_limits<T>::infinity();
  }

  // The elements first .. first + n - 1 of the row; `first` is a multiple of kLanes.
  FK_INLINE void add(const T* row, int64_t first, int64_t n) {
    for_chunks(row, n, -std::numeric_limits<T>::infinity(), [&](const T* p, int64_t c) {
      const auto number = static_cast<typename L::Int>((first + c) / kLanes);
      for (int v = 0; v < L::kVectors; ++v) {
        const typename L::Vector x = L::load(p + v * L::kWidth);
        const typename L::IntVector better = x > best_[v];
        best_[v] = better ? x : best_[v];
        chunk_[v] = better ? typename L::IntVector{} + number : chunk_[v];
        nan_[v] |= x != x;
      }
    });
  }

  FK_INLINE int64_t index() const {
    T best[kLanes];
    typename L::Int chunk[kLanes];
    std::memcpy(best, best_, sizeof(best));
    std::memcpy(chunk, chunk_, sizeof(chunk));
    T top = best[0];
    for (int i = 1; i < kLanes; ++i) top = best[i] > top ? best[i] : top;
    // The smallest index among the lanes that hold the maximum.
    int64_t at = std::numeric_limits<int64_t>::max();
    for (int i = 0; i < kLanes; ++i) {
      const int64_t here = static_cast<int64_t>(chunk[i]) * kLanes + i;
      at = best[i] == top && here < at ? here : at;
    }
    return at;
  }

  FK_INLINE bool has_nan() const {
    typename L::Int nan[kLanes], any = 0;
    std::memcpy(nan, nan_, sizeof(nan));
    for (int i = 0; i < kLanes; ++i) any |= nan[i];
    return any != 0;
  }

  // Whether the softmax of the row has a value: no NaN, and a finite maximum.
  FK_INLINE bool proper() const {
    T best[kLanes];
    std::memcpy(best, best_, sizeof(best));
    T top = best[0];
    for (int i = 1; i < kLanes; ++i) top = best[i] > top ? best[i] : top;
    return !has_nan() && top - top == T(0);
  }

 private:
  typename L::Vector best_[L::kVectors];
  typename L::IntVector chunk_[L::kVectors] = {}, nan_[L::kVectors] = {};
};

// A row of zeros with a one at `index`, or of NaN where the row has no softmax.
template <class T>
FK_INLINE void store_one_hot(T* to, int64_t classes, int64_t index, bool proper) {
  const T zero = proper ? T(0) : std::numeric_limits<T>::quiet_NaN();
  for (int64_t c = 0; c < classes; ++c) to[c] = zero;
  if (proper) to[index] = T(1);
}

// z[i] += x[i * stride]
template <class T>
FK_INLINE void add_to(T* z, const T* x, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) z[i] += x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] += x[i * stride];
  }
}

// z[i] = x[i * stride]
template <class T>
FK_INLINE void copy_to(T* z, const T* x, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) z[i] = x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] = x[i * stride];
  }
}

template <class T>
FK_INLINE void exp_in_place(T* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = math::exp(z[i]);
}

}  // namespace fk::FK_ISA
