// masked_linear on CUDA: block-triangular products over units sorted by degree, bias and activation on the way out.
//
// A product is taken in tiles of 64 x 64 outputs. The operands are read where they lie, through the sorted orders of
// rows and columns, and masked by each row's depth as they enter shared memory. Unlike the CPU kernel nothing is packed
// first: a weight is read once per tile of samples either way, mostly from the L2 cache, and a packed copy would cost
// another launch and scratch memory at every call. All three products are the same loop: it begins where the first unit
// of the tile begins to count and ends with the deepest one.
//
// float64 multiplies in the ordinary units; halves go through tensor cores with sums in float32, and float32 in three
// products there that together are as good as one in float32.
#include "common/affine_by_name.h"
#include "cuda/tile_product.h"

namespace fk {

enum class Product { forward, input_gradient, weight_gradient };

template <class S, class T>
struct ProductCall {
  Operand<S> a, b;
  // Sorted row n has the first depth[n] sorted columns; sorted column k is read from sorted row first[k] on.
  const int64_t *depth, *first;
  int64_t length;  // of the sums
  int64_t row_tiles, column_tiles, out_stride;
  const S* bias;
  S *out, *out_bias;
  Activation activation;
};

template <class S, class T, Product P>
__global__ void __launch_bounds__(kProductThreads, kResident<S>) masked_product_kernel(const ProductCall<S, T> c) {
  // Neighbouring threads read along rows of x, of grad and of the weight.
  constexpr bool kAFast = P != Product::weight_gradient, kBFast = P == Product::forward;
  alignas(32) __shared__ unsigned char memory[kProductBytes<S, T, kAFast, kBFast>];
  const int thread = static_cast<int>(threadIdx.x);

  // The longest sums begin first: what is left at the end is short.
  const int64_t column_tile = static_cast<int64_t>(blockIdx.x) / c.row_tiles;
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) % c.row_tiles * kTile,
                j0 = (P == Product::forward ? c.column_tiles - 1 - column_tile : column_tile) * kTile;
  int64_t begin = 0, end = c.length;
  if constexpr (P == Product::forward) end = c.depth[(j0 + kTile < c.b.count ? j0 + kTile : c.b.count) - 1];
  if constexpr (P == Product::input_gradient) begin = c.first[j0] / kStep<S> * kStep<S>;
  const bool with_bias = P == Product::weight_gradient && j0 == 0;
  if constexpr (P == Product::weight_gradient)
    if (!with_bias && c.depth[(i0 + kTile < c.a.count ? i0 + kTile : c.a.count) - 1] <= j0) end = 0;

  Sums<S, T, kAFast, kBFast> sums;
  const T bias = add_products(sums, reinterpret_cast<S*>(memory), c.a, c.b, i0, j0, begin, end, with_bias);

  // Through shared memory, so that the activation is written once and neighbouring threads write neighbours.
  T* result = reinterpret_cast<T*>(memory);
  sums.store(result);
  __syncthreads();
  const int j = thread % kTile;
  if (j0 + j < c.b.count) {
    const int64_t column = c.b.outer[j0 + j];
    for (int i = thread / kTile; i < kTile && i0 + i < c.a.count; i += kProductThreads / kTile) {
      T v = result[i * kResultStride<T> + j];
      if constexpr (P == Product::forward) {
        if (c.bias) v += static_cast<T>(c.bias[column]);
        v = activate_by_name(c.activation, v);
      }
      if constexpr (P == Product::weight_gradient)
        if (j0 + j >= c.depth[i0 + i]) v = T(0);
      c.out[(c.a.outer ? c.a.outer[i0 + i] : i0 + i) * c.out_stride + column] = static_cast<S>(v);
    }
  }
  if (with_bias && thread < kTile && i0 + thread < c.a.count) c.out_bias[c.a.outer[i0 + thread]] = static_cast<S>(bias);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches. columns, rows: the orders of the inputs and the outputs by degree
// (flowkernels/ops/masked_linear/degrees.py)

inline const int64_t* indices(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

template <Product P, class S, class T>
void launch_product(const OnDevice& device, const char* name, ProductCall<S, T>& c, int64_t rows, int64_t columns) {
  c.row_tiles = blocks_for(rows, kTile);
  c.column_tiles = blocks_for(columns, kTile);
  launch(device, name, masked_product_kernel<S, T, P>, blocks_for(c.row_tiles * c.column_tiles, 1), kProductThreads, 0,
         c);
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& columns,
                     const Tensor& rows, const Tensor& depth, int64_t activation) {
  const OnDevice device(x);
  const int64_t samples = x.size(0), inputs = columns.numel(), outputs = rows.numel();
  Tensor y = new_empty(x, {samples, outputs});
  std::optional<Tensor> biases;
  if (bias) biases = as_contiguous(*bias);
  dispatch_storage(x, [&]<class S, class T>() {
    const View<const S> from = view<S>(x), w = view<S>(weight);
    ProductCall<S, T> c{};
    c.a = {from.data, nullptr, indices(columns), from.row, from.column, samples};
    c.b = {w.data, indices(rows), indices(columns), w.row, w.column, outputs, nullptr, indices(depth)};
    c.depth = indices(depth);
    c.length = inputs;
    c.out = static_cast<S*>(y.mutable_data_ptr());
    c.out_stride = outputs;
    c.bias = data_or_null<S>(biases);
    c.activation = static_cast<Activation>(activation);
    launch_product<Product::forward>(device, "masked_linear", c, samples, outputs);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& columns, const Tensor& rows,
                                                          const Tensor& depth, const Tensor& first, bool want_x,
                                                          bool want_weight) {
  const OnDevice device(x);
  const int64_t samples = x.size(0), inputs = columns.numel(), outputs = rows.numel();
  Tensor grad_x = new_empty(x, {want_x ? samples : 0, inputs});
  Tensor grad_weight = new_empty(x, {want_weight ? outputs : 0, inputs});
  Tensor grad_bias = new_empty(x, {want_weight ? outputs : 0});
  dispatch_storage(x, [&]<class S, class T>() {
    const View<const S> from = view<S>(x), w = view<S>(weight), g = view<S>(grad);
    ProductCall<S, T> c{};
    c.depth = indices(depth);
    c.first = indices(first);
    c.out_stride = inputs;
    if (want_x) {
      c.a = {g.data, nullptr, indices(rows), g.row, g.column, samples};
      c.b = {w.data, indices(columns), indices(rows), w.column, w.row, inputs, indices(first), nullptr};
      c.length = outputs;
      c.out = static_cast<S*>(grad_x.mutable_data_ptr());
      launch_product<Product::input_gradient>(device, "masked_linear gradient of x", c, samples, inputs);
    }
    if (want_weight) {
      c.a = {g.data, indices(rows), nullptr, g.column, g.row, outputs};
      c.b = {from.data, indices(columns), nullptr, from.column, from.row, inputs};
      c.length = samples;
      c.out = static_cast<S*>(grad_weight.mutable_data_ptr());
      c.out_bias = static_cast<S*>(grad_bias.mutable_data_ptr());
      // A layer without inputs has a bias all the same.
      launch_product<Product::weight_gradient>(device, "masked_linear gradient of weight", c, outputs,
                                               inputs ? inputs : 1);
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor columns, Tensor rows, Tensor depth, int activation)"
      " -> Tensor");
  m.def(
      "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor columns, Tensor rows, Tensor depth, "
      "Tensor first, bool want_x, bool want_weight) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("masked_linear", TORCH_BOX(&fk::masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&fk::masked_linear_backward));
}
