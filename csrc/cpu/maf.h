// What the launch code of the autoregressive operators and their kernels share. No torch here.
//
// Samples are worked on in tiles of kLanes. Inside a tile every unit is a row of kLanes numbers, one per sample: layout
// [row][lane]. SIMD runs across samples, and a thread takes whole tiles, so threads never meet and the result of a
// sample does not depend on its neighbours.
#pragma once
#include "cpu/panels.h"
#include "cpu/transform.h"

namespace fk {

static_assert(kTransformLanes == kLanes);

// Where rows are kept for the backward pass: first the inputs, then per layer the outputs (and pre-activations where
// the slope needs them). Every section begins with a new chunk of kLanes rows; a chunk holds [sample][row].
struct Kept {
  int64_t output[kMaxLayers];  // first row of the layer's output
  int64_t slope[kMaxLayers];   // first row of what the slope is computed from
  int64_t noise = 0;           // first row of z, when the sweep goes from z to x
  int64_t rows = 0;
  int64_t stride = 0;  // samples
};

inline int64_t whole_chunks(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

inline Kept kept_of(const Net& net, int64_t samples, bool inverse) {
  Kept kept{};
  kept.rows = whole_chunks(net.inputs);
  for (int64_t l = 0; l < net.layers; ++l) {
    kept.output[l] = kept.slope[l] = kept.rows;
    kept.rows += whole_chunks(net.layer[l].rows);
    if (!net.layer[l].transposed && slope_needs_input(static_cast<Activation>(net.layer[l].activation))) {
      kept.slope[l] = kept.rows;
      kept.rows += whole_chunks(net.layer[l].rows);
    }
  }
  if (inverse) {
    kept.noise = kept.rows;
    kept.rows += whole_chunks(net.features);
  }
  kept.stride = whole_chunks(samples);
  return kept;
}

// Up to so many samples go through the net one by one.
inline constexpr int64_t kOneByOne = 3;

// One transform, forwards or backwards, on a batch.
template <class T>
struct MafCall {
  const Net* net = nullptr;        // features -> parameters
  const Net* back = nullptr;       // gradients of parameters -> gradients of features
  const T* packed = nullptr;       // weights for net
  const T* packed_back = nullptr;  // weights for back
  int64_t samples = 0;
  bool inverse = false;
  Transform<T> transform;

  // (samples, features), contiguous; input and output may be the same memory.
  const T* input = nullptr;
  T* output = nullptr;
  // (samples,); the log-det is added to what is there unless `first`.
  T* logdet = nullptr;
  bool first = true;
  bool density = false;  // log N(output; 0, I) is added to the log-det
  const T* grad_logdet = nullptr;
  // (samples, context_width), contiguous, or null
  const T* context = nullptr;

  Kept kept;                    // of net
  T* saved = nullptr;           // kept.rows x stride, null when no gradient is wanted
  const T* saved_in = nullptr;  // the same in the backward pass
  Kept kept_back;               // of back
  T* grads = nullptr;           // rows x stride: gradients of parameters and pre-activations
};

}  // namespace fk
