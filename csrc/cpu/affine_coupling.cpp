// affine_coupling on the CPU: y and the log-det of an affine transform, one pass over memory, and its backward.
#include "cpu/tensor.h"

#include "common/elementwise.h"

namespace fk {

template <class T>
struct AffineArguments {
  View<const T> x, shift, scale, grad_y;
  const T* logdet_in = nullptr;
  const T* grad_logdet = nullptr;
  View<T> y, grad_x, grad_shift, grad_scale;
  T* logdet = nullptr;
  int64_t features = 0;
  Law law_name = Law::exp;
  LawParameters<T> law{};
  Form form = Form::scale_shift;
  bool inverse = false;
};

}  // namespace fk

#define FK_KERNELS "cpu/affine_coupling_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

template <class T>
AffineArguments<T> affine_arguments(const Tensor& x, const Tensor& shift, const Tensor& scale, int64_t law,
                                    const std::vector<double>& law_parameters, int64_t form, bool inverse) {
  AffineArguments<T> a;
  a.x = view<T>(x);
  a.shift = view<T>(shift);
  a.scale = view<T>(scale);
  a.features = x.size(1);
  a.law_name = static_cast<Law>(law);
  a.law = law_parameters_of<T>(law_parameters);
  a.form = static_cast<Form>(form);
  a.inverse = inverse;
  return a;
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                           const std::optional<Tensor>& logdet, int64_t law,
                                           const std::vector<double>& law_parameters, int64_t form, bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  dispatch_float(x, [&]<class T>() {
    auto a = affine_arguments<T>(x, shift, scale, law, law_parameters, form, inverse);
    a.logdet_in = data_or_null<T>(logdet);
    a.y = mutable_view<T>(y);
    a.logdet = static_cast<T*>(total.mutable_data_ptr());
    torch::stable::parallel_for(0, x.size(0), grain_for(x.size(1)), [&](int64_t begin, int64_t end) {
      FK_BEST(affine_coupling<T, false>)(a, begin, end);
    });
  });
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                            const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                            int64_t law, const std::vector<double>& law_parameters,
                                                            int64_t form, bool inverse) {
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)}), grad_shift = new_empty(x, {x.size(0), x.size(1)}),
         grad_scale = new_empty(x, {x.size(0), x.size(1)});
  const Tensor grad_rows = torch::stable::contiguous(grad_logdet);
  dispatch_float(x, [&]<class T>() {
    auto a = affine_arguments<T>(x, shift, scale, law, law_parameters, form, inverse);
    a.grad_y = view<T>(grad_y);
    a.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    a.grad_x = mutable_view<T>(grad_x);
    a.grad_shift = mutable_view<T>(grad_shift);
    a.grad_scale = mutable_view<T>(grad_scale);
    torch::stable::parallel_for(0, x.size(0), grain_for(x.size(1)), [&](int64_t begin, int64_t end) {
      FK_BEST(affine_coupling<T, true>)(a, begin, end);
    });
  });
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&fk::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&fk::affine_coupling_backward));
}
