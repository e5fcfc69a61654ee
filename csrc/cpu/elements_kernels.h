// Loading and storing groups of elements for one instruction set; included by kernels files, includes nothing.
namespace fk::FK_ISA {

template <class T>
FK_INLINE void load_values(T* to, const ElementView<const T>& from, const ElementLanes& lanes) {
  for (int i = 0; i < kElementLanes; ++i) to[i] = *from.at(lanes.row[i], lanes.column[i]);
}

template <class T>
FK_INLINE void store_values(const ElementView<T>& to, const T* from, const ElementLanes& lanes) {
  for (int i = 0; i < lanes.count; ++i) *to.at(lanes.row[i], lanes.column[i]) = from[i];
}

// A 4 by 4 block turned around, in registers.
template <class T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T))));
};

template <class T>
FK_INLINE void transpose_quad(const T* const* from, int64_t from_at, T* to, int64_t to_stride) {
  using Q = typename Quad<T>::type;
  using U = typename Quad<T>::unaligned;
  const Q a = *reinterpret_cast<const U*>(from[0] + from_at), b = *reinterpret_cast<const U*>(from[1] + from_at);
  const Q c = *reinterpret_cast<const U*>(from[2] + from_at), d = *reinterpret_cast<const U*>(from[3] + from_at);
  const Q ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Q cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<U*>(to) = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  *reinterpret_cast<U*>(to + to_stride) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  *reinterpret_cast<U*>(to + 2 * to_stride) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
  *reinterpret_cast<U*>(to + 3 * to_stride) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

// Parameters of a group of elements into rows [parameter][lane].
template <class T>
void load_parameters(T* to, const ElementView<const T>& from, const ElementLanes& lanes, int64_t count) {
  const T* source[kElementLanes];
  for (int i = 0; i < kElementLanes; ++i) source[i] = from.at(lanes.row[i], lanes.column[i]);
  if (from.parameter == 1 && count >= 4) {
    // The last block overlaps the one before where count is no multiple of four.
    for (int64_t p = 0; p < count; p += 4) {
      const int64_t at = std::min<int64_t>(p, count - 4);
      for (int i = 0; i < kElementLanes; i += 4)
        transpose_quad(source + i, at, to + at * kElementLanes + i, kElementLanes);
    }
    return;
  }
  for (int64_t p = 0; p < count; ++p)
    for (int i = 0; i < kElementLanes; ++i) to[p * kElementLanes + i] = source[i][p * from.parameter];
}

// The way back. Outputs are fresh, so their parameters are contiguous.
template <class T>
void store_parameters(const ElementView<T>& to, const T* from, const ElementLanes& lanes, int64_t count) {
  if (count >= 4) {
    for (int i = 0; i < kElementLanes; i += 4) {
      if (i + 4 > lanes.count) break;
      T* target[4];
      for (int j = 0; j < 4; ++j) target[j] = to.at(lanes.row[i + j], lanes.column[i + j]);
      for (int64_t p = 0; p < count; p += 4) {
        const int64_t at = std::min<int64_t>(p, count - 4);
        const T* rows[4];
        for (int j = 0; j < 4; ++j) rows[j] = from + (at + j) * kElementLanes + i;
        alignas(64) T block[16];
        transpose_quad(rows, 0, block, 4);
        for (int j = 0; j < 4; ++j) std::memcpy(target[j] + at, block + 4 * j, 4 * sizeof(T));
      }
    }
    for (int i = lanes.count / 4 * 4; i < lanes.count; ++i) {
      T* target = to.at(lanes.row[i], lanes.column[i]);
      for (int64_t p = 0; p < count; ++p) target[p] = from[p * kElementLanes + i];
    }
    return;
  }
  for (int i = 0; i < lanes.count; ++i) {
    T* target = to.at(lanes.row[i], lanes.column[i]);
    for (int64_t p = 0; p < count; ++p) target[p] = from[p * kElementLanes + i];
  }
}

// Adds log-dets of a group of elements up per row, in the order of the features, with their rounding errors.
template <class T>
struct RowSums {
  const T* start;  // running log-det, or null
  T* out;
  int64_t features;
  double sum = 0, rest = 0;
  int64_t done = 0;  // features of the current row

  void add(const T* values, const ElementLanes& lanes) {
    for (int i = 0; i < lanes.count; ++i) {
      if (done == 0) {
        sum = start ? static_cast<double>(start[lanes.row[i]]) : 0.0;
        rest = 0;
      }
      add_exactly(sum, rest, static_cast<double>(values[i]));
      if (++done == features) {
        out[lanes.row[i]] = static_cast<T>(sum + rest);
        done = 0;
      }
    }
  }
};

}  // namespace fk::FK_ISA
