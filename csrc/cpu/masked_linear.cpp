// masked_linear on the CPU, without a mask. Inputs and outputs are sorted by degree, which makes every row's weights a
// prefix: panels of rows are packed that deep and no deeper. Packing costs several reads of the weights, a product
// reads them once per 16 samples. Few samples do not pay for it: for them the weight is read once, as it lies, and
// degrees are compared on the way.
#include "cpu/panels.h"
#include "cpu/tensor.h"

namespace fk {

template <class T>
struct MaskedLinearCall {
  const Layer* layer = nullptr;
  const int64_t* column_perm = nullptr;
  const T* packed = nullptr;
  const T* bias = nullptr;  // in the user's order
  int64_t samples = 0;
  View<const T> input;
  View<T> output;
};

// A call with few samples: the weight is read once, as it lies.
inline constexpr int64_t kFewSamples = 32;   // at most: with more, packing is sooner done
inline constexpr int64_t kFewColumns = 128;  // of a block, which is left out where no row reads any of them
inline constexpr int64_t kFewRows = 8;       // of the weight at a time

template <class T>
struct FewSamples {
  using Degree = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, to be compared lane by lane
  static constexpr int32_t kNever = std::numeric_limits<int32_t>::max(), kNothing = std::numeric_limits<int32_t>::min();

  int64_t inputs, outputs, samples;
  std::vector<Degree> in;      // of each input; those that fill up the last block belong to no output
  std::vector<Degree> lowest;  // of each block of inputs
  std::vector<Degree> out;     // up to which degree each output reads; those that fill up the last rows read nothing
  const T* weight = nullptr;
  // Whole vectors are read, beyond the end of a row what follows it. After the last rows nothing does: copies of them
  // lie x_stride apart.
  int64_t followed = 0;  // rows
  const T* last_rows = nullptr;
  const T* bias = nullptr;
  const T* x = nullptr;  // (samples, x_stride), zero beyond the inputs
  const T* g = nullptr;  // (samples, g_stride), zero beyond the outputs
  // A cache line more than needed: a power of two apart, all samples would want the same places of a cache.
  int64_t x_stride, g_stride;
  T* to = nullptr;  // y, or the gradient of x at x_stride, or that of the weight
  int64_t activation = 0;

  const T* row(int64_t o) const { return o < followed ? weight + o * inputs : last_rows + (o - followed) * x_stride; }
  int64_t blocks() const { return static_cast<int64_t>(lowest.size()); }
  int64_t groups() const { return static_cast<int64_t>(out.size()) / kFewRows; }
};

}  // namespace fk

#define FK_KERNELS "cpu/masked_linear_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

// A layer that is planned on the spot, from degrees alone.
struct DegreePlan {
  std::vector<int64_t> columns, rows, depth;
  std::vector<Panel> panels;
  Layer layer{};
  int64_t packed_size = 0;
};

inline std::vector<int64_t> sorted_by(const int64_t* degrees, int64_t n, bool descending) {
  std::vector<int64_t> perm(n);
  for (int64_t i = 0; i < n; ++i) perm[i] = i;
  std::stable_sort(perm.begin(), perm.end(), [&](int64_t a, int64_t b) {
    return descending ? degrees[a] > degrees[b] : degrees[a] < degrees[b];
  });
  return perm;
}

