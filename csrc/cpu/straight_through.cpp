// straight_through on the CPU: hard values, by a threshold or a largest category, of x itself or sampled from
// it.
#include "cpu/random.h"

namespace fk {

template <class T>
struct StraightThroughArguments {
  View<const T> x;
  int64_t classes = 0;
  RandomStream stream;
  bool sample = false, categorical = false;
  T threshold = T(0);
  View<T> y;
};

}  // namespace fk

#define FK_KERNELS "cpu/straight_through_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

Tensor straight_through(const Tensor& x, const std::optional<Tensor>& seed, int64_t stream, int64_t kind,
                        double threshold) {
  const int64_t rows = x.size(0), classes = x.size(1);
  Tensor y = new_empty(x, {rows, classes});
  if (rows * classes == 0) return y;
  dispatch_float(x, [&]<class T>() {
    StraightThroughArguments<T> a;
    a.x = view<T>(x);
    a.classes = classes;
    a.sample = seed.has_value();
    if (a.sample) a.stream = stream_of(*seed, stream);
    a.categorical = kind == 1;
    a.threshold = static_cast<T>(threshold);
    a.y = mutable_view<T>(y);
    torch::stable::parallel_for(0, rows, grain_for(classes),
                                [&](int64_t begin, int64_t end) { FK_BEST(straight_through<T>)(a, begin, end); });
  });
  return y;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) { m.impl("straight_through", TORCH_BOX(&fk::straight_through)); }
