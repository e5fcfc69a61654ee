// The autoregressive operators on CUDA: one launch for a whole direction, forwards or backwards.
//
// A thread block takes a tile of kSamples samples through the whole network and never meets another block. Activations
// of the tile lie in shared memory as [unit][sample], 32 bytes a unit. What a layer's earlier columns contribute is a
// product of packed panels with them (maf_panels.h), float32 on tensor cores. The density direction is one pass of such
// products, layer after layer (maf_tile.h). The sampling direction is a sweep over blocks of steps, inside a block step
// by step in registers (maf_chain.h); networks that do not fit this (a step with more than kBlockRows units, many
// layers, too little shared memory) and splines, whose features have too many parameters for a lane's registers, sweep
// layer by layer with block-wide barriers. Weights are packed, and get their gradients, by launches of their own
// (maf_weights.h).
#include "cuda/maf_chain.h"
#include "cuda/maf_weights.h"

namespace fk {

template <class T, bool Backward, bool Spline>
__device__ void run_tiles(const MafDeviceCall<T>& call) {
  constexpr int S = kSamples<T>;
  __shared__ DeviceNet<T> net;
  __shared__ BlockMeta metas[kMetas];
  read_device_net<T, Backward, Spline>(call, net);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * S; first < call.samples;
       first += static_cast<int64_t>(gridDim.x) * S) {
    const DeviceTile<T, Backward, Spline> tile{call, net, first, thread, thread / kWarp, thread % kWarp};
    T logdet = T(0);
    if (!call.sweep) tile.enter();
    tile.first_units();
    if (call.sweep) {
      if constexpr (!Spline)
        if (net.chain) ChainTile<T, Backward>{tile}.sweep(metas, logdet);
      if (!net.chain) tile.slow_sweep(logdet);
      logdet = warp_sum(logdet);
      if (!Backward && tile.lane == 0 && tile.warp < S && tile.is_sample(tile.warp))
        call.logdet[tile.first + tile.warp] = logdet;
    } else {
      tile.leave();
    }
    __syncthreads();
  }
}

// The call is a __grid_constant__: otherwise a reference to part of it has every thread copy the whole to its stack.
template <class T, bool Backward>
__global__ void __launch_bounds__(kTileThreads<T>, 1) maf_kernel(__grid_constant__ const MafDeviceCall<T> call) {
  run_tiles<T, Backward, false>(call);
}

// A kernel of its own: the bins of a feature take a stack frame and registers that the affine chain must not pay for.
template <class T, bool Backward>
__global__ void __launch_bounds__(kTileThreads<T>, 1) maf_spline_kernel(__grid_constant__ const MafDeviceCall<T> call) {
  run_tiles<T, Backward, true>(call);
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
  for (const Tensor& p : parameters) {
    STD_TORCH_CHECK(p.scalar_type() == packed.scalar_type(), "parameters must be of one type");
    contiguous.push_back(torch::stable::contiguous(p));
  }
  dispatch_storage(parameters[0], [&]<class T, class>() {
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
  const int64_t work = kSlots * kPanelRows * S + kChainLayers * kChainLayerSize<T, Backward> + kTileThreads<T>;
  const int64_t state = 2 * table_size * S;
  const int64_t statically = static_cast<int64_t>(sizeof(DeviceNet<T>) + kMetas * sizeof(BlockMeta) + 1024);
  const int64_t limit = (device.shared_memory() - statically) / 128 * 128;
  STD_TORCH_CHECK(limit >= kTileThreads<T> * static_cast<int64_t>(sizeof(T)), "maf needs ",
                  statically + kTileThreads<T> * static_cast<int64_t>(sizeof(T)),
                  " bytes of shared memory for a thread block, this device has ", device.shared_memory());
  const int64_t wanted = ((work + state) * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
  const int64_t shared = wanted < limit ? wanted : limit;
  // With scratch memory no more than run at once: each has its own.
  const int64_t most = (wanted > limit ? 1 : 4) * static_cast<int64_t>(device.multiprocessors());
  const int64_t blocks = tiles < most ? tiles : most;
  call.shared_bytes = static_cast<int>(shared);
  call.scratch_per_block = wanted > limit ? state : 0;
  Tensor scratch = new_empty(like, {blocks * call.scratch_per_block});
  call.scratch = static_cast<T*>(scratch.mutable_data_ptr());
  launch(device, Backward ? "maf_backward" : "maf",
         call.spline.bins ? maf_spline_kernel<T, Backward> : maf_kernel<T, Backward>, blocks, kTileThreads<T>, shared,
         call);
}

template <class T>
Weights<T> weights_of(const Tensor& packed) {
  const ScalarType type = packed.scalar_type();
  if constexpr (std::is_same_v<T, float>) {
    if (type == ScalarType::Half) return {packed.const_data_ptr(), Stored::float16};
    if (type == ScalarType::BFloat16) return {packed.const_data_ptr(), Stored::bfloat16};
  }
  STD_TORCH_CHECK(type == (std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double),
                  "packed weights must be of the input's type, or halves for float32");
  return {packed.const_data_ptr(), Stored::whole};
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
    call.packed = weights_of<T>(packed);
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
    call.packed = weights_of<T>(packed_back);
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
        const int64_t row_tiles = (masks[l].size(0) + kTile - 1) / kTile,
                      column_tiles = std::max<int64_t>(1, (masks[l].size(1) + kTile - 1) / kTile);
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
        launch(device, "maf_weight_gradient", maf_weight_gradient_kernel<T>, row_tiles * column_tiles, kProductThreads,
               0, c);
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
