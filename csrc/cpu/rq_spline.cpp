// rq_spline on the CPU: y and the log-det of a monotonic rational spline, one pass over memory, and its backward.
#include "cpu/tensor.h"

#include "cpu/elements.h"
#include "cpu/transform.h"

namespace fk {

inline constexpr int kMaxSplineParameters = 4 * kMaxBins - 1;

template <class T>
struct SplineArguments {
  ElementView<const T> x, parameters, grad_y;
  const T* logdet_in = nullptr;
  const T* grad_logdet = nullptr;
  ElementView<T> y, grad_x, grad_parameters;
  T* logdet = nullptr;
  int64_t features = 0, count = 0;
  Transform<T> transform;
};

}  // namespace fk

#define FK_KERNELS "cpu/rq_spline_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

template <class T>
void bind_spline(Transform<T>& t, int64_t bins, int64_t style, const double* numbers, bool inverse) {
  STD_TORCH_CHECK(bins >= 2 && bins <= kMaxBins, "bins must be 2 to ", kMaxBins, ", got ", bins);
  t.spline = spline_options_of<T>(bins, style, numbers);
  FK_BEST(bind_spline<T>)(t, inverse);
}

template void bind_spline(Transform<float>&, int64_t, int64_t, const double*, bool);
template void bind_spline(Transform<double>&, int64_t, int64_t, const double*, bool);

template <class T>
SplineArguments<T> spline_arguments(const Tensor& x, const Tensor& parameters, int64_t bins, int64_t style,
                                    const std::vector<double>& numbers, bool inverse) {
  check_elements(x, parameters, spline_parameters(bins, style));
  SplineArguments<T> a;
  a.x = element_view<T>(x);
  a.parameters = element_view<T>(parameters);
  a.features = x.size(1);
  a.count = parameters.size(2);
  bind_spline(a.transform, bins, style, numbers.data(), inverse);
  return a;
}

// Exponentials are what takes the time: two per bin.
inline int64_t spline_grain(const Tensor& x, int64_t bins) { return grain_for(x.size(1) * bins); }

static std::tuple<Tensor, Tensor> rq_spline(const Tensor& x, const Tensor& parameters,
                                            const std::optional<Tensor>& logdet, int64_t bins, int64_t style,
                                            const std::vector<double>& numbers, bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  std::optional<Tensor> running;
  if (logdet) running = as_contiguous(*logdet);
  dispatch_float(x, [&]<class T>() {
    auto a = spline_arguments<T>(x, parameters, bins, style, numbers, inverse);
    a.logdet_in = data_or_null<T>(running);
    a.y = mutable_element_view<T>(y);
    a.logdet = static_cast<T*>(total.mutable_data_ptr());
    if (a.features == 0) return only_running<T>(running, total);
    torch::stable::parallel_for(0, x.size(0), spline_grain(x, bins),
                                [&](int64_t begin, int64_t end) { FK_BEST(rq_spline<T>)(a, begin, end); });
  });
  return {y, total};
}

static std::tuple<Tensor, Tensor> rq_spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                                                     const Tensor& parameters, int64_t bins, int64_t style,
                                                     const std::vector<double>& numbers, bool inverse) {
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)}),
         grad_parameters = new_empty(x, {x.size(0), x.size(1), parameters.size(2)});
  const Tensor grad_rows = as_contiguous(grad_logdet);
  dispatch_float(x, [&]<class T>() {
    auto a = spline_arguments<T>(x, parameters, bins, style, numbers, inverse);
    a.grad_y = element_view<T>(grad_y);
    a.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    a.grad_x = mutable_element_view<T>(grad_x);
    a.grad_parameters = mutable_element_view<T>(grad_parameters);
    if (a.features == 0) return;
    torch::stable::parallel_for(0, x.size(0), spline_grain(x, bins),
                                [&](int64_t begin, int64_t end) { FK_BEST(rq_spline_backward<T>)(a, begin, end); });
  });
  return {grad_x, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("rq_spline", TORCH_BOX(&fk::rq_spline));
  m.impl("rq_spline_backward", TORCH_BOX(&fk::rq_spline_backward));
}
