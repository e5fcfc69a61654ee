// The autoregressive operators on the CPU: packing, density and sampling direction, and their gradients.
#include "cpu/maf.h"

#include "cpu/tensor.h"

#define FK_KERNELS "cpu/maf_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

inline const int64_t* table_data(const Tensor& table) { return static_cast<const int64_t*>(table.const_data_ptr()); }

// Tiles per thread below which a second thread does not pay: about 20 microseconds of multiply-adds.
inline int64_t tile_grain(const Net& net) { return std::max<int64_t>(1, 1000000 / (net.packed_size * kLanes / 16 + 1)); }

template <class F>
void parallel_tiles(int64_t samples, const Net& net, F&& f) {
  torch::stable::parallel_for(0, (samples + kLanes - 1) / kLanes, tile_grain(net), f);
}

template <class T>
void bind_transform(MafCall<T>& call, int64_t law, const std::vector<double>& numbers, int64_t form, bool inverse) {
  FK_BEST(bind_affine<T>)(call.transform, static_cast<Law>(law), static_cast<Form>(form), inverse);
  call.transform.law = law_parameters_of<T>(numbers);
}

// Weights and biases in the net's order, masked entries zero. Panel p holds [column][height] from its offset.
template <class T>
void pack(const Net& net, const std::vector<Tensor>& parameters, const std::vector<Tensor>& masks, T* packed) {
  for (int64_t l = 0; l < net.layers; ++l) {
    const Layer& layer = net.layer[l];
    const Tensor weights = torch::stable::contiguous(parameters[2 * layer.weight]);
    const T* weight = static_cast<const T*>(weights.const_data_ptr());
    const bool* mask = static_cast<const bool*>(masks[layer.weight].const_data_ptr());
    torch::stable::parallel_for(0, layer.panels, pack_grain(layer), [&](int64_t begin, int64_t end) {
      pack_panels(layer, net.column_perm(l), begin, end, weight, packed,
                  [&](int64_t, int64_t, int64_t at) { return mask[at]; });
    });
    if (layer.bias >= 0) {
      const Tensor biases = torch::stable::contiguous(parameters[2 * layer.weight + 1]);
      const T* bias = static_cast<const T*>(biases.const_data_ptr());
      for (int64_t r = 0; r < layer.rows; ++r) packed[layer.bias + r] = bias[layer.perm[r]];
    }
  }
}

Tensor maf_pack(const std::vector<Tensor>& parameters, const std::vector<Tensor>& masks, const Tensor& table,
                int64_t size) {
  const Net net = read_net(table_data(table));
  STD_TORCH_CHECK(size == net.packed_size, "size must be ", net.packed_size, ", got ", size);
  Tensor packed = new_empty(parameters[0], {net.packed_size});
  dispatch_float(parameters[0],
                 [&]<class T>() { pack<T>(net, parameters, masks, static_cast<T*>(packed.mutable_data_ptr())); });
  return packed;
}

// (output, logdet, saved) of either direction; saved holds `saved_rows` rows: all of the plan's, or none.
template <bool Inverse>
std::tuple<Tensor, Tensor, Tensor> maf(const Tensor& input, const std::optional<Tensor>& context, const Tensor& packed,
                                       const Tensor& table, int64_t law, const std::vector<double>& law_parameters,
                                       int64_t form, int64_t saved_rows) {
  const Net net = read_net(table_data(table));
  const int64_t samples = input.size(0);
  const Tensor in = torch::stable::contiguous(input);
  std::optional<Tensor> ctx;
  if (context) ctx = torch::stable::contiguous(*context);
  Tensor out = new_empty(in, {samples, net.features}), logdet = new_empty(in, {samples});
  const Kept kept = kept_of(net, samples);
  STD_TORCH_CHECK(saved_rows == 0 || saved_rows == kept.rows, "saved_rows must be 0 or ", kept.rows, ", got ",
                  saved_rows);
  Tensor saved = new_empty(in, {saved_rows, kept.stride});
  dispatch_float(in, [&]<class T>() {
    MafCall<T> call;
    call.net = &net;
    call.packed = static_cast<const T*>(packed.const_data_ptr());
    call.samples = samples;
    bind_transform(call, law, law_parameters, form, Inverse);
    call.input = static_cast<const T*>(in.const_data_ptr());
    call.output = static_cast<T*>(out.mutable_data_ptr());
    call.logdet = static_cast<T*>(logdet.mutable_data_ptr());
    call.context = data_or_null<T>(ctx);
    call.context_stride = net.context_width;
    call.kept = kept;
    call.saved = saved_rows ? static_cast<T*>(saved.mutable_data_ptr()) : nullptr;
    parallel_tiles(samples, net, [&](int64_t begin, int64_t end) {
      if constexpr (Inverse)
        FK_BEST(maf_inverse<T>)(call, begin, end);
      else
        FK_BEST(maf_forward<T>)(call, begin, end);
    });
  });
  return {out, logdet, saved};
}

