// masked_linear on the CPU. Inputs and outputs are sorted by degree, which makes every row's weights a prefix: panels
// of rows are packed that deep and no deeper, no mask is formed. Packing costs one read of the weights, a product reads
// them once per 16 samples.
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

Tensor masked_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& in_degrees,
                     const Tensor& out_degrees, bool strict, int64_t activation) {
  const DegreePlan plan = plan_degrees(in_degrees, out_degrees, strict, false, activation);
  Tensor y = new_empty(x, {x.size(0), out_degrees.numel()});
  std::optional<Tensor> biases;
  if (bias) biases = as_contiguous(*bias);
  dispatch_float(x, [&]<class T>() { run_layer<T>(plan, x, weight, data_or_null<T>(biases), y); });
  return y;
}

// (grad_x, grad_weight, grad_bias) from the gradient of the pre-activation.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& in_degrees, const Tensor& out_degrees,
                                                          bool strict, bool want_x, bool want_weight) {
  const int64_t samples = x.size(0), inputs = in_degrees.numel(), outputs = out_degrees.numel();
  Tensor grad_x = new_empty(x, {want_x ? samples : 0, inputs});
  Tensor grad_weight = torch::stable::new_zeros(x, std::vector<int64_t>{want_weight ? outputs : 0, inputs});
  Tensor grad_bias = torch::stable::new_zeros(x, std::vector<int64_t>{want_weight ? outputs : 0});
  dispatch_float(x, [&]<class T>() {
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
    const WeightGradient<T> w{outputs,
                              plan.rows.data(),
                              plan.columns.data(),
                              depth.data(),
                              g,
                              a,
                              stride,
                              stride,
                              nullptr,
                              plan.depth.data(),
                              inputs,
                              static_cast<T*>(grad_weight.mutable_data_ptr()),
                              static_cast<T*>(grad_bias.mutable_data_ptr())};
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
