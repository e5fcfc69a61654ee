// The sampling sweep with the chain in registers, block of steps by block of steps:
//
//   near    all warps: what the previous block's units contribute to this block (few columns), and staging of the
//           weights inside the block
//   reduce  all threads: biases, context and partial products, in a fixed order
//   chain   one warp per sample goes step by step; the rows of the block live in its registers, one or two to a lane,
//           and a unit that becomes final is broadcast by a shuffle and multiplied into all rows that need it.
//           Meanwhile the other half of the warps computes the products of the next block with everything that was
//           final before this one: the bulk of the arithmetic, hidden behind the chain.
//   settle  the same warp stores what the chain has left in its registers, all rows at once
//
// A warp issues in order and waits for what it has just asked for, so that a step takes as long as all its instructions
// one after the other. Nothing is done in it that can be done before or after: indices come as metadata that a helping
// warp wrote, weights are loaded before the value that they are multiplied by is known, and stores, log-dets and what
// the gradients need wait for `settle`, which works every feature and unit out once more, 32 at a time.
#pragma once
#include "cuda/maf_tile.h"

namespace fk {

// What the warps have to know about one block of steps.
struct BlockMeta {
  int steps, panels, tasks;
  int row0[kChainLayers], rows[kChainLayers], column0[kChainLayers], columns[kChainLayers];
  int64_t offset[kMaxBlockPanels];
  int height[kMaxBlockPanels], depth[kMaxBlockPanels], far[kMaxBlockPanels], slot[kMaxBlockPanels],
      stored[kMaxBlockPanels], slots[kMaxBlockPanels];
  short task_panel[kSlots];
  int task_from[kSlots], task_to[kSlots];
  unsigned char up_to[kChainLayers][kBlockRows + 1];
  signed char source[kChainLayers][kBlockRows];  // the row of the block that a residual connection adds, or:
};
inline constexpr signed char kNoSource = -1, kEarlier = -2;  // none, or one of an earlier block
static_assert(kBlockRows / 2 <= kWarp, "a lane has one feature at most, which has two parameters");

template <class T, bool Backward>
struct ChainTile : DeviceTile<T, Backward, false> {
  using Tile = DeviceTile<T, Backward, false>;
  using Tile::is_sample, Tile::begin_of, Tile::keep, Tile::load_backward;
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
    }
    for (int i = lane; i < net.layers * (end - begin + 1); i += kWarp) {
      const int l = i % net.layers, s = i / net.layers;
      meta.up_to[l][s] = static_cast<unsigned char>(net.layer[l].up_to[begin + s] - net.layer[l].up_to[begin]);
    }
    for (int l = 0; l < net.layers; ++l) {
      const DeviceLayer<T>& layer = net.layer[l];
      if (layer.residual < 0) continue;
      const int64_t* up_to = net.layer[layer.residual].up_to;
      for (int r = lane; r < layer.up_to[end] - layer.up_to[begin]; r += kWarp) {
        const int64_t row = layer.residual_row[layer.up_to[begin] + r], in_block = row - up_to[begin];
        meta.source[l][r] = static_cast<signed char>(row < 0 ? kNoSource : in_block < 0 ? kEarlier : in_block);
      }
    }
    // Lane p: panel p % 3 of layer p / 3.
    const int l = lane / kPanelsPerLayer, i = lane % kPanelsPerLayer;
    int far = 0, height = 0, depth = 0;
    int64_t offset = 0;
    if (l < net.layers) {
      const DeviceLayer<T>& layer = net.layer[l];
      const int p = static_cast<int>(layer.group[b + 1]) + i;
      if (p < layer.group[b + 2]) {
        const Panel panel = layer.panel[p];
        const int near = static_cast<int>(layer.columns_up_to[begin]);
        depth = static_cast<int>(panel.depth);
        far = b ? static_cast<int>(layer.columns_up_to[before]) : 0;
        far = far < depth ? far : depth;
        height = static_cast<int>(panel.height);
        offset = panel.offset;
        meta.depth[lane] = near < depth ? near : depth;
      }
    }
    if (lane < kMaxBlockPanels) {
      meta.offset[lane] = offset;
      meta.height[lane] = height;
      meta.stored[lane] = depth;
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
      meta.panels = net.layers * kPanelsPerLayer;
      meta.tasks = total;
    }
  }

  __device__ void partial(const BlockMeta& meta, int p, int from, int to, int slot) const {
    panel_product(call.packed, meta.offset[p], meta.height[p], net.layer[p / kPanelsPerLayer].columns, from, to,
                  net.part + slot * kPanelRows * S, meta.height[p]);
  }

  // Sixteen columns of the weights inside the block, [column][row]; what a panel does not store is zero.
  static constexpr int kStaged = 16;
  __device__ void stage(const BlockMeta& meta, int p, int column0) const {
    constexpr int kLanes = kWarp / kPanelRows;  // columns that a warp loads at once
    const int l = p / kPanelsPerLayer, row = lane % kPanelRows, height = meta.height[p];
    if (column0 >= meta.columns[l]) return;
    T weight[kStaged / kLanes];
    call.packed.visit(meta.offset[p] + static_cast<int64_t>(meta.column0[l]) * height + row, [&](auto* weights) {
#pragma unroll
      for (int i = 0; i < kStaged / kLanes; ++i) {
        const int c = column0 + lane / kPanelRows + i * kLanes;
        weight[i] = row < height && meta.column0[l] + c < meta.stored[p] ? T(to_compute(weights[c * height])) : T(0);
      }
    });
    T* to = shared_memory<T>() + net.diagonal + l * kBlockRows * kBlockRows + p % kPanelsPerLayer * kPanelRows + row;
#pragma unroll
    for (int i = 0; i < kStaged / kLanes; ++i) to[(column0 + lane / kPanelRows + i * kLanes) * kBlockRows] = weight[i];
  }

  __device__ void near(const BlockMeta& meta) const {
    constexpr int kStages = kBlockRows / kStaged;
    for (int task = warp; task < meta.panels * (1 + kStages); task += 2 * S) {
      const int p = task % meta.panels, stages = task / meta.panels;
      if (stages)
        stage(meta, p, (stages - 1) * kStaged);
      else if (meta.height[p])
        partial(meta, p, meta.far[p], meta.depth[p], p);
    }
  }

  __device__ void reduce(const BlockMeta& meta) const {
    // So many rows of one thread ask for what comes from memory before any of them waits for it.
    constexpr int kAtOnce = 2;
#pragma unroll 1
    for (int begin = thread; begin < net.layers * kBlockRows * S; begin += kAtOnce * kTileThreads<T>) {
      T start[kAtOnce], kept[kAtOnce];
      auto each_row = [&](auto&& f) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = begin + j * kTileThreads<T>, l = i / (kBlockRows * S), row = i / S % kBlockRows;
          if (l < net.layers && row < meta.rows[l]) f(j, l, row, i % S);
        }
      };
      each_row([&](int j, int l, int row, int s) {
        const DeviceLayer<T>& layer = net.layer[l];
        start[j] = begin_of(layer, meta.row0[l] + row, s);
        if (Backward && l < net.layers - 1)
          kept[j] =
              is_sample(s) ? call.saved_in[(layer.kept_slope - meta.row0[l] - row) * call.stride + first + s] : T(0);
      });
      each_row([&](int j, int l, int row, int s) {
        const int p = l * kPanelsPerLayer + row / kPanelRows, in_panel = row % kPanelRows;
        T v = start[j];
        for (int k = 0; k < meta.slots[p]; ++k) v += net.part[((meta.slot[p] + k) * kPanelRows + in_panel) * S + s];
        v += net.part[(p * kPanelRows + in_panel) * S + s];
        const int at = (l * S + s) * kAccStride + row;
        shared_memory<T>()[net.acc + at] = v;
        if (Backward && l < net.layers - 1)
          shared_memory<T>()[net.slope + at] = slope_by_name(net.layer[l].activation, kept[j]);
      });
    }
  }

  __device__ void far(const BlockMeta& meta) const {
    for (int t = warp - S; t < meta.tasks; t += S)
      partial(meta, meta.task_panel[t], meta.task_from[t], meta.task_to[t], kMaxBlockPanels + t);
  }

  __device__ static T pick(const T (&rows)[2], int row) {
    return __shfl_sync(kAllLanes, row < kWarp ? rows[0] : rows[1], row % kWarp);
  }

  // Each lane asks for a row of its own.
  __device__ static T gather(const T (&rows)[2], int row) {
    const T low = __shfl_sync(kAllLanes, rows[0], row % kWarp), high = __shfl_sync(kAllLanes, rows[1], row % kWarp);
    return row < kWarp ? low : high;
  }

  __device__ void put(T (&rows)[2], int row, T v) const {
    if (lane == row) rows[0] = v;
    if (lane + kWarp == row) rows[1] = v;
  }

  // A lane's weights of one column, loaded before there is anything to multiply them by.
  struct Column {
    T weight[2];
    __device__ Column(const SharedReader<T>& diagonal, int begin, int lane) {
#pragma unroll
      for (int j = 0; j < 2; ++j) weight[j] = lane + j * kWarp < kBlockRows ? diagonal[begin + j * kWarp] : T(0);
    }
    // Rows that are final have weights of zero, and stay what they are whatever comes after them, infinities too.
    __device__ void multiply_in(T (&rows)[2], T a) const {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (weight[j] != T(0)) rows[j] += weight[j] * a;
    }
  };

  // What one lane of a sample's warp holds: rows of the hidden layers, rows of the last layer, and one feature of the
  // block with what it needs from memory.
  struct Registers {
    T hidden[kChainLayers - 1][2], last[2];
    T z;                                     // forwards
    typename Tile::BackwardFeature feature;  // backwards
    T grad_logdet;
    SharedReader<T> diagonal, slope;
  };

  __device__ T& acc_of(int l, int row) const { return shared_memory<T>()[net.acc + (l * S + warp) * kAccStride + row]; }
  __device__ static int features_of(int rows) { return Backward ? rows : rows / 2; }

  __device__ Registers load(const BlockMeta& meta) const {
    Registers r;
    const int last = net.layers - 1;
    r.diagonal = SharedReader<T>(shared_memory<T>() + net.diagonal + lane);
    r.slope = SharedReader<T>(shared_memory<T>() + net.slope + warp * kAccStride);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = lane + j * kWarp;
#pragma unroll
      for (int l = 0; l < kChainLayers - 1; ++l)
        r.hidden[l][j] = l < last && row < meta.rows[l] ? acc_of(l, row) : T(0);
      r.last[j] = row < meta.rows[last] ? acc_of(last, row) : T(0);
    }
    const bool has_feature = lane < features_of(meta.rows[last]);
    const int feature = features_of(meta.row0[last]) + lane;
    if constexpr (Backward) {
      r.feature = has_feature ? load_backward(feature, warp) : typename Tile::BackwardFeature{};
      r.grad_logdet = call.grad_logdet[first + warp];
    } else {
      r.z = has_feature ? call.input[(first + warp) * net.features + net.data_perm[feature]] : T(0);
    }
    return r;
  }

  __device__ NamedAffine<T> affine() const {
    NamedAffine<T> a = call.affine;
    a.inverse = true;  // a sweep: one branch less in a step
    return a;
  }
  __device__ Transformed<T> transform(T z, T shift, T u) const { return affine_by_name(affine(), z, shift, u); }
  __device__ AffineGradient<T> gradient(const typename Tile::BackwardFeature& b, T through, T grad_logdet) const {
    return affine_backward_by_name(affine(), b.grad_output + through, grad_logdet, b.z, b.shift, b.u);
  }

  // Column c of what layer l reads inside the block.
  __device__ Column column(const Registers& r, int l, int c) const {
    return {r.diagonal, (l * kBlockRows + c) * kBlockRows, lane};
  }
  __device__ static void multiply_in(Registers& r, int l, int last, const Column& column, T a) {
    if (l == last)
      column.multiply_in(r.last, a);
    else if (l < kChainLayers - 1)
      column.multiply_in(r.hidden[l], a);
  }

  // The usual activation without the switch's jump through a table, which takes longer than a unit does.
  __device__ static T activate(Activation activation, T v) {
    return activation == Activation::relu ? fk::activate<Activation::relu>(v) : activate_by_name(activation, v);
  }

  // What a residual connection adds to a row of layer l.
  __device__ T residual(const Registers& r, const BlockMeta& meta, int l, int row) const {
    const DeviceLayer<T>& layer = net.layer[l];
    const int source = meta.source[l][row];
    T v = T(0);
    if (source == kEarlier) {
      const DeviceLayer<T>& from = net.layer[layer.residual];
      v = (Backward ? from.out : from.before)[layer.residual_row[meta.row0[l] + row] * S + warp];
    } else if (source != kNoSource) {
#pragma unroll
      for (int earlier = 0; earlier < l; ++earlier)
        if (earlier == layer.residual) v = pick(r.hidden[earlier], source);
    }
    return v;
  }

  // The steps of a block for sample s = warp. Every lane works out every final value itself: a broadcast costs more.
  __device__ void chain(const BlockMeta& meta, T& logdet) const {
    const int last = net.layers - 1;
    Registers r = load(meta);
    // In one register each: four bits of a layer are its activation.
    unsigned activations = 0, has_residual = 0;
    static_assert(static_cast<int>(Activation::count) <= 16);
    for (int l = 0; l < last; ++l) {
      activations |= static_cast<unsigned>(net.layer[l].activation) << (4 * l);
      has_residual |= (net.layer[l].residual >= 0 ? 1u : 0u) << l;
    }
    for (int step = 0; step < meta.steps; ++step) {
      const int f1 = features_of(meta.up_to[last][step + 1]);
      for (int f = features_of(meta.up_to[last][step]); f < f1; ++f) {
        if constexpr (Backward) {
          const Column of_u = column(r, 0, 2 * f), of_shift = column(r, 0, 2 * f + 1);
          const auto from_f = [&](T v) { return __shfl_sync(kAllLanes, v, f); };
          const AffineGradient<T> g = gradient(
              {from_f(r.feature.grad_output), from_f(r.feature.z), from_f(r.feature.shift), from_f(r.feature.u)},
              pick(r.last, f), r.grad_logdet);
          multiply_in(r, 0, last, of_u, g.u);
          multiply_in(r, 0, last, of_shift, g.shift);
        } else {
          const Column of_y = column(r, 0, f);
          const T z = __shfl_sync(kAllLanes, r.z, f);
          multiply_in(r, 0, last, of_y, transform(z, pick(r.last, 2 * f), pick(r.last, 2 * f + 1)).y);
        }
      }
#pragma unroll
      for (int l = 0; l < kChainLayers - 1; ++l) {
        const int end = l < last ? meta.up_to[l][step + 1] : 0;
        for (int row = l < last ? meta.up_to[l][step] : 0; row < end; ++row) {
          const Column of_a = column(r, l + 1, row);
          T a = pick(r.hidden[l], row);
          if constexpr (Backward) a *= r.slope[l * S * kAccStride + row];
          const bool with_residual = has_residual >> l & 1;
          if (with_residual) a += residual(r, meta, l, row);
          if (Backward || with_residual) put(r.hidden[l], row, a);
          if (!Backward) a = activate(static_cast<Activation>(activations >> (4 * l) & 15), a);
          multiply_in(r, l + 1, last, of_a, a);
        }
      }
    }
    settle(meta, r, logdet);
  }

  __device__ void settle(const BlockMeta& meta, const Registers& r, T& logdet) const {
    const int last = net.layers - 1, feature = features_of(meta.row0[last]) + lane;
    const bool has_feature = lane < features_of(meta.rows[last]);
    if constexpr (Backward) {
      const AffineGradient<T> g = gradient(r.feature, r.last[0], r.grad_logdet);
      if (has_feature) {
        net.state_in[static_cast<int64_t>(2 * feature) * S + warp] = g.u;
        net.state_in[static_cast<int64_t>(2 * feature + 1) * S + warp] = g.shift;
        this->store_gradients(feature, warp, g.x);
      }
    } else {
      const T shift = gather(r.last, 2 * lane), u = gather(r.last, 2 * lane + 1);
      const Transformed<T> t = transform(r.z, shift, u);
      if (has_feature) {
        logdet += t.logdet;
        this->store_feature(feature, warp, r.z, t.y);
        keep(call.saved, net.layer[last].kept_output + 2 * feature, warp, shift);
        keep(call.saved, net.layer[last].kept_output + 2 * feature + 1, warp, u);
      }
    }
#pragma unroll
    for (int l = 0; l < kChainLayers - 1; ++l)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (l < last && lane + j * kWarp < kAccStride) acc_of(l, lane + j * kWarp) = r.hidden[l][j];
    __syncwarp();
#pragma unroll 1
    for (int l = 0; l < last; ++l)
#pragma unroll 1
      for (int row = lane; row < meta.rows[l]; row += kWarp)
        this->store_unit(l, meta.row0[l] + row, warp, acc_of(l, row));
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
