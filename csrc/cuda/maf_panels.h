// Products of a packed panel of weights with the activations of a tile of samples, by one warp:
// out[row][sample] = sum over the columns k in [from, to) of weights[k][row] columns[k][sample], for the first `rows`
// rows.
#pragma once
#include "cuda/maf_net.h"
#include "cuda/tensor_cores.h"

namespace fk {

// Rows r and r + 1 of a column.
template <class W>
__device__ inline float2 two_weights(const W* from) {
  if constexpr (std::is_same_v<W, float>) {
    return *reinterpret_cast<const float2*>(from);
  } else {
    const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(from);
    return {to_compute(W{static_cast<std::uint16_t>(bits)}), to_compute(W{static_cast<std::uint16_t>(bits >> 16)})};
  }
}

// On tensor cores a panel and the samples of a tile are just one fragment each, eight columns at a time. Weights come
// from the L2 cache: a warp has kAhead batches of sixteen columns on their way while it multiplies one.
template <class W>
__device__ inline void panel_on_tensor_cores(const W* weights, int height, const float* columns, int from, int to,
                                             float* out, int rows) {
  constexpr int S = kSamples<float>, kSteps = 2, kLoads = 2 * kSteps, kColumns = 8 * kSteps, kAhead = 2;
  constexpr bool kWhole = !std::is_same_v<W, float>;
  static_assert(S == 8 && kPanelRows == 16);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = lane / 4, in_group = lane % 4;
  // Lanes of rows that a lower panel lacks take its first ones; nobody asks for their sums.
  const W* w = weights + static_cast<int64_t>(from + in_group) * height + (2 * group < height ? 2 * group : 0);
  const float* c = columns + static_cast<int64_t>(from + in_group) * S + group;
  const int quarter = 4 * height, batches = (to - from) / kColumns, rest = (to - from) % kColumns;
  float sum[4] = {};
  // A lane has columns in_group, in_group + 4, ... of a batch.
  auto multiply = [&](const float2(&batch)[kLoads], auto exists) {
    Tf32Operand<4> a[kSteps];
    Tf32Operand<2> b[kSteps];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i % 2 * 2;
      if constexpr (kWhole) {
        a[i / 2].set_whole(at, batch[i].x);
        a[i / 2].set_whole(at + 1, batch[i].y);
      } else {
        a[i / 2].set(at, batch[i].x);
        a[i / 2].set(at + 1, batch[i].y);
      }
      b[i / 2].set(i % 2, exists(i) ? c[4 * i * S] : 0.0f);
    }
    multiply_add<kWhole>(sum, a, b);
  };
  // What is no whole batch comes first.
  float2 first[kLoads] = {}, ahead[kAhead][kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (in_group + 4 * i < rest) first[i] = two_weights(w + i * quarter);
  w += static_cast<int64_t>(rest) * height;
  auto fetch = [&](float2(&batch)[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) batch[i] = two_weights(w + i * quarter);
    w += 4 * quarter;
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j)
    if (j < batches) fetch(ahead[j]);
  __syncwarp();
  if (rest) multiply(first, [&](int i) { return in_group + 4 * i < rest; });
  c += rest * S;
  for (int left = batches; left > 0; left -= kAhead)
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < left) {
        multiply(ahead[j], [](int) { return true; });
        c += kColumns * S;
        if (j + kAhead < left) fetch(ahead[j]);
      }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 2 * group + i / 2;
    if (row < rows) out[row * S + 2 * in_group + i % 2] = sum[i];
  }
}

// In the ordinary units a lane takes four rows and every 32/quads-th column: one or two loads of sixteen bytes of
// weights and 32 bytes of activations feed 4 x kSamples multiply-adds.
__device__ inline int lanes_of_rows(int height) { return height <= 4 ? 1 : height <= 8 ? 2 : 4; }

template <class T>
__device__ inline void load_row(T (&to)[kSamples<T>], const T* from) {
  constexpr int N = Pack16<T>::kCount;
#pragma unroll
  for (int i = 0; i < kSamples<T>; i += N) {
    const Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) to[i + j] = pack.value[j];
  }
}

template <class T, class W>
__device__ inline void panel_on_lanes(const W* weights, int height, const T* columns, int from, int to, T* out,
                                      int rows) {
  constexpr int S = kSamples<T>, N = Pack16<T>::kCount;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, across = lanes_of_rows(height);
  const int quad = lane % across, step = kWarp / across;
  const W* w = weights + (4 * quad < height ? 4 * quad : 0);  // a panel of 12 rows leaves every fourth lane idle
  T sum[4][S];
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int s = 0; s < S; ++s) sum[r][s] = T(0);
#pragma unroll 4
  for (int k = from + lane / across; k < to; k += step) {
    T v[4], a[S];
    if constexpr (std::is_same_v<W, T>) {
#pragma unroll
      for (int i = 0; i < 4; i += N) {
        const Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(w + static_cast<int64_t>(k) * height + i);
#pragma unroll
        for (int j = 0; j < N; ++j) v[i + j] = pack.value[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = to_compute(w[static_cast<int64_t>(k) * height + i]);
    }
    load_row(a, columns + static_cast<int64_t>(k) * S);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int s = 0; s < S; ++s) sum[r][s] += v[r] * a[s];
  }
  for (int other = kWarp / 2; other >= across; other /= 2)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int s = 0; s < S; ++s) sum[r][s] += __shfl_xor_sync(kAllLanes, sum[r][s], other);
  if (lane < across)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (4 * quad + r < rows) out[(4 * quad + r) * S + s] = sum[r][s];
}

template <class T>
__device__ inline void panel_product(const Weights<T>& packed, int64_t offset, int height, const T* columns, int from,
                                     int to, T* out, int rows) {
  packed.visit(offset, [&](auto* weights) {
    if constexpr (kUnits<T> == Units::tf32)
      panel_on_tensor_cores(weights, height, columns, from, to, out, rows);
    else
      panel_on_lanes(weights, height, columns, from, to, out, rows);
  });
}

}  // namespace fk
