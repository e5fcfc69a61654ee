// rq_spline on CUDA. With P = 3 bins - 1 parameters (4 bins - 1 if linear-rational), an element moves P + 2 numbers
// forwards and 2 P + 3 backwards: 100 and 196 bytes in float32 with 8 bins. While so much is copied at 4.3 TB/s, 132
// multiprocessors issue some 700 and 1350 instructions for it at 1.75 GHz, and it needs about 1000 and 1500 (compiled
// for sm_90: a logit takes 47, for its exponential, a step of an exact sum and one of the search for the bin). So
// moving the parameters must cost few instructions (element_tiles.h), the exponential of a logit is taken once and lies
// in shared memory in its place (zuko's backward alone needs both), and nothing is a call or an array in local memory.
// The largest tile of a warp, zuko's 64 bins backwards in float64, is 82 KB: every device from sm_80 on has that.
#define FK_CALLED FK_INLINE  // a call's arguments would lie in memory
#include "common/rq_spline.h"

#include "cuda/element_tiles.h"

namespace fk {

template <SplineStyle S, bool Inverse, class T>
struct SplineForward {
  SplineOptions<T> options;
  __device__ void operator()(T x, T* parameters, Strided<T>, T& y, T& logdet) const {
    SplineWork<T, 1, T*> w;
    w.x.exponentials = parameters;
    w.y.exponentials = parameters + options.bins;
    rq_spline_lanes<S, Inverse>(&x, parameters, options, w, &y, &logdet);
  }
};

template <SplineStyle S, bool Inverse, class T>
struct SplineBackward {
  static constexpr bool kInPlace = S != SplineStyle::zuko;
  SplineOptions<T> options;
  __device__ void operator()(T grad_y, T grad_logdet, T x, T* parameters, Strided<T> scratch, T& grad_x) const {
    SplineWork<T, 1, Strided<T>> w;
    w.x.exponentials = kInPlace ? Strided<T>{parameters, 1} : scratch;
    w.y.exponentials = w.x.exponentials + options.bins;
    rq_spline_backward_lanes<S, Inverse>(&grad_y, &grad_logdet, &x, parameters, options, w, &grad_x, parameters);
  }
};

template <class T>
SplineOptions<T> spline_options(const Tensor& x, const Tensor& parameters, int64_t bins, int64_t style,
                                const std::vector<double>& numbers) {
  STD_TORCH_CHECK(bins >= 2 && bins <= kMaxBins, "bins must be 2 to ", kMaxBins, ", got ", bins);
  check_elements(x, parameters, spline_parameters(bins, style));
  return spline_options_of<T>(bins, style, numbers);
}

std::tuple<Tensor, Tensor> rq_spline(const Tensor& x, const Tensor& parameters, const std::optional<Tensor>& logdet,
                                     int64_t bins, int64_t style, const std::vector<double>& numbers, bool inverse) {
  return run_elements(x, parameters, logdet, [&]<class T>(const OnDevice& device, const ElementCall<T>& call) {
    const SplineOptions<T> options = spline_options<T>(x, parameters, bins, style, numbers);
    dispatch_spline(options.style, inverse, [&]<SplineStyle S, bool Inverse>() {
      using Op = SplineForward<S, Inverse, T>;
      launch_elements(device, "rq_spline", element_kernel<T, Op>, call, Op{options});
    });
  });
}

std::tuple<Tensor, Tensor> rq_spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                                              const Tensor& parameters, int64_t bins, int64_t style,
                                              const std::vector<double>& numbers, bool inverse) {
  return run_elements_backward(
      grad_y, grad_logdet, x, parameters, [&]<class T>(const OnDevice& device, const ElementCall<T>& call) {
        const SplineOptions<T> options = spline_options<T>(x, parameters, bins, style, numbers);
        dispatch_spline(options.style, inverse, [&]<SplineStyle S, bool Inverse>() {
          using Op = SplineBackward<S, Inverse, T>;
          launch_elements(device, "rq_spline_backward", element_backward_kernel<T, Op>, call, Op{options},
                          Op::kInPlace ? 0 : 2 * options.bins);
        });
      });
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def(
      "rq_spline(Tensor x, Tensor parameters, Tensor? logdet, int bins, int style, float[] numbers, bool inverse) -> "
      "(Tensor, Tensor)");
  m.def(
      "rq_spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, int bins, int style, float[] "
      "numbers, bool inverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("rq_spline", TORCH_BOX(&fk::rq_spline));
  m.impl("rq_spline_backward", TORCH_BOX(&fk::rq_spline_backward));
}
