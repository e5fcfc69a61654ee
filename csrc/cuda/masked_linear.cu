// masked_linear on CUDA: block-triangular products over units sorted by degree, bias and activation on the way out.
//
// A product is taken in tiles of 64 x 64 outputs. The operands are read where they lie, through the sorted orders of
// rows and columns, and masked by each row's depth as they enter shared memory. Unlike the CPU kernel nothing is packed
// first: a weight is read once per tile of samples either way, mostly from the L2 cache, and a packed copy would cost
// another launch and scratch memory at every call. All three products are the same loop: it begins where the first unit
// of the tile begins to count and ends with the deepest one.
//
// Sums run over the depth in one order, in one block: the same input gives the same bits. float32 and float64 multiply
// in the ordinary units; halves go through tensor cores, with sums in float32.
#if !defined(FK_HOST_SHIM)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#endif

#include "common/affine_by_name.h"
#include "cuda/launch.h"

namespace fk {

inline constexpr int kTile = 64, kProductThreads = 128;
// Depth of one step. Its operands wait in registers while the step before is multiplied.
template <class S>
inline constexpr int kStep = sizeof(S) == 2 ? 32 : 16;
template <class S>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kTensorCores = false;  // none for bfloat16
#else
inline constexpr bool kTensorCores = sizeof(S) == 2;
#endif

// Blocks on one multiprocessor: it bounds the registers. With four, what waits of two half operands would spill.
template <class S>
inline constexpr int kResident = sizeof(S) == 4 ? 4 : 3;

enum class Product { forward, input_gradient, weight_gradient };

// element(o, k) of an operand: o counts rows or columns of the result, k the depth of the product. A null order: as it
// is.
template <class S>
struct Operand {
  const S* data;
  const int64_t *outer, *inner;
  int64_t outer_stride, inner_stride, count;
};

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

// An operand in shared memory, along the dimension along which neighbouring threads read it.
template <class S, bool DepthFast>
struct SharedTile {
  static constexpr int kStride = (DepthFast ? kStep<S> : kTile) + (kTensorCores<S> ? 8 : 1);
  static constexpr int kSize = (DepthFast ? kTile : kStep<S>)*kStride;
  static constexpr int kPerThread = kTile * kStep<S> / kProductThreads;
  S* data;
  __device__ S& at(int o, int k) const { return data[DepthFast ? o * kStride + k : k * kStride + o]; }

  // The thread's i-th element of a step.
  static __device__ int outer_of(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return DepthFast ? t / kStep<S> + i * (kProductThreads / kStep<S>) : t % kTile;
  }
  static __device__ int depth_of(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return DepthFast ? t % kStep<S> : t / kTile + i * (kProductThreads / kTile);
  }

  template <class Exists>
  static __device__ void fetch(S (&to)[kPerThread], const Operand<S>& from, int64_t o0, int64_t k0, int64_t end,
                               const Exists& exists) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t o = o0 + outer_of(i), k = k0 + depth_of(i);
      to[i] = S(0);
      if (o < from.count && k < end && exists(o, k))
        to[i] = from.data[(from.outer ? from.outer[o] : o) * from.outer_stride +
                          (from.inner ? from.inner[k] : k) * from.inner_stride];
    }
  }
  __device__ void put(const S (&from)[kPerThread]) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) at(outer_of(i), depth_of(i)) = from[i];
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The product of two tiles in shared memory, added to sums that are spread over the block; `store` writes them to
// result[row * kResultStride + column].

template <class T>
inline constexpr int kResultStride = kTile + (sizeof(T) == 4 ? 4 : 1);

template <class S, class T, bool AFast, bool BFast, bool = kTensorCores<S>>
struct Sums {
  static constexpr int kAcross = 16, kDown = kProductThreads / kAcross;  // threads over columns and rows
  T sum[kTile / kDown][kTile / kAcross] = {};

  __device__ void add(const SharedTile<S, AFast>& a, const SharedTile<S, BFast>& b) {
    const int tx = static_cast<int>(threadIdx.x) % kAcross, ty = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int k = 0; k < kStep<S>; ++k) {
      T x[kTile / kDown], y[kTile / kAcross];
#pragma unroll
      for (int i = 0; i < kTile / kDown; ++i) x[i] = a.at(ty + i * kDown, k);
#pragma unroll
      for (int j = 0; j < kTile / kAcross; ++j) y[j] = b.at(tx + j * kAcross, k);
#pragma unroll
      for (int i = 0; i < kTile / kDown; ++i)
#pragma unroll
        for (int j = 0; j < kTile / kAcross; ++j) sum[i][j] += x[i] * y[j];
    }
  }
  __device__ void store(T* result) const {
    const int tx = static_cast<int>(threadIdx.x) % kAcross, ty = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int i = 0; i < kTile / kDown; ++i)
