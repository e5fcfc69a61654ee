// An elementwise transform chosen at run time: what ends an autoregressive layer and what the element operators call.
#pragma once
#include "common/rq_spline.h"
#include "common/scales.h"

namespace fk {

inline constexpr int kTransformLanes = 16;

// Functions over the lanes of one feature, parameters as rows [parameter][lane].
//   forward   y, and the log-det added to, from x and the parameters
//   backward  gradients of x and the parameters
template <class T>
struct Transform {
  using Forward = void (*)(const T* x, const T* parameters, T* y, T* logdet, const Transform&);
  using Backward = void (*)(const T* grad_y, const T* grad_logdet, const T* x, const T* parameters, T* grad_x,
                            T* grad_parameters, const Transform&);
  Forward forward = nullptr;
  Backward backward = nullptr;
  LawParameters<T> law{};
  SplineOptions<T> spline{};
};

// flowkernels/transforms.py numbers the transforms of an autoregressive layer: the scale laws, then the styles of
// splines.
inline bool is_spline(int64_t code) { return code >= static_cast<int64_t>(Law::count); }

// Makes a spline of the transform (rq_spline.cpp).
template <class T>
void bind_spline(Transform<T>& t, int64_t bins, int64_t style, const double* numbers, bool inverse);

extern template void bind_spline(Transform<float>&, int64_t, int64_t, const double*, bool);
extern template void bind_spline(Transform<double>&, int64_t, int64_t, const double*, bool);

}  // namespace fk
