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
  return run_elements(x, parameters, logdet, [&]<class T>(const OnDevice& device, const ElementCall<T>& call) {
    with_mixture<T>(x, parameters, min_log_scale, law, law_parameters, inverse, [&]<class Op>(const Op& op) {
      launch_elements(device, "logistic_mixture", element_kernel<T, Op>, call, op, op.options.components);
    });
  });
}

// x is the input of the forward direction in both cases: the inverse's output.
std::tuple<Tensor, Tensor> logistic_mixture_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                                                     const Tensor& parameters, double min_log_scale, int64_t law,
                                                     const std::vector<double>& law_parameters, bool inverse) {
  return run_elements_backward(
      grad_y, grad_logdet, x, parameters, [&]<class T>(const OnDevice& device, const ElementCall<T>& call) {
        with_mixture<T>(x, parameters, min_log_scale, law, law_parameters, inverse, [&]<class Op>(const Op& op) {
          launch_elements(device, "logistic_mixture_backward", element_backward_kernel<T, Op>, call, op,
                          op.options.components);
        });
      });
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
