// affine.h with the law, the form and the direction named at run time, for kernels in which every thread takes the same
// branch: the instances add up (8 laws + 5 transforms) instead of multiplying (34), which keeps device code small.
#pragma once
#include "common/activations.h"
#include "common/affine.h"

namespace fk {

template <class T>
struct NamedAffine {
  LawParameters<T> law;
  Law name;
  Form form;
  bool inverse;
};

template <class T>
FK_INLINE Scale<T> scale_by_name(Law law, T u, const LawParameters<T>& p) {
  switch (law) {
    case Law::exp:
      return scale_of<Law::exp>(u, p);
    case Law::softplus:
      return scale_of<Law::softplus>(u, p);
    case Law::sigmoid:
      return scale_of<Law::sigmoid>(u, p);
    case Law::tanh:
      return scale_of<Law::tanh>(u, p);
    case Law::atan:
      return scale_of<Law::atan>(u, p);
    case Law::softclip:
      return scale_of<Law::softclip>(u, p);
    case Law::clip:
      return scale_of<Law::clip>(u, p);
    default:
      return scale_of<Law::unit>(u, p);
  }
}

template <class T>
FK_INLINE T slope_by_name(Law law, T u, const LawParameters<T>& p) {
  switch (law) {
    case Law::exp:
      return scale_slope<Law::exp>(u, p);
    case Law::softplus:
      return scale_slope<Law::softplus>(u, p);
    case Law::sigmoid:
      return scale_slope<Law::sigmoid>(u, p);
    case Law::tanh:
      return scale_slope<Law::tanh>(u, p);
    case Law::atan:
      return scale_slope<Law::atan>(u, p);
    case Law::softclip:
      return scale_slope<Law::softclip>(u, p);
    case Law::clip:
      return scale_slope<Law::clip>(u, p);
    default:
      return scale_slope<Law::unit>(u, p);
  }
}

template <class T>
FK_INLINE Transformed<T> affine_by_name(const NamedAffine<T>& a, T x, T shift, T u) {
  const Scale<T> s = scale_by_name(a.name, u, a.law);
  const T complement = a.form == Form::gate ? gate_complement(u, a.law) : T(0);
  if (a.inverse) {
    if (a.form == Form::scale_shift) return affine_of_scale<Form::scale_shift, true>(x, shift, s, complement);
    if (a.form == Form::shift_scale) return affine_of_scale<Form::shift_scale, true>(x, shift, s, complement);
    return affine_of_scale<Form::gate, true>(x, shift, s, complement);
  }
  if (a.form == Form::scale_shift) return affine_of_scale<Form::scale_shift, false>(x, shift, s, complement);
  if (a.form == Form::shift_scale) return affine_of_scale<Form::shift_scale, false>(x, shift, s, complement);
  return affine_of_scale<Form::gate, false>(x, shift, s, complement);
}

template <class T>
FK_INLINE AffineGradient<T> affine_backward_by_name(const NamedAffine<T>& a, T gy, T gl, T x, T shift, T u) {
  const Scale<T> s = scale_by_name(a.name, u, a.law);
  const T slope = slope_by_name(a.name, u, a.law);
  const T c = a.form == Form::gate ? gate_complement(u, a.law) : T(0);
  if (a.inverse) {
    if (a.form == Form::scale_shift)
      return affine_backward_of_scale<Form::scale_shift, true>(gy, gl, x, shift, s, slope, c);
    if (a.form == Form::shift_scale)
      return affine_backward_of_scale<Form::shift_scale, true>(gy, gl, x, shift, s, slope, c);
    return affine_backward_of_scale<Form::gate, true>(gy, gl, x, shift, s, slope, c);
  }
  if (a.form == Form::scale_shift)
    return affine_backward_of_scale<Form::scale_shift, false>(gy, gl, x, shift, s, slope, c);
  if (a.form == Form::shift_scale)
    return affine_backward_of_scale<Form::shift_scale, false>(gy, gl, x, shift, s, slope, c);
  return affine_backward_of_scale<Form::gate, false>(gy, gl, x, shift, s, slope, c);
}

template <class T>
FK_INLINE T activate_by_name(Activation a, T v) {
  switch (a) {
    case Activation::relu:
      return activate<Activation::relu>(v);
    case Activation::tanh:
      return activate<Activation::tanh>(v);
    case Activation::elu:
      return activate<Activation::elu>(v);
    case Activation::silu:
      return activate<Activation::silu>(v);
    case Activation::leaky_relu:
      return activate<Activation::leaky_relu>(v);
    case Activation::gelu:
      return activate<Activation::gelu>(v);
    case Activation::sigmoid:
      return activate<Activation::sigmoid>(v);
    case Activation::softplus:
      return activate<Activation::softplus>(v);
    default:
      return v;
  }
}

// From what was kept: the output, or the pre-activation where `slope_needs_input`.
template <class T>
FK_INLINE T slope_by_name(Activation a, T kept) {
  switch (a) {
    case Activation::relu:
      return slope_from_kept<Activation::relu>(kept);
    case Activation::tanh:
      return slope_from_kept<Activation::tanh>(kept);
    case Activation::elu:
      return slope_from_kept<Activation::elu>(kept);
    case Activation::silu:
      return slope_from_kept<Activation::silu>(kept);
    case Activation::leaky_relu:
      return slope_from_kept<Activation::leaky_relu>(kept);
    case Activation::gelu:
      return slope_from_kept<Activation::gelu>(kept);
    case Activation::sigmoid:
      return slope_from_kept<Activation::sigmoid>(kept);
    case Activation::softplus:
      return slope_from_kept<Activation::softplus>(kept);
    default:
      return T(1);
  }
}

}  // namespace fk
