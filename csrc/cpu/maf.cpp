// The autoregressive operators on the CPU: packing, density and sampling direction, and their gradients.
#include "cpu/maf.h"

#include "cpu/tensor.h"

#define FK_KERNELS "cpu/maf_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

inline const int64_t* table_data(const Tensor& table) { return static_cast<const int64_t*>(table.const_data_ptr()); }

// Tiles per thread below which a second thread does not pay: about 20 microseconds of multiply-adds.
inline int64_t tile_grain(const Net& net) {
  return std::max<int64_t>(1, 1000000 / (net.packed_size * kLanes / 16 + 1));
}

template <class F>
void parallel_tiles(int64_t samples, const Net& net, F&& f) {
  torch::stable::parallel_for(0, (samples + kLanes - 1) / kLanes, tile_grain(net), f);
}

// Numbers that describe one transform: law, form, whether it is inverted, and how many rows it keeps (0: none).
inline constexpr int kCodes = 4, kNumbers = 6;

template <class T>
void bind_transform(MafCall<T>& call, const int64_t* codes, const double* numbers) {
  call.inverse = codes[2];
  if (is_spline(codes[0])) {
    const int64_t style = codes[0] - static_cast<int64_t>(Law::count), bins = static_cast<int64_t>(numbers[5]);
    const int64_t wanted = spline_parameters(bins, style);
    STD_TORCH_CHECK(call.net->parameters == wanted, "the plan must have ", wanted, " parameters per feature, got ",
                    call.net->parameters);
    return bind_spline(call.transform, bins, style, numbers, call.inverse);
  }
  FK_BEST(bind_affine<T>)(call.transform, static_cast<Law>(codes[0]), static_cast<Form>(codes[1]), call.inverse);
  call.transform.law = law_parameters_of<T>(numbers);
}

// Weights and biases in the net's order, masked entries zero. Panel p holds [column][height] from its offset.
template <class T>
void pack(const Net& net, const std::vector<Tensor>& parameters, const std::vector<Tensor>& masks, T* packed) {
  for (int64_t l = 0; l < net.layers; ++l) {
    const Layer& layer = net.layer[l];
    const Tensor weights = as_contiguous(parameters[2 * layer.weight]);
    const T* weight = static_cast<const T*>(weights.const_data_ptr());
    const bool* mask = static_cast<const bool*>(masks[layer.weight].const_data_ptr());
    torch::stable::parallel_for(0, layer.panels, pack_grain(layer), [&](int64_t begin, int64_t end) {
      pack_panels(layer, net.column_perm(l), begin, end, weight, packed,
                  [&](int64_t, int64_t, int64_t at) { return mask[at]; });
    });
    if (layer.bias >= 0) {
      const Tensor biases = as_contiguous(parameters[2 * layer.weight + 1]);
      const T* bias = static_cast<const T*>(biases.const_data_ptr());
      for (int64_t r = 0; r < layer.rows; ++r) packed[layer.bias + r] = bias[layer.perm[r]];
      for (int64_t r = layer.rows; r < whole_chunks(layer.rows); ++r) packed[layer.bias + r] = T(0);
    }
  }
}

static Tensor maf_pack(const std::vector<Tensor>& parameters, const std::vector<Tensor>& masks, const Tensor& table,
                       int64_t size) {
  const Net net = read_net(table_data(table));
  STD_TORCH_CHECK(size == net.packed_size, "size must be ", net.packed_size, ", got ", size);
  Tensor packed = new_empty(parameters[0], {net.packed_size});
  dispatch_float(parameters[0],
                 [&]<class T>() { pack<T>(net, parameters, masks, static_cast<T*>(packed.mutable_data_ptr())); });
  return packed;
}

