// dequantize on the CPU: noise is drawn into the cache, added, squashed by a logit, and its log-det summed, in one
// pass.
#include "common/dequantize.h"

#include "common/lanes.h"
#include "cpu/random.h"

namespace fk {

template <class T>
struct DequantizeArguments {
  const void* x = nullptr;  // T or bytes, contiguous
  const T* noise = nullptr;
  RandomStream stream;
  Dequantization<T> options{};
  bool logit = false;
  int64_t features = 0;
  T* y = nullptr;
  T* logdet = nullptr;
};

}  // namespace fk

#define FK_KERNELS "cpu/dequantize_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

static std::tuple<Tensor, Tensor> dequantize(const Tensor& x, const std::optional<Tensor>& noise, const Tensor& seed,
                                             int64_t stream, int64_t levels, bool logit, double margin,
                                             bool in_double) {
  const int64_t rows = x.size(0), features = x.size(1);
  const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor y = new_empty(x, {rows, features}, type), logdet = new_empty(x, {rows}, type);
  const Tensor given = as_contiguous(x);
  std::optional<Tensor> drawn;
  if (noise) drawn = as_contiguous(*noise);
  dispatch_float(y, [&]<class T>() {
    DequantizeArguments<T> a;
    a.x = given.const_data_ptr();
    a.noise = data_or_null<T>(drawn);
    a.stream = stream_of(seed, stream);
    a.options = dequantization<T>(levels, logit, margin);
    a.logit = logit;
    a.features = features;
    a.y = static_cast<T*>(y.mutable_data_ptr());
    a.logdet = static_cast<T*>(logdet.mutable_data_ptr());
    const bool bytes = given.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(bytes || given.scalar_type() == type, "x must be uint8 or of the type that is calculated in");
    torch::stable::parallel_for(0, rows, grain_for(4 * features), [&](int64_t begin, int64_t end) {
      if (bytes)
        FK_BEST(dequantize<T, std::uint8_t>)(a, begin, end);
      else
        FK_BEST(dequantize<T, T>)(a, begin, end);
    });
  });
  return {y, logdet};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) { m.impl("dequantize", TORCH_BOX(&fk::dequantize)); }
