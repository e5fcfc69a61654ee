// A tile of samples on its way through the net: features, units, and layers one after the other with block-wide
// barriers. csrc/cuda/maf_chain.h has the faster way to sample.
#pragma once
#include <climits>

#include "cuda/maf_panels.h"

namespace fk {

template <class T, bool Backward, bool Spline>
struct DeviceTile {
  static constexpr int S = kSamples<T>;
  const MafDeviceCall<T>& call;
  const DeviceNet<T>& net;
  int64_t first;  // sample
  int thread, warp, lane;

  __device__ bool is_sample(int s) const { return first + s < call.samples; }

  // Bias and context of a pre-activation.
  __device__ T begin_of(const DeviceLayer<T>& layer, int row, int s) const {
    T v = layer.bias >= 0 ? call.packed[layer.bias + row] : T(0);
    if (call.context && layer.context_column >= 0 && is_sample(s))
      v += call.context[(first + s) * net.context_width + layer.context_column + layer.perm[row]];
    return v;
  }

  __device__ void keep(T* to, int64_t row, int s, T v) const {
    if (to && is_sample(s)) to[row * call.stride + first + s] = v;
  }

  // From the sum of a row to what the next layer reads.
  __device__ void finish(int l, int row, int s, T v) const {
    const DeviceLayer<T>& layer = net.layer[l];
    const bool has_residual = layer.residual >= 0 && layer.residual_row[row] >= 0;
    if constexpr (Backward) {
      if (l == net.layers - 1) {  // the gradient of a feature, which goes through its transform next
        layer.out[static_cast<int64_t>(row) * S + s] = v;
        return;
      }
      const int64_t kept = (layer.kept_slope - row) * call.stride + first + s;
      v *= slope_by_name(layer.activation, is_sample(s) ? call.saved_in[kept] : T(0));
      if (has_residual) v += net.layer[layer.residual].out[layer.residual_row[row] * S + s];
    } else {
      if (has_residual) v += net.layer[layer.residual].before[layer.residual_row[row] * S + s];
    }
    store_unit(l, row, s, v);
  }

  // A unit from its pre-activation; backwards the gradient of that.
  __device__ void store_unit(int l, int row, int s, T v) const {
    const DeviceLayer<T>& layer = net.layer[l];
    T out = v;
    if constexpr (Backward) {
      keep(call.grads, layer.kept_output + row, s, v);
    } else {
      if (layer.before) layer.before[static_cast<int64_t>(row) * S + s] = v;
      out = activate_by_name(layer.activation, v);
      keep(call.saved, layer.kept_output + row, s, out);
      if (layer.kept_slope >= 0) keep(call.saved, layer.kept_slope + row, s, v);
    }
    layer.out[static_cast<int64_t>(row) * S + s] = out;
  }

  // Parameters of a feature, a constant for the affine transform.
  __device__ int per() const { return Spline ? net.parameters : 2; }

  // A feature's transform in the call's direction: a sweep inverts.
  template <bool Inverse>
  __device__ Transformed<T> transform(T x, Strided<const T> theta) const {
    if constexpr (Spline) {
      Transformed<T> out;
      if (call.spline.style == SplineStyle::zuko)
        rq_spline_lanes<SplineStyle::zuko, Inverse, 1>(&x, theta, call.spline, &out.y, &out.logdet);
      else if (call.spline.style == SplineStyle::linear)
        rq_spline_lanes<SplineStyle::linear, Inverse, 1>(&x, theta, call.spline, &out.y, &out.logdet);
      else
        rq_spline_lanes<SplineStyle::nflows, Inverse, 1>(&x, theta, call.spline, &out.y, &out.logdet);
      return out;
    } else {
      return affine_by_name(call.affine, x, theta[0], theta[1]);
    }
  }

  // One feature of one sample, sampling direction: its parameters are known, now its value is.
  __device__ void sample_feature(int feature, int s, T z, Strided<const T> theta, T& logdet) const {
    const Transformed<T> out = transform<true>(z, theta);
    logdet += out.logdet;
    store_feature(feature, s, z, out.y);
  }
  __device__ void store_feature(int feature, int s, T z, T y) const {
    net.state_in[static_cast<int64_t>(feature) * S + s] = y;
    if (is_sample(s)) call.output[(first + s) * net.features + net.data_perm[feature]] = y;
    keep(call.saved, feature, s, y);
    keep(call.saved, net.kept_noise + feature, s, z);
  }