// Gradients of every weight and bias, one after the other in one buffer, in the user's order; masked weights get zero.
template <class T>
void parameter_gradients(const MafCall<T>& call, const std::vector<Tensor>& masks, T* out) {
  const Net& net = *call.net;
  std::vector<WeightGradient<T>> gradients;
  struct Task {
    int64_t layer, panel;
  };
  std::vector<Task> tasks;
  const int64_t samples = (call.samples + kLanes - 1) / kLanes * kLanes;
  for (int64_t l = 0; l < net.layers; ++l) {
    const Layer& layer = net.layer[l];
    const bool last = l == net.layers - 1;
    const int64_t g_row = (last ? 0 : call.kept_back.output[net.layers - 2 - l]) + layer.rows - 1;
    const int64_t a_row = l ? call.kept.output[l - 1] : 0;
    T* bias = out + masks[l].numel();
    gradients.push_back({&layer, net.column_perm(l), call.grads + g_row * call.kept_back.stride,
                         call.saved_in + a_row * call.kept.stride, call.kept_back.stride, call.kept.stride, samples,
                         static_cast<const bool*>(masks[l].const_data_ptr()), nullptr, out, bias});
    out = bias + masks[l].size(0);
    // Later panels are deeper: folding the order gives every thread its share of both kinds.
    for (int64_t i = 0; i < layer.panels; ++i)
      tasks.push_back({l, i % 2 ? layer.panels - 1 - i / 2 : i / 2});
  }
  const int64_t grain = std::max<int64_t>(1, 1000000 / (net.widest * kPanelRows / 16 * call.samples + 1));
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      FK_BEST(weight_gradient<T>)(gradients[tasks[i].layer], tasks[i].panel, tasks[i].panel + 1);
  });
}

// (grad_input, grad_context, grad_parameters): grad_context is empty without context, grad_parameters one flat buffer.
template <bool Inverse>
std::tuple<Tensor, Tensor, Tensor> maf_backward(const Tensor& grad_output, const Tensor& grad_logdet,
                                                const Tensor& input, const Tensor& saved, const Tensor& packed_back,
                                                const std::vector<Tensor>& masks, const Tensor& table,
                                                const Tensor& table_back, int64_t law,
                                                const std::vector<double>& law_parameters, int64_t form,
                                                int64_t context_width, bool want_parameters) {
  const Net net = read_net(table_data(table)), back = read_net(table_data(table_back));
  STD_TORCH_CHECK(net.parameters <= 256, "a feature may have at most 256 parameters, got ", net.parameters);
  const int64_t samples = input.size(0);
  const Tensor in = torch::stable::contiguous(input), grad_out = torch::stable::contiguous(grad_output),
               grad_rows = torch::stable::contiguous(grad_logdet);
  int64_t count = 0;
  for (const Tensor& mask : masks) count += mask.numel() + mask.size(0);
  Tensor grad_in = new_empty(in, {samples, net.features});
  Tensor grad_context = torch::stable::new_zeros(in, std::vector<int64_t>{samples, context_width});
  Tensor grad_parameters = torch::stable::new_zeros(in, std::vector<int64_t>{want_parameters ? count : 0});
  const Kept kept_back = kept_of(back, samples);
  Tensor grads = new_empty(in, {kept_back.rows * kept_back.stride});
  dispatch_float(in, [&]<class T>() {
    MafCall<T> call;
    call.net = &net;
    call.back = &back;
    call.packed_back = static_cast<const T*>(packed_back.const_data_ptr());
    call.samples = samples;
    bind_transform(call, law, law_parameters, form, Inverse);
    call.input = static_cast<const T*>(in.const_data_ptr());
    call.grad_output = static_cast<const T*>(grad_out.const_data_ptr());
    call.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    call.grad_input = static_cast<T*>(grad_in.mutable_data_ptr());
    call.kept = kept_of(net, samples);
    call.saved_in = static_cast<const T*>(saved.const_data_ptr());
    call.kept_back = kept_back;
    call.grads = static_cast<T*>(grads.mutable_data_ptr());
    parallel_tiles(samples, back, [&](int64_t begin, int64_t end) {
      if constexpr (Inverse)
        FK_BEST(maf_inverse_backward<T>)(call, begin, end);
      else
        FK_BEST(maf_forward_backward<T>)(call, begin, end);
    });
    if (context_width) {
      T* to = static_cast<T*>(grad_context.mutable_data_ptr());
      for (int64_t l = 0; l < net.layers; ++l) {
        const Layer& layer = net.layer[l];
        if (layer.context_column < 0) continue;
        const int64_t g_row =
            (l == net.layers - 1 ? 0 : kept_back.output[net.layers - 2 - l]) + layer.rows - 1;
        torch::stable::parallel_for(0, samples, grain_for(layer.rows), [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n)
            for (int64_t r = 0; r < layer.rows; ++r)
              to[n * net.context_width + layer.context_column + layer.perm[r]] =
                  call.grads[(g_row - r) * kept_back.stride + n];
        });
      }
    }
    if (want_parameters && samples)
      parameter_gradients<T>(call, masks, static_cast<T*>(grad_parameters.mutable_data_ptr()));
  });
  return {grad_in, grad_context, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("maf_pack", TORCH_BOX(&fk::maf_pack));
  m.impl("maf_forward", TORCH_BOX(&fk::maf<false>));
  m.impl("maf_inverse", TORCH_BOX(&fk::maf<true>));
  m.impl("maf_forward_backward", TORCH_BOX(&fk::maf_backward<false>));
  m.impl("maf_inverse_backward", TORCH_BOX(&fk::maf_backward<true>));
}
