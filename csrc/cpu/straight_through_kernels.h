// Kernels of straight_through for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// 1 where x > threshold, or where x > noise; a NaN stays one.
template <class T>
void threshold_rows(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::uniform, T> tile(a.stream);
  T level[kLanes];
  for (int i = 0; i < kLanes; ++i) level[i] = a.threshold;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t from = 0; from < a.classes; from += tile.kElements) {
      const int64_t to = std::min<int64_t>(a.classes, from + tile.kElements);
      const T* noise = a.sample ? tile.at(r * a.classes + from, to - from) : nullptr;
      for (int64_t c = from; c < to; c += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, to - c));
        T x[kLanes];
        load_lanes(x, &a.x(r, c), a.x.column, n, T(0));
        if (noise) load_lanes(level, noise + (c - from), 1, n, T(0));
        for (int i = 0; i < kLanes; ++i) x[i] = x[i] > level[i] ? T(1) : (x[i] == x[i] ? T(0) : x[i]);
        store_lanes(&a.y(r, c), 1, x, n);
      }
    }
  }
}

// One-hot of the argmax of x, or of log x + noise.
template <class T>
void categorical_rows(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  for (int64_t r = begin; r < end; ++r) {
    ArgMax<T> argmax;
    for (int64_t from = 0; from < a.classes; from += tile.kElements) {
      const int64_t to = std::min<int64_t>(a.classes, from + tile.kElements);
      const T* noise = a.sample ? tile.at(r * a.classes + from, to - from) : nullptr;
      for (int64_t c = from; c < to; c += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, to - c));
        T x[kLanes];
        load_lanes(x, &a.x(r, c), a.x.column, n, noise ? T(0) : -std::numeric_limits<T>::infinity());
        if (noise)
          for (int i = 0; i < kLanes; ++i) x[i] = math::log(x[i]) + (i < n ? noise[c - from + i] : T(0));
        argmax.add(x, static_cast<std::int32_t>(c / kLanes));
      }
    }
    store_one_hot(&a.y(r, 0), a.classes, argmax.index(), a.sample ? argmax.proper() : !argmax.has_nan());
  }
}

template <class T>
void straight_through(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  a.categorical ? categorical_rows(a, begin, end) : threshold_rows(a, begin, end);
}

}  // namespace fk::FK_ISA
