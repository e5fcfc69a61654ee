// Walking the rows of logits in chunks, for one instruction set. Included by the kernels of the categorical operators.
namespace fk::FK_ISA {

// Every sum and maximum runs over this many partial results, in the same order for every instruction set.
inline constexpr int kLanes = 16;

template <class T>
FK_INLINE void load_lanes(T (&to)[kLanes], const T* from, int64_t stride, int n, T fill) {
  if (stride == 1 && n == kLanes) {
    for (int i = 0; i < kLanes; ++i) to[i] = from[i];
  } else {
    for (int i = 0; i < kLanes; ++i) to[i] = i < n ? from[i * stride] : fill;
  }
}

template <class T>
FK_INLINE void store_lanes(T* to, int64_t stride, const T (&from)[kLanes], int n) {
  if (stride == 1 && n == kLanes) {
    for (int i = 0; i < kLanes; ++i) to[i] = from[i];
  } else {
    for (int i = 0; i < n; ++i) to[i * stride] = from[i];
  }
}

template <class T>
FK_INLINE T sum_of_lanes(const T (&lanes)[kLanes]) {
  T sum = lanes[0];
  for (int i = 1; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

template <class T>
FK_INLINE T max_of_lanes(const T (&lanes)[kLanes]) {
  T best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = math::max(best, lanes[i]);
  return best;
}

// A running argmax over chunks; the first of equal values wins.
template <class T>
struct ArgMax {
  T best[kLanes];
  std::int32_t chunk[kLanes] = {};
  std::int32_t nan[kLanes] = {};

  FK_INLINE ArgMax() {
    for (int i = 0; i < kLanes; ++i) best[i] = -std::numeric_limits<T>::infinity();
  }

  FK_INLINE void add(const T (&value)[kLanes], std::int32_t number) {
    for (int i = 0; i < kLanes; ++i) {
      const bool better = value[i] > best[i];
      best[i] = better ? value[i] : best[i];
      chunk[i] = better ? number : chunk[i];
      nan[i] |= value[i] != value[i] ? 1 : 0;
    }
  }

  FK_INLINE int64_t index() const {
    int64_t at = 0;
    T top = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < kLanes; ++i) {
      const int64_t here = static_cast<int64_t>(chunk[i]) * kLanes + i;
      if (best[i] > top || (best[i] == top && top > -std::numeric_limits<T>::infinity() && here < at)) {
        top = best[i];
        at = here;
      }
    }
    return at;
  }

  FK_INLINE bool has_nan() const {
    std::int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= nan[i];
    return any != 0;
  }

  // Whether the softmax of the row has a value: no NaN, and a finite maximum.
  FK_INLINE bool proper() const {
    const T top = max_of_lanes(best);
    return !has_nan() && top - top == T(0);
  }
};

// A row of zeros with a one at `index`, or of NaN where the row has no softmax.
template <class T>
FK_INLINE void store_one_hot(T* to, int64_t classes, int64_t index, bool proper) {
  const T zero = proper ? T(0) : std::numeric_limits<T>::quiet_NaN();
  for (int64_t c = 0; c < classes; ++c) to[c] = zero;
  if (proper) to[index] = T(1);
}

}  // namespace fk::FK_ISA
