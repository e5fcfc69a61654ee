// The autoregressive operators on CUDA: one launch for a whole direction, forwards or backwards.
//
// A thread block takes a tile of kSamples samples through the whole network and never meets another block. Activations
// of the tile lie in shared memory as [unit][sample], 32 bytes a unit. The sampling sweep goes block of steps by block
// of steps:
//
//   near    all warps: what the previous block's units contribute to this block (few columns), and staging of the
//   weights inside
//           the block
//   reduce  all threads: biases, context and partial products, in a fixed order
//   chain   one warp per sample goes step by step; the rows of the block live in its registers, one or two to a lane,
//   and a unit
//           that becomes final is broadcast by a shuffle and multiplied into all rows that need it. Meanwhile the other
//           half of the warps computes the products of the next block with everything that was final before this one:
//           the bulk of the arithmetic, hidden behind the chain.
//
// Networks that do not fit this (a step with more than kBlockRows units, many layers, too little shared memory) and
// splines, whose features have too many parameters for a lane's registers, take the same sweep layer by layer with
// block-wide barriers. The density direction is one pass of the same panel products.
#include "common/affine_by_name.h"
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

template <class T>
struct MafDeviceCall {
  const int64_t* table;  // of the net that runs
  const int64_t* other;  // backwards: of the forward net, for where things were kept
  const T* packed;
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
  const int64_t *input_perm, *input_up_to, *block;
  int64_t kept_parameters;  // backwards: first kept row of the forward net's parameters
  int64_t kept_noise;       // first kept row of z, kept by the sampling direction
  bool chain;               // every block fits the chain
  T* state_in;
  T *part, *acc, *diagonal;
  DeviceLayer<T> layer[kMaxDeviceLayers];
};

// What the warps have to know about one block of steps.
struct BlockMeta {
  int block, steps, panels, tasks;
  int row0[kChainLayers], rows[kChainLayers], column0[kChainLayers], columns[kChainLayers], diagonal[kChainLayers];
  int64_t offset[kMaxBlockPanels];
  int height[kMaxBlockPanels], depth[kMaxBlockPanels], far[kMaxBlockPanels], slot[kMaxBlockPanels],
      slots[kMaxBlockPanels];
  short task_panel[kSlots];
  int task_from[kSlots], task_to[kSlots];
  unsigned char up_to[kChainLayers][kBlockRows + 1];
};

// ---------------------------------------------------------------------------------------------------------------------

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
    net.input_perm = table + table[5];
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
    const int64_t buffers = kSlots * kPanelRows * S + net.layers * (kAccStride * S + kBlockRows * kBlockRows);
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
      net.acc = net.part + kSlots * kPanelRows * S;
      net.diagonal = net.acc + net.layers * kAccStride * S;
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

// ---------------------------------------------------------------------------------------------------------------------
// sum[row][sample] over the columns [from, to) of a panel, by one warp. A lane takes four rows and every 32/quads-th
// column: one sixteen-byte load of weights and 32 bytes of activations feed 4 x kSamples multiply-adds. Afterwards
// every lane has the sums of its four rows, 4 * (lane % lanes_of_rows) onwards.

__device__ inline int lanes_of_rows(int height) { return height <= 4 ? 1 : height <= 8 ? 2 : 4; }

template <class T>
__device__ inline void load_row(T (&to)[kSamples<T>], const T* from) {
  constexpr int N = Pack16<T>::kCount;
#pragma unroll
  for (int i = 0; i < kSamples<T>; i += N) {
    const Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) to[i + j] = pack.value[j];
  }
}

template <class T>
__device__ inline void panel_product(const T* weights, int height, const T* columns, int from, int to,
                                     T (&sum)[4][kSamples<T>]) {
  constexpr int S = kSamples<T>, N = Pack16<T>::kCount;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, across = lanes_of_rows(height);
  const int quad = lane % across, step = kWarp / across;
  const T* w = weights + (4 * quad < height ? 4 * quad : 0);  // a panel of 12 rows leaves every fourth lane idle
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int s = 0; s < S; ++s) sum[r][s] = T(0);
#pragma unroll 4
  for (int k = from + lane / across; k < to; k += step) {
    T v[4], a[S];
#pragma unroll
    for (int i = 0; i < 4; i += N) {
      const Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(w + static_cast<int64_t>(k) * height + i);
#pragma unroll
      for (int j = 0; j < N; ++j) v[i + j] = pack.value[j];
    }
    load_row(a, columns + static_cast<int64_t>(k) * S);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int s = 0; s < S; ++s) sum[r][s] += v[r] * a[s];
  }
  for (int other = kWarp / 2; other >= across; other /= 2)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int s = 0; s < S; ++s) sum[r][s] += __shfl_xor_sync(kAllLanes, sum[r][s], other);
}

