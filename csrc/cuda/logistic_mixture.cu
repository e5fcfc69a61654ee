// logistic_mixture on CUDA. With P = 3 components + 2 parameters an element moves P + 2 numbers forwards and 2 P + 3
// backwards, as a spline does (element_tiles.h). But a component takes five exponentials forwards and nine backwards,
// and four more in each of some ten steps of the inverse's search: 120 instructions forwards, of which a device that
// copies 4.3 TB/s issues some 80 while it moves three numbers, and in the inverse as many in every step. The parameters
// stay in shared memory through all steps, with 1 / s_k beside them. A warp searches until its last lane is through.
#include "common/logistic_mixture.h"

#include "common/affine_by_name.h"
#include "cuda/element_tiles.h"

namespace fk {

template <bool Inverse, class T>
struct MixtureOf {
  MixtureOptions<T> options;
  LawParameters<T> law;
  Law law_name;

  __device__ LaneScales<T, 1> scales(const T* parameters) const {
    const T u = parameters[1];
    const Scale<T> s = scale_by_name(law_name, u, law);
    return {{s.sigma}, {s.log_sigma}, {slope_by_name(law_name, u, law)}};
  }
  __device__ void operator()(T x, T* parameters, Strided<T> scratch, T& y, T& logdet) const {
    MixtureWork<T, 1, Strided<T>> w;
    w.inverse_scale = scratch;
    mixture_lanes<Inverse>(&x, parameters, options, scales(parameters), w, &y, &logdet);
  }
  __device__ void operator()(T grad_y, T grad_logdet, T x, T* parameters, Strided<T> scratch, T& grad_x) const {
    MixtureWork<T, 1, Strided<T>> w;
    w.inverse_scale = scratch;
    mixture_backward_lanes<Inverse>(&grad_y, &grad_logdet, &x, parameters, options, scales(parameters), w, &grad_x,
                                    parameters);
  }
};

// Calls f(op) with the transform of this call.
template <class T, class F>
void with_mixture(const Tensor& x, const Tensor& parameters, double min_log_scale, int64_t law,
                  const std::vector<double>& law_parameters, bool inverse, F&& f) {
  STD_TORCH_CHECK(x.dim() == 2 && parameters.dim() == 3, "expected x (N, D) and parameters (N, D, P)");
  const int64_t components = mixture_components(parameters.size(2));
  STD_TORCH_CHECK(components > 0, "parameters must have 3 K + 2 numbers per feature, K = 1 to 64, got ",
                  parameters.size(2));
  const auto call = [&]<bool Inverse>() {
    f(MixtureOf<Inverse, T>{{static_cast<int>(components), static_cast<T>(min_log_scale)},
                            law_parameters_of<T>(law_parameters),
                            static_cast<Law>(law)});
  };
  inverse ? call.template operator()<true>() : call.template operator()<false>();
}

std::tuple<Tensor, Tensor> logistic_mixture(const Tensor& x, const Tensor& parameters,
                                            const std::optional<Tensor>& logdet, double min_log_scale, int64_t law,
                                            const std::vector<double>& law_parameters, bool inverse) {
  const OnDevice device(x);
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  std::optional<Tensor> running;
  if (logdet) running = as_contiguous(*logdet);
  dispatch_float(x, [&]<class T>() {
    with_mixture<T>(x, parameters, min_log_scale, law, law_parameters, inverse, [&]<class Op>(const Op& op) {
      ElementCall<T> a = element_call<T>(x, parameters);
      a.logdet_in = data_or_null<T>(running);
      a.out = static_cast<T*>(y.mutable_data_ptr());
      a.logdet = static_cast<T*>(total.mutable_data_ptr());
      launch_elements(device, "logistic_mixture", element_kernel<T, Op>, a, op, op.options.components);
    });
  });
  return {y, total};
}

// x is the input of the forward direction in both cases: the inverse's output.
std::tuple<Tensor, Tensor> logistic_mixture_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                                                     const Tensor& parameters, double min_log_scale, int64_t law,
                                                     const std::vector<double>& law_parameters, bool inverse) {
  const OnDevice device(x);
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)}),
         grad_parameters = new_empty(x, {x.size(0), x.size(1), parameters.size(2)});
  const Tensor grad_rows = as_contiguous(grad_logdet);
  dispatch_float(x, [&]<class T>() {
    with_mixture<T>(x, parameters, min_log_scale, law, law_parameters, inverse, [&]<class Op>(const Op& op) {
      ElementCall<T> a = element_call<T>(x, parameters);
      a.grad_y = element_view<T>(grad_y);
      a.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
      a.out = static_cast<T*>(grad_x.mutable_data_ptr());
      a.grad_parameters = static_cast<T*>(grad_parameters.mutable_data_ptr());
      launch_elements(device, "logistic_mixture_backward", element_backward_kernel<T, Op>, a, op,
                      op.options.components);
    });
  });
  return {grad_x, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def(
      "logistic_mixture(Tensor x, Tensor parameters, Tensor? logdet, float min_log_scale, int law, float[] "
      "law_parameters, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "logistic_mixture_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, float min_log_scale, "
      "int law, float[] law_parameters, bool inverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("logistic_mixture", TORCH_BOX(&fk::logistic_mixture));
  m.impl("logistic_mixture_backward", TORCH_BOX(&fk::logistic_mixture_backward));
}
