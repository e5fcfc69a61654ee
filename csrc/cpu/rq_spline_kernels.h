// Kernels of rq_spline for one instruction set; included by foreach_isa.h, includes nothing but what is made for that.
#include "cpu/elements_kernels.h"

namespace fk::FK_ISA {

template <SplineStyle S, bool Inverse, class T>
void spline_rows(const SplineArguments<T>& a, int64_t begin, int64_t end) {
  RowSums<T> sums{a.logdet_in, a.logdet, a.features};
  alignas(64) T theta[kMaxSplineParameters * kElementLanes], x[kElementLanes], y[kElementLanes], ld[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    rq_spline_lanes<S, Inverse, kElementLanes>(x, theta, a.spline, y, ld);
    store_values(a.y, y, lanes);
    sums.add(ld, lanes);
  }
}

template <SplineStyle S, bool Inverse, class T>
void spline_backward_rows(const SplineArguments<T>& a, int64_t begin, int64_t end) {
  alignas(64) T theta[kMaxSplineParameters * kElementLanes], grads[kMaxSplineParameters * kElementLanes];
  alignas(64) T x[kElementLanes], gy[kElementLanes], gl[kElementLanes], gx[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_values(gy, a.grad_y, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    for (int i = 0; i < kElementLanes; ++i) gl[i] = a.grad_logdet[lanes.row[i]];
    rq_spline_backward_lanes<S, Inverse, kElementLanes>(gy, gl, x, theta, a.spline, gx, grads);
    store_values(a.grad_x, gx, lanes);
    store_parameters(a.grad_parameters, grads, lanes, a.count);
  }
}

template <class T, bool Backward>
void rq_spline(const SplineArguments<T>& a, int64_t begin, int64_t end) {
  dispatch_spline(a.spline.style, a.inverse, [&]<SplineStyle S, bool Inverse>() {
    if constexpr (Backward)
      spline_backward_rows<S, Inverse>(a, begin, end);
    else
      spline_rows<S, Inverse>(a, begin, end);
  });
}

}  // namespace fk::FK_ISA