// Forward: rows are outputs, and output o needs the inputs of degree <= (<) its own. Transposed: rows are inputs, both
// sorted the other way round, and input i needs the outputs of degree >= (>) its own.
inline DegreePlan plan_degrees(const Tensor& in_degrees, const Tensor& out_degrees, bool strict, bool transposed,
                               int64_t activation) {
  const auto* in = static_cast<const int64_t*>(in_degrees.const_data_ptr());
  const auto* out = static_cast<const int64_t*>(out_degrees.const_data_ptr());
  const int64_t inputs = in_degrees.numel(), outputs = out_degrees.numel();
  DegreePlan plan;
  plan.rows = transposed ? sorted_by(in, inputs, true) : sorted_by(out, outputs, false);
  plan.columns = transposed ? sorted_by(out, outputs, true) : sorted_by(in, inputs, false);
  int64_t depth = 0;
  for (int64_t row : plan.rows) {
    auto exists = [&](int64_t column) {
      const int64_t i = in[transposed ? row : column], o = out[transposed ? column : row];
      return strict ? i < o : i <= o;
    };
    while (depth < static_cast<int64_t>(plan.columns.size()) && exists(plan.columns[depth])) ++depth;
    plan.depth.push_back(depth);
  }
  const int64_t rows = static_cast<int64_t>(plan.rows.size());
  for (int64_t r = 0; r < rows; r += kPanelRows) {
    const int64_t count = std::min<int64_t>(kPanelRows, rows - r), height = (count + 3) / 4 * 4;
    plan.panels.push_back({r, count, height, plan.depth[r + count - 1], plan.packed_size});
    plan.packed_size += height * plan.panels.back().depth;
  }
  plan.layer.rows = rows;
  plan.layer.columns = static_cast<int64_t>(plan.columns.size());
  plan.layer.transposed = transposed;
  plan.layer.activation = activation;
  plan.layer.perm = plan.rows.data();
  plan.layer.panel = plan.panels.data();
  plan.layer.panels = static_cast<int64_t>(plan.panels.size());
  plan.layer.weight_columns = inputs;
  return plan;
}

template <class T>
void run_layer(const DegreePlan& plan, const Tensor& input, const Tensor& weight, const T* bias, Tensor& output) {
  const Tensor weights = as_contiguous(weight);
  Tensor packed = new_empty(weights, {plan.packed_size});
  T* to = static_cast<T*>(packed.mutable_data_ptr());
  const T* from = static_cast<const T*>(weights.const_data_ptr());
  torch::stable::parallel_for(0, plan.layer.panels, pack_grain(plan.layer), [&](int64_t begin, int64_t end) {
    pack_panels(plan.layer, plan.columns.data(), begin, end, from, to,
                [&](int64_t row, int64_t column, int64_t) { return column < plan.depth[row]; });
  });
  MaskedLinearCall<T> call;
  call.layer = &plan.layer;
  call.column_perm = plan.columns.data();
  call.packed = to;
  call.bias = bias;
  call.samples = input.size(0);
  call.input = view<T>(input);
  call.output = mutable_view<T>(output);
  const int64_t grain = std::max<int64_t>(1, 1000000 / (plan.packed_size + 1));
  torch::stable::parallel_for(0, (call.samples + kLanes - 1) / kLanes, grain,
                              [&](int64_t begin, int64_t end) { FK_BEST(masked_linear<T>)(call, begin, end); });
}

// Degrees are compared in 32 bits, which some do not fit into.
inline bool are_few(int64_t samples, const Tensor& in_degrees, const Tensor& out_degrees) {
  if (samples > kFewSamples) return false;
  bool fit = true;
  for (const Tensor* t : {&in_degrees, &out_degrees}) {
    const auto* degree = static_cast<const int64_t*>(t->const_data_ptr());
    for (int64_t i = 0; i < t->numel(); ++i)
      fit &= degree[i] > FewSamples<float>::kNothing + 1 && degree[i] < FewSamples<float>::kNever;
  }
  return fit;
}