// A chain of transforms, every tile through all of them: (y, logdet, saved); with `density`, log N(y; 0, I) is part of
// logdet. What the transforms keep lies one after the other in `saved`.
std::tuple<Tensor, Tensor, Tensor> maf(const Tensor& x, const std::vector<Tensor>& contexts,
                                       const std::vector<Tensor>& packed, const std::vector<Tensor>& tables,
                                       const std::vector<int64_t>& codes, const std::vector<double>& numbers,
                                       bool density) {
  const int64_t samples = x.size(0), count = static_cast<int64_t>(tables.size());
  const Tensor in = as_contiguous(x);
  std::vector<Net> nets;
  std::vector<Kept> kepts;
  std::vector<Tensor> terms;
  nets.reserve(count);  // a net is large: moving it costs as much as a small network's arithmetic
  kepts.reserve(count);
  int64_t rows = 0;
  for (int64_t t = 0; t < count; ++t) {
    nets.push_back(read_net(table_data(tables[t])));
    kepts.push_back(kept_of(nets[t], samples, codes[t * kCodes + 2]));
    const int64_t wanted = codes[t * kCodes + 3];
    STD_TORCH_CHECK(wanted == 0 || wanted == kepts[t].rows, "saved rows must be 0 or ", kepts[t].rows, ", got ",
                    wanted);
    rows += wanted;
    STD_TORCH_CHECK(packed[t].scalar_type() == in.scalar_type() && packed[t].numel() == nets[t].packed_size,
                    "packed weights do not fit the input and the plan of transform ", t);
    STD_TORCH_CHECK(nets[t].features == in.size(1), "transform ", t, " has ", nets[t].features, " features, x has ",
                    in.size(1));
    if (contexts.empty()) {
      STD_TORCH_CHECK(nets[t].context_width == 0, "transform ", t, " needs a context");
      continue;
    }
    terms.push_back(as_contiguous(contexts[t]));
    STD_TORCH_CHECK(terms[t].scalar_type() == in.scalar_type() && terms[t].size(0) == samples &&
                        terms[t].size(1) == nets[t].context_width,
                    "the context of transform ", t, " does not fit the input and the plan");
  }
  Tensor y = new_empty(in, {samples, nets[0].features}), logdet = new_empty(in, {samples});
  Tensor saved = new_empty(in, {rows, kepts[0].stride});
  dispatch_float(in, [&]<class T>() {
    std::vector<MafCall<T>> calls(count);
    T* keep = rows ? static_cast<T*>(saved.mutable_data_ptr()) : nullptr;
    for (int64_t t = 0; t < count; ++t) {
      MafCall<T>& call = calls[t];
      call.net = &nets[t];
      call.packed = static_cast<const T*>(packed[t].const_data_ptr());
      call.samples = samples;
      bind_transform(call, &codes[t * kCodes], &numbers[t * kNumbers]);
      call.output = static_cast<T*>(y.mutable_data_ptr());
      call.input = t ? call.output : static_cast<const T*>(in.const_data_ptr());
      call.logdet = static_cast<T*>(logdet.mutable_data_ptr());
      call.first = t == 0;
      call.density = density && t == count - 1;
      if (!contexts.empty() && nets[t].context_width) call.context = static_cast<const T*>(terms[t].const_data_ptr());
      call.kept = kepts[t];
      if (codes[t * kCodes + 3]) {
        call.saved = keep;
        keep += kepts[t].rows * kepts[t].stride;
      }
    }
    parallel_tiles(samples, nets[0], [&](int64_t begin, int64_t end) {
      for (const MafCall<T>& call : calls)
        if (call.inverse)
          FK_BEST(maf_inverse<T>)(call, begin, end);
        else
          FK_BEST(maf_forward<T>)(call, begin, end);
    });
  });
  return {y, logdet, saved};
}

// Gradients of every weight and bias, one after the other in one buffer, in the user's order; masked weights get zero.
// Rows are taken in the backward net's order, in which their gradients were kept.
template <class T>
void parameter_gradients(const MafCall<T>& call, const std::vector<Tensor>& masks, T* out) {
  const Net &net = *call.net, &back = *call.back;
  struct Task {
    int64_t layer, chunk;
  };
  std::vector<WeightGradient<T>> gradients;
  std::vector<std::vector<int64_t>> depths(net.layers);
  std::vector<Task> tasks;
  for (int64_t l = 0; l < net.layers; ++l) {
    const Layer& layer = net.layer[l];
    const int64_t b = net.layers - 2 - l;  // the layer of the backward net whose outputs are this one's gradients
    const int64_t chunks = (layer.rows + kLanes - 1) / kLanes;
    depths[l].assign(chunks, 0);
    for (int64_t p = 0; p < layer.panels; ++p)
      for (int64_t r = 0; r < layer.panel[p].rows; ++r) {
        int64_t& depth = depths[l][(layer.rows - 1 - layer.panel[p].row - r) / kLanes];
        depth = std::max(depth, layer.panel[p].depth);
      }
    T* bias = out + masks[l].numel();
    gradients.push_back({layer.rows, b < 0 ? back.input_perm : back.layer[b].perm, net.column_perm(l), depths[l].data(),
                         call.grads + (b < 0 ? 0 : call.kept_back.output[b]) * call.kept_back.stride,
                         call.saved_in + (l ? call.kept.output[l - 1] : 0) * call.kept.stride, call.kept.stride,
                         call.kept.stride, static_cast<const bool*>(masks[l].const_data_ptr()), nullptr,
                         layer.weight_columns, out, bias});
    out = bias + masks[l].size(0);
    // Chunks differ in depth: folding their order gives every thread its share of both kinds.
    for (int64_t i = 0; i < chunks; ++i) tasks.push_back({l, i % 2 ? chunks - 1 - i / 2 : i / 2});
  }
  const int64_t grain = std::max<int64_t>(1, 1000000 / (net.widest * call.kept.stride + 1));
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) FK_BEST(weight_gradient<T>)(gradients[tasks[i].layer], tasks[i].chunk);
  });
}

