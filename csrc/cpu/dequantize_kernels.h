// Kernels of dequantize for one instruction set; included by foreach_isa.h, includes nothing but what is made for that.
#include "cpu/noise_kernels.h"

namespace fk::FK_ISA {

inline constexpr int kDequantizeLanes = 32;

// One row, of which `noise` are the numbers in (0, 1).
template <bool Logit, class T, class X>
void dequantize_row(const DequantizeArguments<T>& a, const X* x, const T* noise, T* y, double& sum) {
  double lanes[kDequantizeLanes] = {};
  int64_t c = 0;
  const T step = T(1) / a.options.levels;
  for (; c + kDequantizeLanes <= a.features; c += kDequantizeLanes) {
    // Bytes become numbers in a loop of their own: next to bytes, GCC takes vectors of four floats instead of sixteen.
    T level[kDequantizeLanes], ld[kDequantizeLanes];
    for (int i = 0; i < kDequantizeLanes; ++i) level[i] = static_cast<T>(x[c + i]);
    FK_SIMD
    for (int i = 0; i < kDequantizeLanes; ++i) {
      if constexpr (Logit) {
        const Dequantized<T> out = dequantize_logit(level[i], noise[c + i], a.options);
        y[c + i] = out.y;
        ld[i] = out.logdet;
      } else {
        y[c + i] = dequantize_plain(level[i], noise[c + i], step);
      }
    }
    if constexpr (Logit) {
      FK_SIMD
      for (int i = 0; i < kDequantizeLanes; ++i) lanes[i] += static_cast<double>(ld[i]);
    }
  }
  for (; c < a.features; ++c) {
    if constexpr (Logit) {
      const Dequantized<T> out = dequantize_logit(static_cast<T>(x[c]), noise[c], a.options);
      y[c] = out.y;
      lanes[c % kDequantizeLanes] += static_cast<double>(out.logdet);
    } else {
      y[c] = dequantize_plain(static_cast<T>(x[c]), noise[c], step);
    }
  }
  for (int i = 0; i < kDequantizeLanes; ++i) sum += lanes[i];
}

template <class T, class X>
void dequantize(const DequantizeArguments<T>& a, int64_t begin, int64_t end) {
  using Tile = NoiseTile<Noise::uniform, T>;
  Tile tile(a.stream);
  const X* x = static_cast<const X*>(a.x);
  std::vector<T> drawn(a.noise ? 0 : a.features);
  for (int64_t r = begin; r < end; ++r) {
    const T* noise = a.noise ? a.noise + r * a.features : drawn.data();
    if (!a.noise && a.features <= Tile::kElements) {
      noise = tile.at(r * a.features, a.features);
    } else if (!a.noise) {
      for (int64_t c = 0; c < a.features; c += Tile::kElements) {
        const int64_t n = std::min<int64_t>(Tile::kElements, a.features - c);
        std::memcpy(drawn.data() + c, tile.at(r * a.features + c, n), n * sizeof(T));
      }
    }
    // Without the logit every element adds the same.
    double sum = a.logit ? 0.0 : static_cast<double>(a.options.log_slope) * a.features;
    if (a.logit)
      dequantize_row<true>(a, x + r * a.features, noise, a.y + r * a.features, sum);
    else
      dequantize_row<false>(a, x + r * a.features, noise, a.y + r * a.features, sum);
    a.logdet[r] = static_cast<T>(sum);
  }
}

}  // namespace fk::FK_ISA