// One tile of samples on its way through the net.
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
    if constexpr (Backward) {
      if (l < net.layers - 1) {
        const int64_t kept = (layer.kept_slope - row) * call.stride + first + s;
        v *= slope_by_name(layer.activation, is_sample(s) ? call.saved_in[kept] : T(0));
        if (layer.residual >= 0 && layer.residual_row[row] >= 0)
          v += net.layer[layer.residual].out[layer.residual_row[row] * S + s];
        keep(call.grads, layer.kept_output + row, s, v);
      }
      layer.out[static_cast<int64_t>(row) * S + s] = v;
    } else {
      if (layer.residual >= 0 && layer.residual_row[row] >= 0)
        v += net.layer[layer.residual].before[layer.residual_row[row] * S + s];
      if (layer.before) layer.before[static_cast<int64_t>(row) * S + s] = v;
      const T a = activate_by_name(layer.activation, v);
      layer.out[static_cast<int64_t>(row) * S + s] = a;
      keep(call.saved, layer.kept_output + row, s, a);
      if (layer.kept_slope >= 0) keep(call.saved, layer.kept_slope + row, s, v);
    }
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
  __device__ T sample_feature(int feature, int s, T z, Strided<const T> theta, T& logdet) const {
    const Transformed<T> out = transform<true>(z, theta);
    logdet += out.logdet;
    if (is_sample(s)) call.output[(first + s) * net.features + net.input_perm[feature]] = out.y;
    keep(call.saved, feature, s, out.y);
    keep(call.saved, net.kept_noise + feature, s, z);
    return out.y;
  }

  // ---- every layer after the other, with block-wide barriers
  // ---------------------------------------------------------

  // Rows of the panels [begin, end) over the columns [0, to): sums with bias and context, finished or left as they are.
  __device__ void panels(int l, int begin, int end, int to, bool finished) const {
    const DeviceLayer<T>& layer = net.layer[l];
    for (int p = begin + warp; p < end; p += 2 * S) {
      const Panel panel = layer.panel[p];
      const int height = static_cast<int>(panel.height), depth = static_cast<int>(panel.depth);
      T sum[4][S];
      panel_product(call.packed + panel.offset, height, layer.columns, 0, depth < to ? depth : to, sum);
      const int across = lanes_of_rows(height);
      if (lane < across) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int in_panel = 4 * lane + r, row = static_cast<int>(panel.row) + in_panel;
          if (in_panel >= panel.rows) continue;
#pragma unroll
          for (int s = 0; s < S; ++s) {
            const T v = sum[r][s] + begin_of(layer, row, s);
            if (finished)
              finish(l, row, s, v);
            else
              layer.out[static_cast<int64_t>(row) * S + s] = v;
          }
        }
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
      const T* w = call.packed + panel.offset + (row - panel.row);
      T v = layer.out[static_cast<int64_t>(row) * S + s];
      for (int k = from; k < stop; ++k) v += w[k * panel.height] * layer.columns[static_cast<int64_t>(k) * S + s];
      finish(l, row, s, v);
    }
  }

  __device__ void dense() const {
    for (int l = 0; l < net.layers; ++l) {
      panels(l, 0, net.layer[l].panels, 1 << 30, true);
      __syncthreads();
    }
  }

  // Hidden units that depend on no feature at all.
  __device__ void time_zero() const {
    for (int l = 0; l < net.layers - 1; ++l) {
      const DeviceLayer<T>& layer = net.layer[l];
      panels(l, 0, static_cast<int>(layer.group[1]), static_cast<int>(layer.columns_up_to[0]), true);
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
        const T z = is_sample(s) ? call.input[(first + s) * net.features + net.input_perm[f]] : T(0);
        net.state_in[static_cast<int64_t>(f) * S + s] =
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
  __device__ int64_t forward_perm(int f) const { return (call.other + call.other[5])[f]; }

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
    for (int p = 0; p < per(); ++p) keep(call.grads, static_cast<int64_t>(r + 1) * per() - 1 - p, s, gradients[-p * S]);
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
      auto step = [&](int l, int s, int time) {
        const DeviceLayer<T>& layer = net.layer[l];
        advance(l, b + 1, static_cast<int>(layer.up_to[s]), static_cast<int>(layer.up_to[s + 1]),
                static_cast<int>(layer.columns_up_to[begin]), static_cast<int>(layer.columns_up_to[time]));
        __syncthreads();
      };
      for (int s = begin; s < end; ++s) {
        step(last, s, s);
        step_features(static_cast<int>(net.layer[last].up_to[s]), static_cast<int>(net.layer[last].up_to[s + 1]),
                      logdet);
        __syncthreads();
        for (int l = 0; l < last; ++l) step(l, s, s + 1);
      }
    }
  }

  // ---- the sweep with the chain in registers
  // --------------------------------------------------------------------------

  // One warp writes down what block b needs.
  __device__ void prepare(int b, BlockMeta& meta) const {
    if (b >= net.blocks) return;
    const int begin = static_cast<int>(net.block[b]), end = static_cast<int>(net.block[b + 1]);
    const int before = b ? static_cast<int>(net.block[b - 1]) : 0;
    if (lane < net.layers) {
      const DeviceLayer<T>& layer = net.layer[lane];
      meta.row0[lane] = static_cast<int>(layer.up_to[begin]);
      meta.rows[lane] = static_cast<int>(layer.up_to[end] - layer.up_to[begin]);
      meta.column0[lane] = static_cast<int>(layer.columns_up_to[begin]);
      meta.columns[lane] = static_cast<int>(layer.columns_up_to[end] - layer.columns_up_to[begin]);
      meta.diagonal[lane] = lane * kBlockRows * kBlockRows;
    }
    for (int i = lane; i < net.layers * (end - begin + 1); i += kWarp) {
      const int l = i % net.layers, s = i / net.layers;
      meta.up_to[l][s] = static_cast<unsigned char>(net.layer[l].up_to[begin + s] - net.layer[l].up_to[begin]);
    }
    // Lane p: panel p % 3 of layer p / 3.
    const int l = lane / kPanelsPerLayer, i = lane % kPanelsPerLayer;
    int far = 0, height = 0;
    if (l < net.layers) {
      const DeviceLayer<T>& layer = net.layer[l];
      const int p = static_cast<int>(layer.group[b + 1]) + i;
      if (p < layer.group[b + 2]) {
        const Panel panel = layer.panel[p];
        const int near = static_cast<int>(layer.columns_up_to[begin]), depth = static_cast<int>(panel.depth);
        far = b ? static_cast<int>(layer.columns_up_to[before]) : 0;
        far = far < depth ? far : depth;
        height = static_cast<int>(panel.height);
        meta.offset[lane] = panel.offset;
        meta.depth[lane] = near < depth ? near : depth;
      }
    }
    if (lane < kMaxBlockPanels) {
      meta.height[lane] = height;
      meta.far[lane] = far;
    }
    // Chunks of columns, as small as the slots allow, so that the helping warps share the work evenly.
    int chunk = 32, count, total;
    do {
      chunk *= 2;
      count = height ? (far + chunk - 1) / chunk : 0;
      total = warp_sum(count);
    } while (total > kSlots - kMaxBlockPanels);
    int before_me = 0;
    for (int other = 0; other < kWarp; ++other) {
      const int theirs = __shfl_sync(kAllLanes, count, other);
      before_me += other < lane ? theirs : 0;
    }
    if (lane < kMaxBlockPanels) {
      meta.slot[lane] = kMaxBlockPanels + before_me;
      meta.slots[lane] = count;
      for (int c = 0; c < count; ++c) {
        const int t = before_me + c, to = (c + 1) * chunk;
        meta.task_panel[t] = static_cast<short>(lane);
        meta.task_from[t] = c * chunk;
        meta.task_to[t] = to < far ? to : far;
      }
    }
    if (lane == 0) {
      meta.steps = end - begin;
      meta.block = b;
      meta.panels = net.layers * kPanelsPerLayer;
      meta.tasks = total;
    }
  }

  __device__ void partial(const BlockMeta& meta, int p, int from, int to, int slot) const {
    T sum[4][S];
    const int height = meta.height[p], across = lanes_of_rows(height);
    panel_product(call.packed + meta.offset[p], height, net.layer[p / kPanelsPerLayer].columns, from, to, sum);
    if (lane < across && 4 * lane < height) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int s = 0; s < S; ++s) net.part[(slot * kPanelRows + 4 * lane + r) * S + s] = sum[r][s];
    }
  }

  __device__ void near(const BlockMeta& meta) const {
    for (int p = warp; p < meta.panels; p += 2 * S)
      if (meta.height[p]) partial(meta, p, meta.far[p], meta.depth[p], p);
    // The weights inside the block, [column][row]; what a panel does not store is zero.
    for (int l = 0; l < net.layers; ++l) {
      const int rows = meta.rows[l], columns = meta.columns[l], column0 = meta.column0[l];
      T* to = net.diagonal + meta.diagonal[l];
      const DeviceLayer<T>& layer = net.layer[l];
      for (int i = thread; i < rows * columns; i += kTileThreads<T>) {
        const int c = i / rows, row = i % rows, p = l * kPanelsPerLayer + row / kPanelRows;
        const Panel& panel = layer.panel[layer.group[meta.block + 1] + row / kPanelRows];
        to[i] =
            column0 + c < panel.depth
                ? call.packed[meta.offset[p] + static_cast<int64_t>(column0 + c) * meta.height[p] + row % kPanelRows]
                : T(0);
      }
    }
  }

  __device__ void reduce(const BlockMeta& meta) const {
    for (int l = 0; l < net.layers; ++l)
      for (int i = thread; i < meta.rows[l] * S; i += kTileThreads<T>) {
        const int row = i / S, s = i % S, p = l * kPanelsPerLayer + row / kPanelRows, in_panel = row % kPanelRows;
        T v = begin_of(net.layer[l], meta.row0[l] + row, s);
        for (int k = 0; k < meta.slots[p]; ++k) v += net.part[((meta.slot[p] + k) * kPanelRows + in_panel) * S + s];
        v += net.part[(p * kPanelRows + in_panel) * S + s];
        net.acc[(l * S + s) * kAccStride + row] = v;
      }
  }

  __device__ void far(const BlockMeta& meta) const {
    for (int t = warp - S; t < meta.tasks; t += S)
      partial(meta, meta.task_panel[t], meta.task_from[t], meta.task_to[t], kMaxBlockPanels + t);
  }

  __device__ static T pick(const T (&rows)[2], int row) {
    return __shfl_sync(kAllLanes, row < kWarp ? rows[0] : rows[1], row % kWarp);
  }

  // rows += weights of one column times a.
  __device__ void multiply_in(T (&rows)[2], const T* weights, int count, T a) const {
    if (lane < count) rows[0] += weights[lane] * a;
    if (lane + kWarp < count) rows[1] += weights[lane + kWarp] * a;
  }

  // The steps of a block for sample s = warp. Every lane works out every final value itself: a broadcast costs more.
  __device__ void chain(const BlockMeta& meta, T& logdet) const {
    const int s = warp, last = net.layers - 1;
    T rows[kChainLayers][2], slope[kChainLayers][2];
#pragma unroll
    for (int l = 0; l < kChainLayers; ++l) {
      if (l > last) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = lane + j * kWarp;
        const bool mine = row < meta.rows[l];
        rows[l][j] = mine ? net.acc[(l * S + s) * kAccStride + row] : T(0);
        if constexpr (Backward)
          if (l < last)
            slope[l][j] = slope_by_name(
                net.layer[l].activation,
                mine ? call.saved_in[(net.layer[l].kept_slope - meta.row0[l] - row) * call.stride + first + s] : T(0));
      }
    }
    // What the features of the block need from memory, one or two features to a lane.
    constexpr int per = Backward ? 1 : 2;  // output rows of a feature
    T values[4][2];
    const int feature0 = meta.row0[last] / per, features = meta.rows[last] / per;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int f = lane + j * kWarp;
      if constexpr (Backward) {
        BackwardFeature b{T(0), T(0), T(0), T(0)};
        if (f < features) b = load_backward(feature0 + f, s);
        values[0][j] = b.grad_output;
        values[1][j] = b.z;
        values[2][j] = b.shift;
        values[3][j] = b.u;
      } else {
        values[0][j] = f < features ? call.input[(first + s) * net.features + net.input_perm[feature0 + f]] : T(0);
      }
    }
    const T grad_logdet = Backward ? call.grad_logdet[first + s] : T(0);

    for (int step = 0; step < meta.steps; ++step) {
      const int f1 = meta.up_to[last][step + 1] / per;
      for (int f = meta.up_to[last][step] / per; f < f1; ++f) {
        T out[2] = {};
#pragma unroll
        for (int l = 0; l < kChainLayers; ++l)
          if (l == last) {
            out[0] = pick(rows[l], f * per);
            if constexpr (!Backward) out[1] = pick(rows[l], f * per + 1);
          }
        const T* weights = net.diagonal + meta.diagonal[0];
        const int count = meta.rows[0];
        if constexpr (Backward) {
          const BackwardFeature b{pick(values[0], f), pick(values[1], f), pick(values[2], f), pick(values[3], f)};
          const AffineGradient<T> g =
              affine_backward_by_name(call.affine, b.grad_output + out[0], grad_logdet, b.z, b.shift, b.u);
          const int r = feature0 + f;
          if (lane == 0) {
            net.state_in[static_cast<int64_t>(2 * r) * S + s] = g.u;
            net.state_in[static_cast<int64_t>(2 * r + 1) * S + s] = g.shift;
            keep(call.grads, 2 * r, s, g.u);
            keep(call.grads, 2 * r + 1, s, g.shift);
            call.grad_input[(first + s) * net.features + forward_perm(net.features - 1 - r)] = g.x;
          }
          multiply_in(rows[0], weights + 2 * f * count, count, g.u);
          multiply_in(rows[0], weights + (2 * f + 1) * count, count, g.shift);
        } else {
          const T z = pick(values[0], f);
          const Transformed<T> t = affine_by_name(call.affine, z, out[0], out[1]);
          if (lane == 0) {
            const int feature = feature0 + f;
            logdet += t.logdet;
            net.state_in[static_cast<int64_t>(feature) * S + s] = t.y;
            call.output[(first + s) * net.features + net.input_perm[feature]] = t.y;
            keep(call.saved, feature, s, t.y);
            keep(call.saved, net.kept_noise + feature, s, z);
            keep(call.saved, net.layer[last].kept_output + 2 * feature, s, out[0]);
            keep(call.saved, net.layer[last].kept_output + 2 * feature + 1, s, out[1]);
          }
          multiply_in(rows[0], weights + f * count, count, t.y);
        }
      }
#pragma unroll
      for (int l = 0; l < kChainLayers - 1; ++l) {
        if (l >= last) break;
        const DeviceLayer<T>& layer = net.layer[l];
        const T* weights = net.diagonal + meta.diagonal[l + 1];
        const int count = meta.rows[l + 1], end = meta.up_to[l][step + 1];
        for (int r = meta.up_to[l][step]; r < end; ++r) {
          const int row = meta.row0[l] + r;
          T a;
          if constexpr (Backward) {
            const T scaled[2] = {rows[l][0] * slope[l][0], rows[l][1] * slope[l][1]};
            a = pick(scaled, r);
          } else {
            a = pick(rows[l], r);
          }
          if (layer.residual >= 0) {
            __syncwarp();  // lane 0 has written what is read here
            const int64_t source = layer.residual_row[row];
            if (source >= 0)
              a += (Backward ? net.layer[layer.residual].out : net.layer[layer.residual].before)[source * S + s];
          }
          if constexpr (Backward) {
            if (lane == 0) {
              layer.out[static_cast<int64_t>(row) * S + s] = a;
              keep(call.grads, layer.kept_output + row, s, a);
            }
          } else {
            const T v = a;
            a = activate_by_name(layer.activation, v);
            if (lane == 0) {
              if (layer.before) layer.before[static_cast<int64_t>(row) * S + s] = v;
              layer.out[static_cast<int64_t>(row) * S + s] = a;
              keep(call.saved, layer.kept_output + row, s, a);
              if (layer.kept_slope >= 0) keep(call.saved, layer.kept_slope + row, s, v);
            }
          }
          multiply_in(rows[l + 1], weights + r * count, count, a);
        }
      }
    }
  }

  __device__ void chain_sweep(BlockMeta* metas, T& logdet) const {
    if (warp == 0) {
      prepare(0, metas[0]);
      prepare(1, metas[1]);
    }
    __syncthreads();
    for (int b = 0; b < net.blocks; ++b) {
      const BlockMeta& meta = metas[b % kMetas];
      near(meta);
      __syncthreads();
      reduce(meta);
      __syncthreads();
      if (warp < S) {
        if (is_sample(warp)) chain(meta, logdet);
      } else {
        if (warp == S) prepare(b + 2, metas[(b + 2) % kMetas]);
        if (b + 1 < net.blocks) far(metas[(b + 1) % kMetas]);
      }
      __syncthreads();
    }
  }
};

