// What the launch code of the autoregressive operators and their kernels share. No torch here.
//
// Samples are worked on in tiles of kLanes. Inside a tile every unit is a row of kLanes numbers, one per sample: layouts
// [row][lane] for activations in cache, [row][sample] for what is kept for the backward pass. SIMD runs across samples, and a
// thread takes whole tiles, so threads never meet and the result of a sample does not depend on its neighbours.
#pragma once
#include "cpu/panels.h"

namespace fk {

// The elementwise transform that ends an autoregressive layer, as functions over one feature's lanes.
//   forward   y, logdet from x and the feature's parameter rows
//   backward  gradients of x and the parameter rows
template <class T>
struct Transform {
  using Forward = void (*)(const T* x, const T* parameters, T* y, T* logdet, const LawParameters<T>&);
  using Backward = void (*)(const T* grad_y, const T* grad_logdet, const T* x, const T* parameters, T* grad_x,
                            T* grad_parameters, const LawParameters<T>&);
  Forward forward = nullptr;
  Backward backward = nullptr;
  LawParameters<T> law{};
};

// Where each layer's rows are kept: first the inputs, then per layer the activations (and pre-activations where the slope
// needs them), last the parameters. Each row holds `stride` samples.
struct Kept {
  int64_t output[kMaxLayers];  // first row of the layer's output
  int64_t slope[kMaxLayers];   // first row of what the slope is computed from
  int64_t rows = 0;
  int64_t stride = 0;
};

inline Kept kept_of(const Net& net, int64_t samples) {
  Kept kept{};
  kept.rows = net.inputs;
  for (int64_t l = 0; l < net.layers; ++l) {
    kept.output[l] = kept.slope[l] = kept.rows;
    kept.rows += net.layer[l].rows;
    if (slope_needs_input(static_cast<Activation>(net.layer[l].activation))) {
      kept.slope[l] = kept.rows;
      kept.rows += net.layer[l].rows;
    }
  }
  // Whole tiles, and one more so that rows of 2^n samples do not all fall into the same few cache sets.
  kept.stride = ((samples + kLanes - 1) / kLanes + 1) * kLanes;
  return kept;
}

// One call of an autoregressive operator, forwards or backwards.
template <class T>
struct MafCall {
  const Net* net = nullptr;       // features -> parameters
  const Net* back = nullptr;      // gradients of parameters -> gradients of features
  const T* packed = nullptr;      // weights for net
  const T* packed_back = nullptr; // weights for back
  int64_t samples = 0;
  Transform<T> transform;

  // All (samples, features), contiguous.
  const T* input = nullptr;
  T* output = nullptr;
  const T* grad_output = nullptr;
  T* grad_input = nullptr;
  // (samples,)
  T* logdet = nullptr;
  const T* grad_logdet = nullptr;
  // (samples, context_width), row stride
  const T* context = nullptr;
  int64_t context_stride = 0;
  T* grad_context = nullptr;

  Kept kept;                   // of net
  T* saved = nullptr;          // rows x stride, null when no gradient is wanted
  const T* saved_in = nullptr; // the same in the backward pass
  Kept kept_back;              // of back
  T* grads = nullptr;          // rows x stride: gradients of parameters and pre-activations
};

}  // namespace fk
