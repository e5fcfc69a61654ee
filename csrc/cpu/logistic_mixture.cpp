// logistic_mixture on the CPU: y and the log-det of Flow++'s mixture-of-logistics transform, its inverse and gradients.
#include "cpu/tensor.h"

#include "common/logistic_mixture.h"
#include "cpu/elements.h"

namespace fk {

inline constexpr int kMaxMixtureParameters = 3 * kMaxComponents + 2;

template <class T>
struct MixtureArguments {
  ElementView<const T> x, parameters, grad_y;
  const T* logdet_in = nullptr;
  const T* grad_logdet = nullptr;
  ElementView<T> y, grad_x, grad_parameters;
  T* logdet = nullptr;
  int64_t features = 0, count = 0;
  MixtureOptions<T> mixture{};
  Law law_name = Law::exp;
  LawParameters<T> law{};
  bool inverse = false;
};

}  // namespace fk

#define FK_KERNELS "cpu/logistic_mixture_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

template <class T>
MixtureArguments<T> mixture_arguments(const Tensor& x, const Tensor& parameters, double min_log_scale, int64_t law,
                                      const std::vector<double>& law_parameters, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 2 && parameters.dim() == 3, "expected x (N, D) and parameters (N, D, P)");
  const int64_t count = parameters.size(2), components = mixture_components(count);
  STD_TORCH_CHECK(components > 0, "parameters must have 3 K + 2 numbers per feature, K = 1 to 64, got ", count);
  MixtureArguments<T> a;
  a.x = element_view<T>(x);
  a.parameters = element_view<T>(parameters);
  a.features = x.size(1);
  a.count = count;
  a.mixture = {static_cast<int>(components), static_cast<T>(min_log_scale)};
  a.law_name = static_cast<Law>(law);
  a.law = law_parameters_of<T>(law_parameters);
  a.inverse = inverse;
  return a;
}

// Exponentials are what takes the time: five per component, and in the inverse a dozen times that.
inline int64_t mixture_grain(const Tensor& x, const Tensor& parameters, bool inverse) {
  return grain_for(x.size(1) * parameters.size(2) * (inverse ? 8 : 1));
}

static std::tuple<Tensor, Tensor> logistic_mixture(const Tensor& x, const Tensor& parameters,
                                                   const std::optional<Tensor>& logdet, double min_log_scale,
                                                   int64_t law, const std::vector<double>& law_parameters,
                                                   bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  std::optional<Tensor> running;
  if (logdet) running = as_contiguous(*logdet);
  dispatch_float(x, [&]<class T>() {
    auto a = mixture_arguments<T>(x, parameters, min_log_scale, law, law_parameters, inverse);
    a.logdet_in = data_or_null<T>(running);
    a.y = mutable_element_view<T>(y);
    a.logdet = static_cast<T*>(total.mutable_data_ptr());
    if (a.features == 0) return only_running<T>(running, total);
    torch::stable::parallel_for(0, x.size(0), mixture_grain(x, parameters, inverse), [&](int64_t begin, int64_t end) {
      FK_BEST(logistic_mixture<T, false>)(a, begin, end);
    });
  });
  return {y, total};
}

// x is the input of the forward direction in both cases: the inverse's output.
static std::tuple<Tensor, Tensor> logistic_mixture_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                            const Tensor& x, const Tensor& parameters,
                                                            double min_log_scale, int64_t law,
                                                            const std::vector<double>& law_parameters, bool inverse) {
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)}),
         grad_parameters = new_empty(x, {x.size(0), x.size(1), parameters.size(2)});
  const Tensor grad_rows = as_contiguous(grad_logdet);
  dispatch_float(x, [&]<class T>() {
    auto a = mixture_arguments<T>(x, parameters, min_log_scale, law, law_parameters, inverse);
    a.grad_y = element_view<T>(grad_y);
    a.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    a.grad_x = mutable_element_view<T>(grad_x);
    a.grad_parameters = mutable_element_view<T>(grad_parameters);
    if (a.features == 0) return;
    torch::stable::parallel_for(0, x.size(0), mixture_grain(x, parameters, false),
                                [&](int64_t begin, int64_t end) { FK_BEST(logistic_mixture<T, true>)(a, begin, end); });
  });
  return {grad_x, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("logistic_mixture", TORCH_BOX(&fk::logistic_mixture));
  m.impl("logistic_mixture_backward", TORCH_BOX(&fk::logistic_mixture_backward));
}
