// Kernels of straight_through for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"
#include "cpu/rows_kernels.h"

namespace fk::FK_ISA {

// 1 where x > threshold, or where x > noise; a NaN stays one.
template <class T>
void threshold_rows(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::uniform, T> tile(a.stream);
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < a.classes; c += tile.kElements) {
      const int64_t n = std::min<int64_t>(tile.kElements, a.classes - c);
      T* y = &a.y(r, c);
      copy_to(y, &a.x(r, c), a.x.column, n);
      if (a.sample) {
        const T* level = tile.at(r * a.classes + c, n);
        for (int64_t i = 0; i < n; ++i) y[i] = y[i] > level[i] ? T(1) : (y[i] == y[i] ? T(0) : y[i]);
      } else {
        const T level = a.threshold;
        for (int64_t i = 0; i < n; ++i) y[i] = y[i] > level ? T(1) : (y[i] == y[i] ? T(0) : y[i]);
      }
    }
}

// One-hot of the argmax of x, or of log x + noise.
template <class T>
void categorical_rows(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  NoiseTile<Noise::gumbel, T> tile(a.stream);
  for (int64_t r = begin; r < end; ++r) {
    T* y = &a.y(r, 0);
    copy_to(y, &a.x(r, 0), a.x.column, a.classes);
    ArgMax<T> argmax;
    if (a.sample) {
      for (int64_t i = 0; i < a.classes; ++i) y[i] = math::log(y[i]);
      for (int64_t c = 0; c < a.classes; c += tile.kElements) {
        const int64_t n = std::min<int64_t>(tile.kElements, a.classes - c);
        add_to(y + c, tile.at(r * a.classes + c, n), 1, n);
      }
    }
    argmax.add(y, 0, a.classes);
    store_one_hot(y, a.classes, argmax.index(), a.sample ? argmax.proper() : !argmax.has_nan());
  }
}

template <class T>
void straight_through(const StraightThroughArguments<T>& a, int64_t begin, int64_t end) {
  a.categorical ? categorical_rows(a, begin, end) : threshold_rows(a, begin, end);
}

}  // namespace fk::FK_ISA