  // Rows of the panels [begin, end) over the columns [0, to): sums with bias and context, finished or left as they are.
  __device__ void panels(int l, int begin, int end, int to, bool finished) const {
    const DeviceLayer<T>& layer = net.layer[l];
    for (int p = begin + warp; p < end; p += 2 * S) {
      const Panel panel = layer.panel[p];
      const int row0 = static_cast<int>(panel.row), rows = static_cast<int>(panel.rows),
                depth = static_cast<int>(panel.depth);
      T* out = layer.out + static_cast<int64_t>(row0) * S;
      panel_product(call.packed, panel.offset, static_cast<int>(panel.height), layer.columns, 0,
                    depth < to ? depth : to, out, rows);
      __syncwarp();
#pragma unroll 1  // all activations are in here: copies of it were most of this library's machine code
      for (int i = lane; i < rows * S; i += kWarp) {
        const int row = row0 + i / S, s = i % S;
        const T v = out[i] + begin_of(layer, row, s);
        if (finished)
          finish(l, row, s, v);
        else
          out[i] = v;
      }
    }
  }

  // Rows [begin, end) of group `group`, the columns [from, to) added one after the other, then finished.
  __device__ void advance(int l, int group, int begin, int end, int from, int to) const {
    const DeviceLayer<T>& layer = net.layer[l];
    const int p0 = static_cast<int>(layer.group[group]);
    for (int i = thread; i < (end - begin) * S; i += kTileThreads<T>) {
      const int row = begin + i / S, s = i % S;
      const Panel& panel = layer.panel[p0 + (row - layer.panel[p0].row) / kPanelRows];
      const int depth = static_cast<int>(panel.depth), stop = depth < to ? depth : to;
      T v = layer.out[static_cast<int64_t>(row) * S + s];
      call.packed.visit(panel.offset + (row - panel.row), [&](auto* weights) {
#pragma unroll 1
        for (int k = from; k < stop; ++k)
          v += to_compute(weights[k * panel.height]) * layer.columns[static_cast<int64_t>(k) * S + s];
      });
      finish(l, row, s, v);
    }
  }

  // ---- the density direction: what the net reads, first_units, what comes of it

  __device__ void enter() const {
    for (int i = thread; i < net.features * S; i += kTileThreads<T>) {
      const int f = i / S, s = i % S;
      if constexpr (Backward) {
        // The direct part of the features' gradients waits in grad_input.
        backward_feature<false>(f, s, T(0));
      } else {
        const T x = is_sample(s) ? call.input[(first + s) * net.features + net.data_perm[f]] : T(0);
        net.state_in[i] = x;
        keep(call.saved, f, s, x);
      }
    }
    __syncthreads();
  }

  __device__ void leave() const {
    const T* out = net.layer[net.layers - 1].out;
    T logdet = T(0);
    for (int i = thread; i < net.features * S; i += kTileThreads<T>) {
      const int f = i / S, s = i % S;
      if constexpr (Backward) {
        if (is_sample(s)) call.grad_input[(first + s) * net.features + forward_perm(net.features - 1 - f)] += out[i];
      } else {
        const Transformed<T> t = transform<false>(net.state_in[i], {out + static_cast<int64_t>(f) * per() * S + s, S});
        logdet += t.logdet;
        if (is_sample(s)) call.output[(first + s) * net.features + net.data_perm[f]] = t.y;
      }
    }
    if constexpr (!Backward) {
      net.part[thread] = logdet;
      __syncthreads();
      if (thread < S && is_sample(thread)) {
        T sum = T(0);
        for (int i = thread; i < kTileThreads<T>; i += S) sum += net.part[i];
        call.logdet[first + thread] = sum;
      }
    }
  }

  // The units that need no step of a sweep: without one all of them, else those that depend on no feature.
  __device__ void first_units() const {
    for (int l = 0; l < net.layers - (call.sweep ? 1 : 0); ++l) {
      const DeviceLayer<T>& layer = net.layer[l];
      panels(l, 0, call.sweep ? static_cast<int>(layer.group[1]) : layer.panels,
             call.sweep ? static_cast<int>(layer.columns_up_to[0]) : INT_MAX, true);
      __syncthreads();
    }
  }

  // The step of a sweep by the warp of sample s: lanes take features.
  __device__ void step_features(int r0, int r1, T& logdet) const {
    const int s = warp;
    if (s >= S) return;
    const DeviceLayer<T>& out = net.layer[net.layers - 1];
    if constexpr (Backward) {
      for (int r = r0 + lane; r < r1; r += kWarp)
        backward_feature<true>(r, s, out.out[static_cast<int64_t>(r) * S + s]);
    } else {
      for (int f = r0 / per() + lane; f < r1 / per(); f += kWarp) {
        const T z = is_sample(s) ? call.input[(first + s) * net.features + net.data_perm[f]] : T(0);
        sample_feature(f, s, z, {out.out + static_cast<int64_t>(f) * per() * S + s, S}, logdet);
      }
    }
  }

