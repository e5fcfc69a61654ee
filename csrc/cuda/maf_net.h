// What the autoregressive kernels are called with, and the net as a thread block sees it.
#pragma once
#include "common/affine_by_name.h"
#include "common/half.h"
#include "common/net.h"
#include "common/rq_spline.h"
#include "cuda/launch.h"

namespace fk {

inline constexpr int kMaxDeviceLayers = 16;
inline constexpr int kChainLayers = 6;  // layers that a chain keeps in registers
inline constexpr int kBlockRows = 48;   // flowkernels/plan.py: BLOCK_ROWS
inline constexpr int kAccStride = kBlockRows + 1;
inline constexpr int kPanelsPerLayer = kBlockRows / kPanelRows;
inline constexpr int kMaxBlockPanels = kChainLayers * kPanelsPerLayer;
inline constexpr int kSlots = 64;  // partial products of panels that wait for their sum
inline constexpr int kMetas = 3;
static_assert(kMaxBlockPanels <= kWarp, "one lane prepares one panel");

template <class T>
inline constexpr int kSamples = 32 / sizeof(T);
template <class T>
inline constexpr int kTileThreads = 2 * kSamples<T> * kWarp;

// What the chain keeps in shared memory for each layer: sums, backwards also slopes, and the weights inside a block.
template <class T, bool Backward>
inline constexpr int kChainLayerSize = (Backward ? 2 : 1) * kAccStride * kSamples<T> + kBlockRows * kBlockRows;

// Packed weights, which may be of half the size of what is calculated with.
enum class Stored : int { whole, float16, bfloat16 };

template <class T>
struct Weights {
  const void* data;
  Stored stored;

