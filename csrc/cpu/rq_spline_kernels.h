// Kernels of rq_spline for one instruction set; included by foreach_isa.h, includes nothing but what is made for that.
#include "cpu/elements_kernels.h"

namespace fk::FK_ISA {

template <SplineStyle S, bool Inverse, class T>
void spline_lanes(const T* x, const T* parameters, T* y, T* logdet, const Transform<T>& t) {
  alignas(64) T ld[kTransformLanes];
  rq_spline_lanes<S, Inverse, kTransformLanes>(x, parameters, t.spline, y, ld);
  for (int i = 0; i < kTransformLanes; ++i) logdet[i] += ld[i];
}

template <SplineStyle S, bool Inverse, class T>
void spline_lanes_backward(const T* grad_y, const T* grad_logdet, const T* x, const T* parameters, T* grad_x,
                           T* grad_parameters, const Transform<T>& t) {
  rq_spline_backward_lanes<S, Inverse, kTransformLanes>(grad_y, grad_logdet, x, parameters, t.spline, grad_x,
                                                        grad_parameters);
}

template <class T>
void bind_spline(Transform<T>& t, bool inverse) {
  dispatch_spline(t.spline.style, inverse, [&]<SplineStyle S, bool Inverse>() {
    t.forward = spline_lanes<S, Inverse, T>;
    t.backward = spline_lanes_backward<S, Inverse, T>;
  });
}

template <class T>
void rq_spline(const SplineArguments<T>& a, int64_t begin, int64_t end) {
  RowSums<T> sums{a.logdet_in, a.logdet, a.features};
  alignas(64) T theta[kMaxSplineParameters * kElementLanes], x[kElementLanes], y[kElementLanes], ld[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    for (int i = 0; i < kElementLanes; ++i) ld[i] = T(0);
    a.transform.forward(x, theta, y, ld, a.transform);
    store_values(a.y, y, lanes);
    sums.add(ld, lanes);
  }
}

template <class T>
void rq_spline_backward(const SplineArguments<T>& a, int64_t begin, int64_t end) {
  alignas(64) T theta[kMaxSplineParameters * kElementLanes], grads[kMaxSplineParameters * kElementLanes];
  alignas(64) T x[kElementLanes], gy[kElementLanes], gl[kElementLanes], gx[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_values(gy, a.grad_y, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    for (int i = 0; i < kElementLanes; ++i) gl[i] = a.grad_logdet[lanes.row[i]];
    a.transform.backward(gy, gl, x, theta, gx, grads, a.transform);
    store_values(a.grad_x, gx, lanes);
    store_parameters(a.grad_parameters, grads, lanes, a.count);
  }
}

}  // namespace fk::FK_ISA