// The gradient of a layer's additive context term is the gradient of its pre-activations.
template <class T>
void context_gradient(const MafCall<T>& call, T* out) {
  const Net &net = *call.net, &back = *call.back;
  for (int64_t l = 0; l < net.layers; ++l) {
    const Layer& layer = net.layer[l];
    if (layer.context_column < 0) continue;
    const int64_t b = net.layers - 2 - l;
    const int64_t* perm = b < 0 ? back.input_perm : back.layer[b].perm;
    const T* grads = call.grads + (b < 0 ? 0 : call.kept_back.output[b]) * call.kept_back.stride;
    torch::stable::parallel_for(0, call.samples, grain_for(layer.rows), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t r = 0; r < layer.rows; ++r)
          out[n * net.context_width + layer.context_column + perm[r]] =
              grads[(r / kLanes * call.kept_back.stride + n) * kLanes + r % kLanes];
    });
  }
}

// torch's own zeros would be touched by one thread, in small pages.
inline Tensor zeros(const Tensor& like, int64_t count) {
  Tensor out = new_empty(like, {count});
  char* data = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, count * static_cast<int64_t>(out.element_size()), 1 << 20,
                              [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
  return out;
}

// (grad_x, grad_contexts, grad_parameters) of a chain: contexts side by side, parameters one flat buffer, both in the
// order of the transforms.
std::tuple<Tensor, Tensor, Tensor> maf_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& saved,
                                                const std::vector<Tensor>& packed_back,
                                                const std::vector<Tensor>& masks, const std::vector<Tensor>& tables,
                                                const std::vector<Tensor>& tables_back,
                                                const std::vector<int64_t>& codes, const std::vector<double>& numbers,
                                                const std::vector<int64_t>& context_widths, bool want_parameters) {
  const int64_t samples = grad_y.size(0), count = static_cast<int64_t>(tables.size());
  const Tensor grad_out = as_contiguous(grad_y), grad_rows = as_contiguous(grad_logdet);
  std::vector<Net> nets, backs;
  nets.reserve(count);
  backs.reserve(count);
  int64_t parameters = 0, contexts = 0, most_rows = 0;
  for (int64_t t = 0; t < count; ++t) {
    nets.push_back(read_net(table_data(tables[t])));
    backs.push_back(read_net(table_data(tables_back[t])));
    most_rows = std::max(most_rows, kept_of(backs[t], samples, false).rows);
    contexts += context_widths[t] * samples;
  }
  for (const Tensor& mask : masks) parameters += mask.numel() + mask.size(0);
  Tensor grad_x = new_empty(grad_out, {samples, nets[0].features});
  Tensor grad_contexts = torch::stable::new_zeros(grad_out, std::vector<int64_t>{contexts});
  Tensor grad_parameters = zeros(grad_out, want_parameters ? parameters : 0);
  Tensor grads = new_empty(grad_out, {most_rows, whole_chunks(samples)});
  dispatch_float(grad_out, [&]<class T>() {
    const T* kept = static_cast<const T*>(saved.const_data_ptr()) + saved.numel();
    T* context_end = static_cast<T*>(grad_contexts.mutable_data_ptr()) + contexts;
    T* parameter_end = static_cast<T*>(grad_parameters.mutable_data_ptr()) + parameters;
    size_t mask_end = masks.size();
    for (int64_t t = count - 1; t >= 0; --t) {
      MafCall<T> call;
      call.net = &nets[t];
      call.back = &backs[t];
      call.packed_back = static_cast<const T*>(packed_back[t].const_data_ptr());
      call.samples = samples;
      bind_transform(call, &codes[t * kCodes], &numbers[t * kNumbers]);
      call.output = static_cast<T*>(grad_x.mutable_data_ptr());
      call.input = t == count - 1 ? static_cast<const T*>(grad_out.const_data_ptr()) : call.output;
      call.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
      call.kept = kept_of(nets[t], samples, call.inverse);
      call.saved_in = kept -= call.kept.rows * call.kept.stride;
      call.kept_back = kept_of(backs[t], samples, false);
      call.grads = static_cast<T*>(grads.mutable_data_ptr());
      parallel_tiles(samples, backs[t], [&](int64_t begin, int64_t end) {
        if (call.inverse)
          FK_BEST(maf_inverse_backward<T>)(call, begin, end);
        else
          FK_BEST(maf_forward_backward<T>)(call, begin, end);
      });
      if (context_widths[t]) context_gradient(call, context_end -= context_widths[t] * samples);
      const std::vector<Tensor> own(masks.begin() + (mask_end - nets[t].layers), masks.begin() + mask_end);
      mask_end -= nets[t].layers;
      for (const Tensor& mask : own) parameter_end -= mask.numel() + mask.size(0);
      if (want_parameters) parameter_gradients<T>(call, own, parameter_end);
    }
  });
  return {grad_x, grad_contexts, grad_parameters};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("maf_pack", TORCH_BOX(&fk::maf_pack));
  m.impl("maf", TORCH_BOX(&fk::maf));
  m.impl("maf_backward", TORCH_BOX(&fk::maf_backward));
}