  // Calls f with a pointer to weight i, of the type that it is stored in.
  template <class F>
  __device__ auto visit(int64_t i, F&& f) const {
    if constexpr (std::is_same_v<T, float>) {
      if (stored == Stored::float16) return f(static_cast<const float16*>(data) + i);
      if (stored == Stored::bfloat16) return f(static_cast<const bfloat16*>(data) + i);
    }
    return f(static_cast<const T*>(data) + i);
  }
  __device__ T operator[](int64_t i) const {
    return visit(i, [](auto* weight) -> T { return to_compute(*weight); });
  }
};

template <class T>
struct MafDeviceCall {
  const int64_t* table;  // of the net that runs
  const int64_t* other;  // backwards: of the forward net, for where things were kept
  Weights<T> packed;
  NamedAffine<T> affine;
  SplineOptions<T> spline;
  int64_t samples, stride;  // stride: samples per kept row
  const T* input;           // (samples, features), as are the next three; forwards only
  T* output;
  const T* grad_output;
  T* grad_input;
  T* logdet;
  const T* grad_logdet;
  const T* context;
  T* saved;
  const T* saved_in;
  T* grads;
  T* scratch;                 // for tiles that shared memory has no room for, or null
  int64_t scratch_per_block;  // in elements
  int shared_bytes;
  bool sweep;  // the sampling direction
};

template <class T>
struct DeviceLayer {
  int rows, panels, residual, context_column;
  Activation activation;
  const int64_t *residual_row, *perm, *up_to, *group, *columns_up_to;
  const Panel* panel;
  int64_t bias;
  T* out;               // [row][sample] what the next layer reads
  T* before;            // the pre-activations where a residual connection reads them, or null
  const T* columns;     // what this layer reads
  int64_t kept_output;  // first kept row of the output; backwards: of the gradients
  int64_t kept_slope;   // forwards: first kept row of the pre-activation, -1: not kept. Backwards: slopes come from row
                        // kept_slope - r
};

template <class T>
struct DeviceNet {
  int steps, layers, blocks, inputs, features, parameters, context_width;
  const int64_t *data_perm, *input_up_to, *block;
  int64_t kept_parameters;  // backwards: first kept row of the forward net's parameters
  int64_t kept_noise;       // first kept row of z, kept by the sampling direction
  bool chain;               // every block fits the chain
  T* state_in;
  T* part;
  int acc, slope, diagonal;  // where the chain's buffers begin in shared memory: loads need no pointer from there
  DeviceLayer<T> layer[kMaxDeviceLayers];
};

// The kept rows of a net whose records begin at table + 16; see Kept in csrc/cpu/maf.h.
__device__ inline int64_t kept_rows_of(const int64_t* table, int layer) {
  const int64_t* record = table + 16 + 16 * layer;
  return record[0] * (slope_needs_input(static_cast<Activation>(record[4])) ? 2 : 1);
}

template <class T, bool Backward, bool Spline>
__device__ void read_device_net(const MafDeviceCall<T>& call, DeviceNet<T>& net) {
  constexpr int S = kSamples<T>;
  const int64_t* table = call.table;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    net.steps = static_cast<int>(table[0]);
    net.layers = static_cast<int>(table[1]);
    net.blocks = static_cast<int>(table[2]);
    net.inputs = static_cast<int>(table[3]);
    net.data_perm = table + table[12];
    net.input_up_to = table + table[6];
    net.block = table + table[7];
    net.features = static_cast<int>(table[8]);
    net.parameters = static_cast<int>(table[9]);
    net.context_width = static_cast<int>(table[10]);
    net.chain = !Spline && net.layers <= kChainLayers;
  }
  __syncthreads();
  if (thread < net.layers) {
    const int64_t* r = table + 16 + 16 * thread;
    DeviceLayer<T>& layer = net.layer[thread];
    layer.rows = static_cast<int>(r[0]);
    layer.activation = static_cast<Activation>(r[4]);
    layer.residual = static_cast<int>(r[5]);
    layer.residual_row = r[6] < 0 ? nullptr : table + r[6];
    layer.perm = table + r[7];
    layer.up_to = table + r[8];
    layer.group = table + r[9];
    layer.panel = reinterpret_cast<const Panel*>(table + r[10]);
    layer.panels = static_cast<int>(r[11]);
    layer.bias = r[12];
    layer.context_column = static_cast<int>(r[13]);
    layer.columns_up_to = thread ? table + table[16 + 16 * (thread - 1) + 8] : net.input_up_to;
    layer.before = nullptr;
  }
  __syncthreads();
  // Does every block fit the chain? Two threads that both say no write the same.
  if (call.sweep)
    for (int i = thread; i < net.blocks * net.layers; i += kTileThreads<T>) {
      const int b = i / net.layers, l = i % net.layers;
      const int64_t begin = net.block[b], end = net.block[b + 1];
      const DeviceLayer<T>& layer = net.layer[l];
      if (layer.up_to[end] - layer.up_to[begin] > kBlockRows ||
          layer.columns_up_to[end] - layer.columns_up_to[begin] > kBlockRows || end - begin > kBlockRows)
        net.chain = false;
    }
  __syncthreads();
  if (thread == 0) {
    // Activations of all layers in shared memory, beside the chain's buffers if there are any; else in the scratch
    // memory; and where the host saw no need of that, without the chain.
    const int64_t room = call.shared_bytes / static_cast<int64_t>(sizeof(T));
    const int64_t buffers = kSlots * kPanelRows * S + net.layers * kChainLayerSize<T, Backward>;
    const int64_t last_rows = net.layer[net.layers - 1].rows;
    int64_t state = net.inputs;
    for (int l = 0; l < net.layers; ++l) {
      state += net.layer[l].rows;
      if (!Backward && net.layer[l].residual >= 0) state += net.layer[net.layer[l].residual].rows;
    }
    net.chain = net.chain && call.sweep && buffers <= room &&
                (call.scratch_per_block > 0 || buffers + 32 + (state - last_rows) * S <= room);
    T* memory = shared_memory<T>();
    T* end = memory + room;
    net.part = memory;  // without a chain: sums of log-dets over threads
    if (net.chain) {
      net.acc = kSlots * kPanelRows * S;
      net.slope = net.acc + net.layers * kAccStride * S;
      net.diagonal = net.slope + (Backward ? net.layers * kAccStride * S : 0);
      memory += (buffers + 31) / 32 * 32;
      state -= last_rows;
    } else {
      memory += kTileThreads<T>;
    }
    if (memory + state * S > end) memory = call.scratch + static_cast<int64_t>(blockIdx.x) * call.scratch_per_block;
    net.state_in = memory;
    memory += static_cast<int64_t>(net.inputs) * S;
    int64_t kept = net.inputs;
    for (int l = 0; l < net.layers; ++l) {
      DeviceLayer<T>& layer = net.layer[l];
      layer.columns = l ? net.layer[l - 1].out : net.state_in;
      const bool last = l == net.layers - 1;
      layer.out = last && net.chain ? nullptr : memory;
      if (!last || !net.chain) memory += static_cast<int64_t>(layer.rows) * S;
      if (!Backward && layer.residual >= 0) {
        net.layer[layer.residual].before = memory;
        memory += static_cast<int64_t>(net.layer[layer.residual].rows) * S;
      }
      layer.kept_output = kept;
      kept += layer.rows;
      layer.kept_slope = -1;
      if (slope_needs_input(layer.activation)) {
        if (!Backward) layer.kept_slope = kept;
        kept += layer.rows;
      }
    }
    if constexpr (Backward) {
      int64_t row = call.other[3];
      for (int l = 0; l < net.layers; ++l) {  // layer l of the forward net is layer layers - 2 - l of this one
        const int64_t* record = call.other + 16 + 16 * l;
        const bool both = slope_needs_input(static_cast<Activation>(record[4]));
        if (l == net.layers - 1)
          net.kept_parameters = row;
        else
          net.layer[net.layers - 2 - l].kept_slope = row + (both ? record[0] : 0) + record[0] - 1;
        row += kept_rows_of(call.other, l);
      }
      kept = row;
    }
    net.kept_noise = kept;
  }
  __syncthreads();
}

}  // namespace fk