template <class T>
FewSamples<T> few_samples(int64_t samples, const Tensor& in_degrees, const Tensor& out_degrees, bool strict) {
  using Degree = typename FewSamples<T>::Degree;
  const auto* in = static_cast<const int64_t*>(in_degrees.const_data_ptr());
  const auto* out = static_cast<const int64_t*>(out_degrees.const_data_ptr());
  FewSamples<T> f;
  f.inputs = in_degrees.numel();
  f.outputs = out_degrees.numel();
  f.samples = samples;
  const int64_t blocks = (f.inputs + kFewColumns - 1) / kFewColumns;
  const int64_t rows = (f.outputs + kFewRows - 1) / kFewRows * kFewRows;
  f.x_stride = blocks * kFewColumns + kLanes;
  f.g_stride = rows + kLanes;
  f.in.assign(blocks * kFewColumns, FewSamples<T>::kNever);
  f.out.assign(rows, FewSamples<T>::kNothing);
  for (int64_t i = 0; i < f.inputs; ++i) f.in[i] = static_cast<Degree>(in[i]);
  for (int64_t o = 0; o < f.outputs; ++o) f.out[o] = static_cast<Degree>(out[o] - strict);
  for (int64_t b = 0; b < blocks; ++b)
    f.lowest.push_back(*std::min_element(f.in.begin() + b * kFewColumns, f.in.begin() + (b + 1) * kFewColumns));
  const int64_t reach = (f.inputs + kLanes - 1) / kLanes * kLanes;
  while (f.followed < f.outputs && f.followed * f.inputs + reach <= f.outputs * f.inputs) ++f.followed;
  return f;
}

// For threads that read or write so many weights per item.
inline int64_t weights_grain(int64_t weights) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, weights)); }

// Rows of a matrix, `stride` apart, with zeros behind them.
template <class T>
void copy_rows(T* to, int64_t stride, const View<const T>& from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    for (int64_t c = 0; c < columns; ++c) to[c] = from(r, c);
    std::fill(to + columns, to + stride, T(0));
  }
}

// Returns what follows in the memory.
template <class T>
T* place_weight(FewSamples<T>& f, const Tensor& contiguous, T* memory) {
  f.weight = static_cast<const T*>(contiguous.const_data_ptr());
  f.last_rows = memory;
  const int64_t rows = f.outputs - f.followed;
  copy_rows(memory, f.x_stride, {f.weight + f.followed * f.inputs, f.inputs, 1}, rows, f.inputs);
  return memory + rows * f.x_stride;
}

template <class T>
void run_few(FewSamples<T> f, const Tensor& x, const Tensor& weight, const T* bias, int64_t activation, Tensor& y) {
  const Tensor weights = as_contiguous(weight);
  T* memory = scratch().get<T>((f.samples + f.outputs - f.followed) * f.x_stride);
  memory = place_weight(f, weights, memory);
  copy_rows(memory, f.x_stride, view<T>(x), f.samples, f.inputs);
  f.x = memory;
  f.bias = bias;
  f.activation = activation;
  f.to = static_cast<T*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, f.groups(), weights_grain(kFewRows * f.inputs),
                              [&](int64_t begin, int64_t end) { FK_BEST(few_outputs<T>)(f, begin, end); });
}

template <class T>
void run_few_backward(FewSamples<T> f, const Tensor& grad, const Tensor& x, const Tensor& weight, T* grad_x,
                      T* grad_weight, T* grad_bias) {
  const Tensor weights = as_contiguous(weight);
  T* memory = scratch().get<T>(f.samples * f.g_stride + (f.samples + f.outputs - f.followed) * f.x_stride);
  copy_rows(memory, f.g_stride, view<T>(grad), f.samples, f.outputs);
  f.g = memory;
  memory = place_weight(f, weights, memory + f.samples * f.g_stride);
  if (grad_x) {
    f.to = memory;
    std::fill_n(memory, f.samples * f.x_stride, T(0));
    torch::stable::parallel_for(0, f.blocks(), weights_grain(kFewColumns * f.outputs),
                                [&](int64_t begin, int64_t end) { FK_BEST(few_inputs<T>)(f, begin, end); });
    for (int64_t s = 0; s < f.samples; ++s) std::copy_n(memory + s * f.x_stride, f.inputs, grad_x + s * f.inputs);
  }
  if (grad_weight) {
    copy_rows(memory, f.x_stride, view<T>(x), f.samples, f.inputs);
    f.x = memory;
    f.to = grad_weight;
    torch::stable::parallel_for(0, f.outputs, weights_grain(f.inputs),
                                [&](int64_t begin, int64_t end) { FK_BEST(few_weights<T>)(f, begin, end); });
    std::fill_n(grad_bias, f.outputs, T(0));
    for (int64_t s = 0; s < f.samples; ++s)
      for (int64_t o = 0; o < f.outputs; ++o) grad_bias[o] += f.g[s * f.g_stride + o];
  }
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& ins,
                     const Tensor& outs, bool strict, int64_t activation) {
  const Tensor in_degrees = as_contiguous(ins), out_degrees = as_contiguous(outs);
  Tensor y = new_empty(x, {x.size(0), out_degrees.numel()});
  std::optional<Tensor> biases;
  if (bias) biases = as_contiguous(*bias);
  dispatch_float(x, [&]<class T>() {
    const T* b = data_or_null<T>(biases);
    if (are_few(x.size(0), in_degrees, out_degrees))
      run_few(few_samples<T>(x.size(0), in_degrees, out_degrees, strict), x, weight, b, activation, y);
    else
      run_layer(plan_degrees(in_degrees, out_degrees, strict, false, activation), x, weight, b, y);
  });
  return y;
}

