// Kernels of the noise generators for one instruction set; included by foreach_isa.h.
#include "cpu/noise_kernels.h"

namespace fk::FK_ISA {

// Elements 4 block + begin .. 4 block + end - 1 into out[begin .. end).
template <Noise N, class T>
void noise(RandomStream s, int64_t block, T* out, int64_t begin, int64_t end) {
  const PhiloxRuns runs(s);
  constexpr int64_t kTile = 16 * kNoiseRun;
  std::conditional_t<N == Noise::bits, std::uint32_t, T> tile[kTile];
  for (int64_t i = begin; i < end;) {
    const int64_t skip = i & 3, n = std::min<int64_t>(kTile - skip, end - i);
    fill_noise<N>(runs, static_cast<std::uint64_t>(block) + static_cast<std::uint64_t>(i >> 2), tile,
                  (skip + n + kNoiseRun - 1) / kNoiseRun * kNoiseRun);
    for (int64_t j = 0; j < n; ++j) out[i + j] = static_cast<T>(tile[skip + j]);
    i += n;
  }
}

}  // namespace fk::FK_ISA