template <class T, bool Backward, bool Spline>
__device__ void run_tiles(const MafDeviceCall<T>& call) {
  constexpr int S = kSamples<T>;
  __shared__ DeviceNet<T> net;
  __shared__ BlockMeta metas[kMetas];
  read_device_net<T, Backward, Spline>(call, net);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = (call.samples + S - 1) / S;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    DeviceTile<T, Backward, Spline> tile{call, net, t * S, thread, thread / kWarp, thread % kWarp};
    const int last = net.layers - 1;
    T logdet = T(0);
    if (call.sweep) {
      tile.time_zero();
      if constexpr (!Spline)
        if (net.chain) tile.chain_sweep(metas, logdet);
      if (!net.chain) tile.slow_sweep(logdet);
      logdet = warp_sum(logdet);
      if (!Backward && tile.lane == 0 && tile.warp < S && tile.is_sample(tile.warp))
        call.logdet[tile.first + tile.warp] = logdet;
    } else if constexpr (!Backward) {
      for (int i = thread; i < net.features * S; i += kTileThreads<T>) {
        const int f = i / S, s = i % S;
        const T x = tile.is_sample(s) ? call.input[(tile.first + s) * net.features + net.input_perm[f]] : T(0);
        net.state_in[i] = x;
        tile.keep(call.saved, f, s, x);
      }
      __syncthreads();
      tile.dense();
      const T* theta = net.layer[last].out;
      for (int i = thread; i < net.features * S; i += kTileThreads<T>) {
        const int f = i / S, s = i % S;
        const Transformed<T> out =
            tile.template transform<false>(net.state_in[i], {theta + static_cast<int64_t>(f) * tile.per() * S + s, S});
        logdet += out.logdet;
        if (tile.is_sample(s)) call.output[(tile.first + s) * net.features + net.input_perm[f]] = out.y;
      }
      net.part[thread] = logdet;
      __syncthreads();
      if (thread < S && tile.is_sample(thread)) {
        T sum = T(0);
        for (int i = thread; i < kTileThreads<T>; i += S) sum += net.part[i];
        call.logdet[tile.first + thread] = sum;
      }
    } else {
      // Gradients of the parameters first; the direct part of the features' gradients waits in grad_input.
      for (int i = thread; i < net.features * S; i += kTileThreads<T>)
        tile.template backward_feature<false>(i / S, i % S, T(0));
      __syncthreads();
      tile.dense();
      const T* through = net.layer[last].out;
      for (int i = thread; i < net.features * S; i += kTileThreads<T>) {
        const int r = i / S, s = i % S;
        if (tile.is_sample(s))
          call.grad_input[(tile.first + s) * net.features + tile.forward_perm(net.features - 1 - r)] +=
              through[r * S + s];
      }
    }
    __syncthreads();
  }
}

