// The affine transform of one element: both directions and their derivatives, in its three forms.
//
//   scale_shift  y = sigma x + t            shift_scale  y = (x + t) sigma            gate  y = sigma x + (1 - sigma) t
//
// The log-det of the forward direction is log sigma, of the inverse -log sigma.
#pragma once
#include "common/scales.h"

namespace fk {

enum class Form : int { scale_shift, shift_scale, gate, count };

template <class T>
struct Transformed {
  T y, logdet;
};

// The transform once sigma is known; `complement` is 1 - sigma, which only the gate form looks at.
template <Form F, bool Inverse, class T>
FK_INLINE Transformed<T> affine_of_scale(T x, T shift, const Scale<T>& s, T complement) {
  if constexpr (!Inverse) {
    if constexpr (F == Form::scale_shift) return {s.sigma * x + shift, s.log_sigma};
    if constexpr (F == Form::shift_scale) return {(x + shift) * s.sigma, s.log_sigma};
    return {s.sigma * x + complement * shift, s.log_sigma};
  } else {
    if constexpr (F == Form::scale_shift) return {(x - shift) / s.sigma, -s.log_sigma};
    if constexpr (F == Form::shift_scale) return {x / s.sigma - shift, -s.log_sigma};
    return {(x - complement * shift) / s.sigma, -s.log_sigma};
  }
}

template <Law L, Form F, bool Inverse, class T>
FK_INLINE Transformed<T> affine(T x, T shift, T u, const LawParameters<T>& p) {
  return affine_of_scale<F, Inverse>(x, shift, scale_of<L>(u, p), F == Form::gate ? gate_complement(u, p) : T(0));
}

template <class T>
struct AffineGradient {
  T x, shift, u;
};

// x is the input of the direction that is differentiated (the y of the flow when Inverse); `slope` is d log sigma / du.
template <Form F, bool Inverse, class T>
FK_INLINE AffineGradient<T> affine_backward_of_scale(T grad_y, T grad_logdet, T x, T shift, const Scale<T>& s, T slope,
                                                     T complement) {
  // dy/dlog sigma is sigma w forward and -w backward, with w = x, x + t or x - t of the flow's x.
  if constexpr (!Inverse) {
    const T gx = grad_y * s.sigma;
    if constexpr (F == Form::scale_shift) return {gx, grad_y, (gx * x + grad_logdet) * slope};
    if constexpr (F == Form::shift_scale) return {gx, gx, (gx * (x + shift) + grad_logdet) * slope};
    return {gx, grad_y * complement, (gx * (x - shift) + grad_logdet) * slope};
  } else {
    const T gx = grad_y / s.sigma;
    if constexpr (F == Form::scale_shift) return {gx, -gx, -(grad_y * ((x - shift) / s.sigma) + grad_logdet) * slope};
    if constexpr (F == Form::shift_scale) return {gx, -grad_y, -(grad_y * (x / s.sigma) + grad_logdet) * slope};
    return {gx, -gx * complement, -(grad_y * ((x - shift) / s.sigma) + grad_logdet) * slope};
  }
}

template <Law L, Form F, bool Inverse, class T>
FK_INLINE AffineGradient<T> affine_backward(T grad_y, T grad_logdet, T x, T shift, T u, const LawParameters<T>& p) {
  return affine_backward_of_scale<F, Inverse>(grad_y, grad_logdet, x, shift, scale_of<L>(u, p), scale_slope<L>(u, p),
                                              F == Form::gate ? gate_complement(u, p) : T(0));
}

// Calls f.template operator()<L, F, Inverse>() for a law, a form and a direction named at run time.
// The gate form exists for the sigmoid law only, which keeps the number of instances down.
template <class Function>
void dispatch_affine(Law law, Form form, bool inverse, Function&& f) {
  auto with_form = [&]<Law L>() {
    auto with_direction = [&]<Form F>() {
      inverse ? f.template operator()<L, F, true>() : f.template operator()<L, F, false>();
    };
    if constexpr (L == Law::sigmoid)
      if (form == Form::gate) return with_direction.template operator()<Form::gate>();
    form == Form::shift_scale ? with_direction.template operator()<Form::shift_scale>()
                              : with_direction.template operator()<Form::scale_shift>();
  };
  dispatch_law(law, with_form);
}

}  // namespace fk
