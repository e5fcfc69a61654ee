// The sampling sweep with the chain in registers, block of steps by block of steps:
//
//   near    all warps: what the previous block's units contribute to this block (few columns), and staging of the
//           weights inside the block
//   reduce  all threads: biases, context and partial products, in a fixed order
//   chain   one warp per sample goes step by step; the rows of the block live in its registers, one or two to a lane,
//           and a unit that becomes final is broadcast by a shuffle and multiplied into all rows that need it.
//           Meanwhile the other half of the warps computes the products of the next block with everything that was
//           final before this one: the bulk of the arithmetic, hidden behind the chain.
#pragma once
#include "cuda/maf_tile.h"

namespace fk {

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

template <class T, bool Backward>
struct ChainTile : DeviceTile<T, Backward, false> {
  using Tile = DeviceTile<T, Backward, false>;
  using Tile::is_sample, Tile::begin_of, Tile::keep, Tile::load_backward, Tile::forward_perm;
  using Tile::S, Tile::call, Tile::net, Tile::first, Tile::thread, Tile::warp, Tile::lane;

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
    panel_product(call.packed + meta.offset[p], meta.height[p], net.layer[p / kPanelsPerLayer].columns, from, to,
                  net.part + slot * kPanelRows * S, meta.height[p]);
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
        if constexpr (Backward)
          if (l < net.layers - 1)
            net.slope[(l * S + s) * kAccStride + row] = slope_by_name(
                net.layer[l].activation,
                is_sample(s) ? call.saved_in[(net.layer[l].kept_slope - meta.row0[l] - row) * call.stride + first + s]
                             : T(0));
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
    T rows[kChainLayers][2];
#pragma unroll
    for (int l = 0; l < kChainLayers; ++l) {
      if (l > last) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = lane + j * kWarp;
        const bool mine = row < meta.rows[l];
        rows[l][j] = mine ? net.acc[(l * S + s) * kAccStride + row] : T(0);
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
        typename Tile::BackwardFeature b{T(0), T(0), T(0), T(0)};
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
          const typename Tile::BackwardFeature b{pick(values[0], f), pick(values[1], f), pick(values[2], f),
                                                 pick(values[3], f)};
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
          T a = pick(rows[l], r);
          if constexpr (Backward) a *= net.slope[(l * S + s) * kAccStride + r];
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

  __device__ void sweep(BlockMeta* metas, T& logdet) const {
    if (warp == 0)
#pragma unroll 1
      for (int b = 0; b < 2; ++b) prepare(b, metas[b]);
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

}  // namespace fk