template <class T, bool Backward>
__global__ void __launch_bounds__(kTileThreads<T>, 1) maf_kernel(const MafDeviceCall<T> call) {
  run_tiles<T, Backward, false>(call);
}

// A kernel of its own: the bins of a feature take a stack frame and registers that the affine chain must not pay for.
template <class T, bool Backward>
__global__ void __launch_bounds__(kTileThreads<T>, 1) maf_spline_kernel(const MafDeviceCall<T> call) {
  run_tiles<T, Backward, true>(call);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing: a block takes panels of one layer, threads take weights.

template <class T>
struct PackCall {
  const int64_t* table;
  T* packed;
  int layers;
  const T* weight[kMaxDeviceLayers];
  const T* bias[kMaxDeviceLayers];
  const bool* mask[kMaxDeviceLayers];
};

inline constexpr int kPackThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPackThreads) maf_pack_kernel(const PackCall<T> call) {
  const int64_t* table = call.table;
  const int l = static_cast<int>(blockIdx.x) % call.layers;
  const int64_t* r = table + 16 + 16 * l;
  const int64_t *perm = table + r[7], *columns = l ? table + table[16 + 16 * (l - 1) + 7] : table + table[5];
  const Panel* panels = reinterpret_cast<const Panel*>(table + r[10]);
  const int64_t stride = r[14], row_stride = r[3] ? 1 : stride, column_stride = r[3] ? stride : 1;
  const T* weight = call.weight[r[2]];
  const bool* mask = call.mask[r[2]];
  for (int64_t p = blockIdx.x / call.layers; p < r[11]; p += gridDim.x / call.layers) {
    const Panel panel = panels[p];
    for (int64_t i = threadIdx.x; i < panel.depth * panel.height; i += kPackThreads) {
      const int64_t k = i / panel.height, in_panel = i % panel.height;
      T v = T(0);
      if (in_panel < panel.rows) {
        const int64_t at = perm[panel.row + in_panel] * row_stride + columns[k] * column_stride;
        if (mask[at]) v = weight[at];
      }
      call.packed[panel.offset + i] = v;
    }
  }
  if (r[12] >= 0)
    for (int64_t i = (blockIdx.x / call.layers) * kPackThreads + threadIdx.x; i < r[0];
         i += (gridDim.x / call.layers) * kPackThreads)
      call.packed[r[12] + i] = call.bias[r[2]][perm[i]];
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of one layer's weights: rows of kept gradients times rows of kept activations, 64 x 64 of them to a block.
// Tiles that the mask leaves empty return at once.

inline constexpr int kGradThreads = 256, kGradTile = 64, kGradDepth = 16;

template <class T>
struct WeightGradientCall {
  const int64_t *table, *back;
  int layer, column_tiles;
  int64_t samples, stride;
  const T *saved, *grads;
  const bool* mask;
  T *weight, *bias;
};

// First kept row of the outputs of layer l of a net, -1 for its inputs.
__device__ inline int64_t kept_output_of(const int64_t* table, int l) {
  if (l < 0) return 0;
  int64_t row = table[3];
  for (int i = 0; i < l; ++i) row += kept_rows_of(table, i);
  return row;
}

template <class T>
__global__ void __launch_bounds__(kGradThreads) maf_weight_gradient_kernel(const WeightGradientCall<T> call) {
  __shared__ T g_tile[kGradDepth][kGradTile + 1], a_tile[kGradDepth][kGradTile + 1];
  __shared__ int depths[kGradThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t* r = call.table + 16 + 16 * call.layer;
  const int layers = static_cast<int>(call.table[1]), rows = static_cast<int>(r[0]);
  const int row0 = static_cast<int>(blockIdx.x) / call.column_tiles * kGradTile,
            column0 = static_cast<int>(blockIdx.x) % call.column_tiles * kGradTile;
  const Panel* panels = reinterpret_cast<const Panel*>(call.table + r[10]);
  int depth = 0;
  for (int64_t p = thread; p < r[11]; p += kGradThreads)
    if (panels[p].row < row0 + kGradTile && panels[p].row + panels[p].rows > row0 && panels[p].depth > depth)
      depth = static_cast<int>(panels[p].depth);
  depths[thread] = depth;
  __syncthreads();
  for (int half = kGradThreads / 2; half > 0; half /= 2) {
    if (thread < half && depths[thread + half] > depths[thread]) depths[thread] = depths[thread + half];
    __syncthreads();
  }
  depth = depths[0];
  const bool with_bias = column0 == 0;
  if (row0 >= rows || (column0 >= depth && !with_bias)) return;
  const int last = layers - 1;
  const T* g = call.grads +
               (kept_output_of(call.back, call.layer == last ? -1 : layers - 2 - call.layer) + rows - 1) * call.stride;
  const T* a = call.saved + kept_output_of(call.table, call.layer - 1) * call.stride;
  const int ty = thread / 16, tx = thread % 16;
  T sum[4][4] = {}, bias[4] = {};
  for (int64_t n0 = 0; n0 < call.samples; n0 += kGradDepth) {
    for (int i = thread; i < kGradTile * kGradDepth; i += kGradThreads) {
      const int row = i / kGradDepth, k = i % kGradDepth;
      const bool inside = n0 + k < call.samples;
      g_tile[k][row] = inside && row0 + row < rows ? g[-(row0 + row) * call.stride + n0 + k] : T(0);
      a_tile[k][row] = inside && column0 + row < depth ? a[(column0 + row) * call.stride + n0 + k] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kGradDepth; ++k) {
      T y[4], x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = g_tile[k][ty + 16 * i];
        x[i] = a_tile[k][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bias[i] += y[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += y[i] * x[j];
      }
    }
    __syncthreads();
  }
  const int64_t* perm = call.table + r[7];
  const int64_t* columns =
      call.layer ? call.table + call.table[16 + 16 * (call.layer - 1) + 7] : call.table + call.table[5];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + ty + 16 * i;
    if (row >= rows) continue;
    if (with_bias && tx == 0) call.bias[perm[row]] = bias[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = column0 + tx + 16 * j;
      if (column >= depth) continue;
      const int64_t at = perm[row] * r[14] + columns[column];
      if (call.mask[at]) call.weight[at] = sum[i][j];
    }
  }
}

// Gradients of the context terms: the kept gradients of the pre-activations, transposed back.
template <class T>
struct ContextGradientCall {
  const int64_t *table, *back;
  int64_t samples, stride, width;
  const T* grads;
  T* out;
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) maf_context_gradient_kernel(const ContextGradientCall<T> call) {
  const int layers = static_cast<int>(call.table[1]);
  for (int l = 0; l < layers; ++l) {
    const int64_t* r = call.table + 16 + 16 * l;
    if (r[13] < 0) continue;
    const int64_t last_row = kept_output_of(call.back, l == layers - 1 ? -1 : layers - 2 - l) + r[0] - 1;
    const int64_t* perm = call.table + r[7];
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < r[0] * call.samples;
         i += static_cast<int64_t>(gridDim.x) * kPackThreads) {
      const int64_t row = i / call.samples, n = i % call.samples;
      call.out[n * call.width + r[13] + perm[row]] = call.grads[(last_row - row) * call.stride + n];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches.

inline constexpr int64_t kKeptLanes = 16;  // flowkernels/ops/maf/autograd.py: _LANES

inline int64_t kept_stride(int64_t samples) { return (samples + kKeptLanes - 1) / kKeptLanes * kKeptLanes; }

inline const int64_t* table_of(const Tensor& table) { return static_cast<const int64_t*>(table.const_data_ptr()); }

Tensor maf_pack(const std::vector<Tensor>& parameters, const std::vector<Tensor>& masks, const Tensor& table,
                int64_t size) {
  const OnDevice device(table);
  STD_TORCH_CHECK(masks.size() <= kMaxDeviceLayers, "the CUDA kernels take at most ", kMaxDeviceLayers, " layers, got ",
                  masks.size());
  Tensor packed = new_empty(parameters[0], {size});
  std::vector<Tensor> contiguous;
  for (const Tensor& p : parameters) contiguous.push_back(torch::stable::contiguous(p));
  dispatch_float(parameters[0], [&]<class T>() {
    PackCall<T> call{};
    call.table = table_of(table);
    call.packed = static_cast<T*>(packed.mutable_data_ptr());
    call.layers = static_cast<int>(masks.size());
    for (size_t i = 0; i < masks.size(); ++i) {
      call.weight[i] = static_cast<const T*>(contiguous[2 * i].const_data_ptr());
      call.bias[i] = static_cast<const T*>(contiguous[2 * i + 1].const_data_ptr());
      call.mask[i] = static_cast<const bool*>(masks[i].const_data_ptr());
    }
    launch(device, "maf_pack", maf_pack_kernel<T>, call.layers * 2 * device.multiprocessors(), kPackThreads, 0, call);
  });
  return packed;
}

// The host never looks into the table, which lies on the device: that would wait for it. Its length bounds the number
// of units.
template <class T, bool Backward>
void launch_maf(const OnDevice& device, MafDeviceCall<T>& call, const Tensor& like, int64_t table_size) {
  constexpr int64_t S = kSamples<T>;
  const int64_t tiles = (call.samples + S - 1) / S;
  if (tiles == 0) return;
  const int64_t work =
      kSlots * kPanelRows * S + kChainLayers * (kAccStride * S + kBlockRows * kBlockRows) + kTileThreads<T>;
  const int64_t state = 2 * table_size * S;
  const int64_t statically = static_cast<int64_t>(sizeof(DeviceNet<T>) + kMetas * sizeof(BlockMeta) + 1024);
  const int64_t limit = (device.shared_memory() - statically) / 128 * 128;
  STD_TORCH_CHECK(limit >= kTileThreads<T> * static_cast<int64_t>(sizeof(T)), "maf needs ",
                  statically + kTileThreads<T> * static_cast<int64_t>(sizeof(T)),
                  " bytes of shared memory for a thread block, this device has ", device.shared_memory());
  const int64_t wanted = ((work + state) * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
  const int64_t shared = wanted < limit ? wanted : limit;
  const int64_t most = 4 * static_cast<int64_t>(device.multiprocessors());
  const int64_t blocks = tiles < most ? tiles : most;
  call.shared_bytes = static_cast<int>(shared);
  call.scratch_per_block = wanted > limit ? state : 0;
  Tensor scratch = new_empty(like, {blocks * call.scratch_per_block});
  call.scratch = static_cast<T*>(scratch.mutable_data_ptr());
  launch(device, Backward ? "maf_backward" : "maf",
         call.spline.bins ? maf_spline_kernel<T, Backward> : maf_kernel<T, Backward>, blocks, kTileThreads<T>, shared,
         call);
}

// The transform as flowkernels/transforms.py names it: laws count from 0, then come the splines; always six numbers.
template <class T>
void bind_transform(MafDeviceCall<T>& call, int64_t law, const std::vector<double>& numbers, int64_t form) {
  STD_TORCH_CHECK(numbers.size() == 6, "a transform is described by 6 numbers, got ", numbers.size());
  const int64_t style = law - static_cast<int64_t>(Law::count);
  if (style < 0) {
    call.affine = {law_parameters_of<T>(numbers), static_cast<Law>(law), static_cast<Form>(form), call.sweep};
    return;
  }
  STD_TORCH_CHECK(style < static_cast<int64_t>(SplineStyle::count), "there is no transform ", law);
  call.spline = spline_options_of<T>(static_cast<int64_t>(numbers[5]), style, numbers);
  STD_TORCH_CHECK(call.spline.bins >= 2 && call.spline.bins <= kMaxBins, "bins must be 2 to ", kMaxBins, ", got ",
                  call.spline.bins);
}

template <bool Inverse>
std::tuple<Tensor, Tensor> maf(const Tensor& input, const std::optional<Tensor>& context, const Tensor& packed,
                               const Tensor& table, int64_t law, const std::vector<double>& numbers, int64_t form,
                               const std::optional<Tensor>& saved) {
  const OnDevice device(input);
  const int64_t samples = input.size(0), features = input.size(1);
  const Tensor in = torch::stable::contiguous(input);
  std::optional<Tensor> ctx;
  if (context) ctx = torch::stable::contiguous(*context);
  Tensor out = new_empty(in, {samples, features}), logdet = new_empty(in, {samples});
  dispatch_float(in, [&]<class T>() {
    MafDeviceCall<T> call{};
    call.table = table_of(table);
    call.packed = static_cast<const T*>(packed.const_data_ptr());
    call.samples = samples;
    call.stride = kept_stride(samples);
    call.input = static_cast<const T*>(in.const_data_ptr());
    call.output = static_cast<T*>(out.mutable_data_ptr());
    call.logdet = static_cast<T*>(logdet.mutable_data_ptr());
    call.context = data_or_null<T>(ctx);
    call.saved = saved ? static_cast<T*>(saved->mutable_data_ptr()) : nullptr;
    call.sweep = Inverse;
    bind_transform(call, law, numbers, form);
    launch_maf<T, false>(device, call, in, table.size(0));
  });
  return {out, logdet};
}

template <bool Inverse>
std::tuple<Tensor, Tensor, Tensor> maf_backward(const Tensor& grad_output, const Tensor& grad_logdet,
                                                const Tensor& saved, const Tensor& packed_back,
                                                const std::vector<Tensor>& masks, const Tensor& table,
                                                const Tensor& table_back, int64_t law,
                                                const std::vector<double>& numbers, int64_t form, int64_t context_width,
                                                bool want_parameters) {
  const OnDevice device(grad_output);
  const int64_t samples = grad_output.size(0), features = grad_output.size(1), stride = kept_stride(samples);
  const Tensor in = torch::stable::contiguous(grad_output), grad_out = in,
               grad_rows = torch::stable::contiguous(grad_logdet);
  int64_t count = 0, kept = 4 * features;
  for (const Tensor& mask : masks) {
    count += mask.numel() + mask.size(0);
    kept += 2 * mask.size(0);
  }
  Tensor grad_in = new_empty(in, {samples, features});
  Tensor grad_context = torch::stable::new_zeros(in, std::vector<int64_t>{samples, context_width});
  Tensor grad_parameters = torch::stable::new_zeros(in, std::vector<int64_t>{want_parameters ? count : 0});
  Tensor grads = new_empty(in, {kept * stride});
  dispatch_float(in, [&]<class T>() {
    MafDeviceCall<T> call{};
    call.table = table_of(table_back);
    call.other = table_of(table);
    call.packed = static_cast<const T*>(packed_back.const_data_ptr());
    call.samples = samples;
    call.stride = stride;
    call.grad_output = static_cast<const T*>(grad_out.const_data_ptr());
    call.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    call.grad_input = static_cast<T*>(grad_in.mutable_data_ptr());
    call.saved_in = static_cast<const T*>(saved.const_data_ptr());
    call.grads = static_cast<T*>(grads.mutable_data_ptr());
    call.sweep = Inverse;
    bind_transform(call, law, numbers, form);
    launch_maf<T, true>(device, call, in, table_back.size(0));
    if (context_width && samples) {
      ContextGradientCall<T> c{call.other,
                               call.table,
                               samples,
                               stride,
                               context_width,
                               call.grads,
                               static_cast<T*>(grad_context.mutable_data_ptr())};
      launch(device, "maf_context_gradient", maf_context_gradient_kernel<T>, 4 * device.multiprocessors(), kPackThreads,
             0, c);
    }
    if (want_parameters && samples) {
      T* to = static_cast<T*>(grad_parameters.mutable_data_ptr());
      for (size_t l = 0; l < masks.size(); ++l) {
        const int64_t row_tiles = (masks[l].size(0) + kGradTile - 1) / kGradTile,
                      column_tiles = std::max<int64_t>(1, (masks[l].size(1) + kGradTile - 1) / kGradTile);
        WeightGradientCall<T> c{call.other,
                                call.table,
                                static_cast<int>(l),
                                static_cast<int>(column_tiles),
                                samples,
                                stride,
                                call.saved_in,
                                call.grads,
                                static_cast<const bool*>(masks[l].const_data_ptr()),
                                to,
                                to + masks[l].numel()};
        launch(device, "maf_weight_gradient", maf_weight_gradient_kernel<T>, row_tiles * column_tiles, kGradThreads, 0,
               c);
        to += masks[l].numel() + masks[l].size(0);
      }
    }
  });
  return {grad_in, grad_context, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def("maf_pack(Tensor[] parameters, Tensor[] masks, Tensor table, int size) -> Tensor");
  for (const char* name : {"maf_forward", "maf_inverse"}) {
    const std::string forward = std::string(name) +
                                "(Tensor x, Tensor? context, Tensor packed, Tensor table, int law, float[] numbers, "
                                "int form, Tensor(a!)? saved) -> (Tensor, Tensor)";
    const std::string backward = std::string(name) +
                                 "_backward(Tensor grad_output, Tensor grad_logdet, Tensor saved, Tensor packed_back, "
                                 "Tensor[] masks, Tensor table, Tensor table_back, int law, float[] numbers, int form, "
                                 "int context_width, bool want_parameters) -> (Tensor, Tensor, Tensor)";
    m.def(forward.c_str());
    m.def(backward.c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("maf_pack", TORCH_BOX(&fk::maf_pack));
  m.impl("maf_forward", TORCH_BOX(&fk::maf<false>));
  m.impl("maf_inverse", TORCH_BOX(&fk::maf<true>));
  m.impl("maf_forward_backward", TORCH_BOX(&fk::maf_backward<false>));
  m.impl("maf_inverse_backward", TORCH_BOX(&fk::maf_backward<true>));
}
