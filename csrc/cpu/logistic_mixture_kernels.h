// Kernels of logistic_mixture for one instruction set; included by foreach_isa.h, includes nothing but what is made for
// that.
#include "cpu/elements_kernels.h"

namespace fk::FK_ISA {

template <bool Inverse, class T>
void mixture_rows(const MixtureArguments<T>& a, int64_t begin, int64_t end) {
  RowSums<T> sums{a.logdet_in, a.logdet, a.features};
  alignas(64) T theta[kMaxMixtureParameters * kElementLanes], x[kElementLanes], y[kElementLanes], ld[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    LaneScales<T, kElementLanes> scales;
    MixtureWork<T, kElementLanes> work;
    dispatch_law(a.law_name, [&]<Law L>() { lane_scales<L>(theta + kElementLanes, a.law, scales); });
    mixture_lanes<Inverse>(x, theta, a.mixture, scales, work, y, ld);
    store_values(a.y, y, lanes);
    sums.add(ld, lanes);
  }
}

template <bool Inverse, class T>
void mixture_backward_rows(const MixtureArguments<T>& a, int64_t begin, int64_t end) {
  alignas(64) T theta[kMaxMixtureParameters * kElementLanes], grads[kMaxMixtureParameters * kElementLanes];
  alignas(64) T x[kElementLanes], gy[kElementLanes], gl[kElementLanes], gx[kElementLanes];
  for (int64_t e = begin * a.features; e < end * a.features; e += kElementLanes) {
    const ElementLanes lanes(e, end * a.features, a.features);
    load_values(x, a.x, lanes);
    load_values(gy, a.grad_y, lanes);
    load_parameters(theta, a.parameters, lanes, a.count);
    for (int i = 0; i < kElementLanes; ++i) gl[i] = a.grad_logdet[lanes.row[i]];
    LaneScales<T, kElementLanes> scales;
    MixtureWork<T, kElementLanes> work;
    dispatch_law(a.law_name, [&]<Law L>() { lane_scales<L>(theta + kElementLanes, a.law, scales); });
    mixture_backward_lanes<Inverse>(gy, gl, x, theta, a.mixture, scales, work, gx, grads);
    store_values(a.grad_x, gx, lanes);
    store_parameters(a.grad_parameters, grads, lanes, a.count);
  }
}

template <class T, bool Backward>
void logistic_mixture(const MixtureArguments<T>& a, int64_t begin, int64_t end) {
  if constexpr (Backward)
    a.inverse ? mixture_backward_rows<true>(a, begin, end) : mixture_backward_rows<false>(a, begin, end);
  else
    a.inverse ? mixture_rows<true>(a, begin, end) : mixture_rows<false>(a, begin, end);
}

}  // namespace fk::FK_ISA
