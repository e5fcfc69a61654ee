// gumbel_softmax on the CPU: noise is drawn into the cache, added, and gone; its backward needs none.
#include "cpu/random.h"

namespace fk {

template <class T>
struct GumbelArguments {
  View<const T> logits, y_in, grad;
  const T* tau = nullptr;
  int64_t tau_stride = 0, classes = 0;
  RandomStream stream;
  bool hard = false;
  View<T> y;
  T* grad_tau = nullptr;
};

}  // namespace fk

#define FK_KERNELS "cpu/gumbel_softmax_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

static Tensor gumbel_softmax(const Tensor& logits, const Tensor& tau, const Tensor& seed, int64_t stream, bool hard) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor y = new_empty(logits, {rows, classes});
  if (rows * classes == 0) return y;
  dispatch_float(logits, [&]<class T>() {
    GumbelArguments<T> a;
    a.logits = view<T>(logits);
    a.tau = static_cast<const T*>(tau.const_data_ptr());
    a.tau_stride = tau.stride(0);
    a.classes = classes;
    a.stream = stream_of(seed, stream);
    a.hard = hard;
    a.y = mutable_view<T>(y);
    torch::stable::parallel_for(0, rows, grain_for(4 * classes),
                                [&](int64_t begin, int64_t end) { FK_BEST(gumbel_softmax<T>)(a, begin, end); });
  });
  return y;
}

static std::tuple<Tensor, Tensor> gumbel_softmax_backward(const Tensor& grad, const Tensor& y, const Tensor& tau,
                                                          bool for_tau) {
  const int64_t rows = y.size(0), classes = y.size(1);
  Tensor grad_logits = new_empty(y, {rows, classes}), grad_tau = new_empty(y, {for_tau ? rows : 0});
  dispatch_float(y, [&]<class T>() {
    GumbelArguments<T> a;
    a.y_in = view<T>(y);
    a.grad = view<T>(grad);
    a.tau = static_cast<const T*>(tau.const_data_ptr());
    a.tau_stride = tau.stride(0);
    a.classes = classes;
    a.y = mutable_view<T>(grad_logits);
    a.grad_tau = for_tau ? static_cast<T*>(grad_tau.mutable_data_ptr()) : nullptr;
    torch::stable::parallel_for(0, rows, grain_for(classes), [&](int64_t begin, int64_t end) {
      FK_BEST(gumbel_softmax_backward<T>)(a, begin, end);
    });
  });
  return {grad_logits, grad_tau};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&fk::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&fk::gumbel_softmax_backward));
}