#pragma unroll
      for (int j = 0; j < kTile / kAcross; ++j)
        result[(ty + i * kDown) * kResultStride<T> + tx + j * kAcross] = sum[i][j];
  }
};

#if defined(FK_HOST_SHIM)
template <class S>
using Native = S;
#else
template <class S>
using Native = std::conditional_t<std::is_same_v<S, torch::headeronly::Half>, __half, __nv_bfloat16>;
#endif

// Four warps, each with 32 x 32 of the result in four fragments.
template <class S, class T, bool AFast, bool BFast>
struct Sums<S, T, AFast, BFast, true> {
  template <class Use, bool RowMajor>
  using Fragment =
      nvcuda::wmma::fragment<Use, 16, 16, 16, Native<S>,
                             std::conditional_t<RowMajor, nvcuda::wmma::row_major, nvcuda::wmma::col_major>>;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[2][2];

  __device__ Sums() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) nvcuda::wmma::fill_fragment(sum[i][j], 0.0f);
  }
  static __device__ int row0() { return static_cast<int>(threadIdx.x) / kWarp / 2 * 32; }
  static __device__ int column0() { return static_cast<int>(threadIdx.x) / kWarp % 2 * 32; }

  __device__ void add(const SharedTile<S, AFast>& a, const SharedTile<S, BFast>& b) {
#pragma unroll
    for (int k = 0; k < kStep<S>; k += 16) {
      Fragment<nvcuda::wmma::matrix_a, AFast> x[2];
      Fragment<nvcuda::wmma::matrix_b, !BFast> y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load(x[i], &a.at(row0() + 16 * i, k), a.kStride);
        load(y[i], &b.at(column0() + 16 * i, k), b.kStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) nvcuda::wmma::mma_sync(sum[i][j], x[i], y[j], sum[i][j]);
    }
  }
  template <class F>
  static __device__ void load(F& to, const S* from, unsigned stride) {
    nvcuda::wmma::load_matrix_sync(to, reinterpret_cast<const Native<S>*>(from), stride);
  }
  __device__ void store(T* result) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        nvcuda::wmma::store_matrix_sync(result + (row0() + 16 * i) * kResultStride<T> + column0() + 16 * j, sum[i][j],
                                        kResultStride<T>, nvcuda::wmma::mem_row_major);
  }
};

template <class S, class T, Product P>
__global__ void __launch_bounds__(kProductThreads, kResident<S>) masked_product_kernel(const ProductCall<S, T> c) {
  // Neighbouring threads read along rows of x, of grad and of the weight.
  using ATile = SharedTile<S, P != Product::weight_gradient>;
  using BTile = SharedTile<S, P == Product::forward>;
  constexpr size_t kTiles = (ATile::kSize + BTile::kSize) * sizeof(S), kResult = kTile * kResultStride<T> * sizeof(T);
  static_assert(ATile::kSize * sizeof(S) % 32 == 0, "tensor cores read 32 bytes at a time");
  alignas(32) __shared__ unsigned char memory[kTiles > kResult ? kTiles : kResult];
  const ATile a{reinterpret_cast<S*>(memory)};
  const BTile b{reinterpret_cast<S*>(memory) + ATile::kSize};
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

  auto all = [](int64_t, int64_t) { return true; };
  auto exists = [&](int64_t o, int64_t k) {
    if constexpr (P == Product::forward) return k < c.depth[o];
    if constexpr (P == Product::input_gradient) return o < c.depth[k];
    return true;
  };
  Sums<S, T, P != Product::weight_gradient, P == Product::forward> sums;
  T bias = T(0);
  S a_next[ATile::kPerThread], b_next[BTile::kPerThread];
  if (begin < end) {
    ATile::fetch(a_next, c.a, i0, begin, end, all);
    BTile::fetch(b_next, c.b, j0, begin, end, exists);
  }
  for (int64_t k0 = begin; k0 < end; k0 += kStep<S>) {
    a.put(a_next);
    b.put(b_next);
    __syncthreads();
    if (k0 + kStep<S> < end) {
      ATile::fetch(a_next, c.a, i0, k0 + kStep<S>, end, all);
      BTile::fetch(b_next, c.b, j0, k0 + kStep<S>, end, exists);
    }
    if (with_bias && thread < kTile) {
      T part = T(0);
#pragma unroll
      for (int k = 0; k < kStep<S>; ++k) part += static_cast<T>(a.at(thread, k));
      bias += part;
    }
    sums.add(a, b);
    __syncthreads();
  }

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
    c.b = {w.data, indices(rows), indices(columns), w.row, w.column, outputs};
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
      c.b = {w.data, indices(columns), indices(rows), w.column, w.row, inputs};
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
