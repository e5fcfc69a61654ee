// Packing of weights, and their gradients.
#pragma once
#include "cuda/maf_net.h"
#include "cuda/tile_product.h"

namespace fk {

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
// Gradients of one layer's weights: rows of kept gradients times rows of kept activations. Tiles that the mask leaves
// empty return at once.

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
__global__ void __launch_bounds__(kProductThreads, kResident<T>)
    maf_weight_gradient_kernel(const WeightGradientCall<T> call) {
  alignas(32) __shared__ unsigned char memory[kProductBytes<T, T, true, true>];
  __shared__ int depths[kProductThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t* r = call.table + 16 + 16 * call.layer;
  const int layers = static_cast<int>(call.table[1]), rows = static_cast<int>(r[0]);
  const int row0 = static_cast<int>(blockIdx.x) / call.column_tiles * kTile,
            column0 = static_cast<int>(blockIdx.x) % call.column_tiles * kTile;
  const Panel* panels = reinterpret_cast<const Panel*>(call.table + r[10]);
  int depth = 0;
  for (int64_t p = thread; p < r[11]; p += kProductThreads)
    if (panels[p].row < row0 + kTile && panels[p].row + panels[p].rows > row0 && panels[p].depth > depth)
      depth = static_cast<int>(panels[p].depth);
  depths[thread] = depth;
  __syncthreads();
  for (int half = kProductThreads / 2; half > 0; half /= 2) {
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
  Sums<T, T, true, true> sums;
  const Operand<T> gradients{g, nullptr, nullptr, -call.stride, 1, rows};
  const Operand<T> activations{a, nullptr, nullptr, call.stride, 1, depth};
  const T bias = add_products(sums, reinterpret_cast<T*>(memory), gradients, activations, row0, column0, 0,
                              call.samples, with_bias);
  T* result = reinterpret_cast<T*>(memory);
  sums.store(result);
  __syncthreads();
  const int64_t* perm = call.table + r[7];
  const int64_t* columns =
      call.layer ? call.table + call.table[16 + 16 * (call.layer - 1) + 7] : call.table + call.table[5];
  for (int i = thread; i < kTile * kTile; i += kProductThreads) {
    const int row = row0 + i / kTile, column = column0 + i % kTile;
    if (row >= rows || column >= depth) continue;
    const int64_t at = perm[row] * r[14] + columns[column];
    if (call.mask[at]) call.weight[at] = result[i / kTile * kResultStride<T> + i % kTile];
  }
  if (with_bias && thread < kTile && row0 + thread < rows) call.bias[perm[row0 + thread]] = bias;
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

}  // namespace fk