  // Row r of the backward net's output is feature features - 1 - r; its inputs are the gradients of that feature's
  // parameters, the last one first because time runs backwards.
  struct BackwardFeature {
    T grad_output, z, shift, u;
  };
  __device__ BackwardFeature load_backward(int r, int s) const {
    const int f = net.features - 1 - r;
    if (!is_sample(s)) return {T(0), T(0), T(0), T(0)};
    const int64_t n = first + s, at = n * net.features + forward_perm(f);
    const T* parameters = call.saved_in + (net.kept_parameters + 2 * f) * call.stride + n;
    const T z = call.saved_in[((call.sweep ? net.kept_noise : 0) + f) * call.stride + n];
    return {call.grad_output[at], z, parameters[0], parameters[call.stride]};
  }
  __device__ int64_t forward_perm(int f) const { return (call.other + call.other[12])[f]; }

  template <bool Inverse>
  __device__ void backward_feature(int r, int s, T through) const {
    T* gradients = net.state_in + (static_cast<int64_t>(r + 1) * per() - 1) * S + s;
    if (!is_sample(s)) {
      for (int p = 0; p < per(); ++p) gradients[-p * S] = T(0);
      return;
    }
    const T grad_logdet = call.grad_logdet[first + s];
    T grad_input;
    if constexpr (Spline) {
      const int f = net.features - 1 - r;
      const int64_t n = first + s;
      const T grad_output = call.grad_output[n * net.features + forward_perm(f)] + through;
      const T z = call.saved_in[((call.sweep ? net.kept_noise : 0) + f) * call.stride + n];
      const Strided<const T> theta{
          call.saved_in + (net.kept_parameters + static_cast<int64_t>(per()) * f) * call.stride + n, call.stride};
      const Strided<T> to{gradients, -S};
      if (call.spline.style == SplineStyle::zuko)
        rq_spline_backward_lanes<SplineStyle::zuko, Inverse, 1>(&grad_output, &grad_logdet, &z, theta, call.spline,
                                                                &grad_input, to);
      else if (call.spline.style == SplineStyle::linear)
        rq_spline_backward_lanes<SplineStyle::linear, Inverse, 1>(&grad_output, &grad_logdet, &z, theta, call.spline,
                                                                  &grad_input, to);
      else
        rq_spline_backward_lanes<SplineStyle::nflows, Inverse, 1>(&grad_output, &grad_logdet, &z, theta, call.spline,
                                                                  &grad_input, to);
    } else {
      const BackwardFeature b = load_backward(r, s);
      const AffineGradient<T> g =
          affine_backward_by_name(call.affine, b.grad_output + through, grad_logdet, b.z, b.shift, b.u);
      gradients[0] = g.shift;
      gradients[-S] = g.u;
      grad_input = g.x;
    }
    store_gradients(r, s, grad_input);
  }
  // Those of the feature's parameters lie in state_in already.
  __device__ void store_gradients(int r, int s, T grad_input) const {
#pragma unroll 1
    for (int64_t row = static_cast<int64_t>(r) * per(); row < static_cast<int64_t>(r + 1) * per(); ++row)
      keep(call.grads, row, s, net.state_in[row * S + s]);
    call.grad_input[(first + s) * net.features + forward_perm(net.features - 1 - r)] = grad_input;
  }

  __device__ void slow_sweep(T& logdet) const {
    const int last = net.layers - 1;
    for (int b = 0; b < net.blocks; ++b) {
      const int begin = static_cast<int>(net.block[b]), end = static_cast<int>(net.block[b + 1]);
      for (int l = 0; l <= last; ++l) {
        const DeviceLayer<T>& layer = net.layer[l];
        panels(l, static_cast<int>(layer.group[b + 1]), static_cast<int>(layer.group[b + 2]),
               static_cast<int>(layer.columns_up_to[begin]), false);
      }
      __syncthreads();
      for (int step = begin; step < end; ++step)
        for (int i = 0; i <= last; ++i) {  // the parameters of this step's features, then the units that see them
          const int l = i ? i - 1 : last;
          const DeviceLayer<T>& layer = net.layer[l];
          const int row0 = static_cast<int>(layer.up_to[step]), row1 = static_cast<int>(layer.up_to[step + 1]);
          advance(l, b + 1, row0, row1, static_cast<int>(layer.columns_up_to[begin]),
                  static_cast<int>(layer.columns_up_to[i ? step + 1 : step]));
          __syncthreads();
          if (i == 0) {
            step_features(row0, row1, logdet);
            __syncthreads();
          }
        }
    }
  }
};

}  // namespace fk
