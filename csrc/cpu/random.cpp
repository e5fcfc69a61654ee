// The noise generators on the CPU: consecutive elements of one random stream.
#include "cpu/random.h"

#define FK_KERNELS "cpu/random_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

template <Noise N, class T>
void fill(Tensor& out, const RandomStream& s, int64_t block) {
  T* data = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, out.size(0), kGrain,
                              [&](int64_t begin, int64_t end) { FK_BEST(noise<N, T>)(s, block, data, begin, end); });
}

Tensor noise(const Tensor& seed, int64_t stream, int64_t block, int64_t count, int64_t kind, bool in_double) {
  const RandomStream s = stream_of(seed, stream);
  const Noise noise = static_cast<Noise>(kind);
  const ScalarType type = noise == Noise::bits ? ScalarType::Long : in_double ? ScalarType::Double : ScalarType::Float;
  Tensor out = new_empty(seed, {count}, type);
  if (noise == Noise::bits) fill<Noise::bits, int64_t>(out, s, block);
  if (noise == Noise::uniform)
    in_double ? fill<Noise::uniform, double>(out, s, block) : fill<Noise::uniform, float>(out, s, block);
  if (noise == Noise::normal)
    in_double ? fill<Noise::normal, double>(out, s, block) : fill<Noise::normal, float>(out, s, block);
  if (noise == Noise::gumbel)
    in_double ? fill<Noise::gumbel, double>(out, s, block) : fill<Noise::gumbel, float>(out, s, block);
  return out;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) { m.impl("noise", TORCH_BOX(&fk::noise)); }