// (grad_x, grad_weight, grad_bias) from the gradient of the pre-activation.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& ins, const Tensor& outs, bool strict,
                                                          bool want_x, bool want_weight) {
  const Tensor in_degrees = as_contiguous(ins), out_degrees = as_contiguous(outs);
  const int64_t samples = x.size(0), inputs = in_degrees.numel(), outputs = out_degrees.numel();
  Tensor grad_x = new_empty(x, {want_x ? samples : 0, inputs});
  const bool few = are_few(samples, in_degrees, out_degrees);
  const int64_t rows = want_weight ? outputs : 0;
  Tensor grad_weight = few ? new_empty(x, {rows, inputs}) : torch::stable::new_zeros(x, std::vector{rows, inputs});
  Tensor grad_bias = few ? new_empty(x, {rows}) : torch::stable::new_zeros(x, std::vector{rows});
  dispatch_float(x, [&]<class T>() {
    T* to_weight = want_weight ? static_cast<T*>(grad_weight.mutable_data_ptr()) : nullptr;
    T* to_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
    if (few) {
      T* to_x = want_x ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;
      return run_few_backward(few_samples<T>(samples, in_degrees, out_degrees, strict), grad, x, weight, to_x,
                              to_weight, to_bias);
    }
    if (want_x) run_layer<T>(plan_degrees(in_degrees, out_degrees, strict, true, 0), grad, weight, nullptr, grad_x);
    if (!want_weight || samples == 0) return;
    const DegreePlan plan = plan_degrees(in_degrees, out_degrees, strict, false, 0);
    const int64_t tiles = (samples + kLanes - 1) / kLanes, stride = tiles * kLanes;
    const int64_t chunks = (outputs + kLanes - 1) / kLanes, in_chunks = (inputs + kLanes - 1) / kLanes;
    Tensor memory = new_empty(x, {(chunks + in_chunks) * kLanes, stride});
    T* a = static_cast<T*>(memory.mutable_data_ptr());
    T* g = a + in_chunks * kLanes * stride;
    const View<const T> from_x = view<T>(x), from_grad = view<T>(grad);
    torch::stable::parallel_for(0, tiles, grain_for((inputs + outputs) * kLanes), [&](int64_t begin, int64_t end) {
      FK_BEST(keep_matrix<T>)(from_x, plan.columns.data(), inputs, samples, stride, a, begin, end);
      FK_BEST(keep_matrix<T>)(from_grad, plan.rows.data(), outputs, samples, stride, g, begin, end);
    });
    std::vector<int64_t> depth;
    for (const Panel& panel : plan.panels) depth.push_back(panel.depth);
    const WeightGradient<T> w{outputs, plan.rows.data(), plan.columns.data(), depth.data(), g,         a,      stride,
                              stride,  nullptr,          plan.depth.data(),   inputs,       to_weight, to_bias};
    // Chunks differ in depth: folding their order gives every thread its share of both kinds.
    const int64_t grain = std::max<int64_t>(1, 1000000 / (inputs * samples + 1));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) FK_BEST(weight_gradient<T>)(w, i % 2 ? chunks - 1 - i / 2 : i / 2);
    });
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&fk::masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&fk::masked_linear_backward));
}
