// dequantize on CUDA: one pass over memory, five bytes an element from bytes to float32. A row belongs to a warp, or to
// a block when rows are few or very wide; a thread takes four neighbours, for which one block of the stream has the
// words.
#include "common/dequantize.h"

#include "common/philox.h"
#include "cuda/row.h"

namespace fk {

template <class T>
struct DequantizeCall {
  const void* x;  // T or bytes; all tensors are contiguous
  const T* noise;
  const int64_t* seed;
  int64_t stream, rows, features;
  Dequantization<T> options;
  T plain_logdet;  // of a row, without the logit
  bool logit, wide;
  bool packs;  // four neighbours can be read and written at once
  T* y;
  T* logdet;
};

template <class X>
struct alignas(sizeof(X) < 4 ? 4 * sizeof(X) : 16) Four {
  X value[4];
};

template <class X>
bool holds_packs(const X* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(Four<X>) == 0;
}

// Elements first to first + 3 of a tensor, as far as they belong to the row [begin, end).
template <class T, class X>
__device__ inline void load_four(T (&to)[4], const X* from, int64_t first, int64_t begin, int64_t end, bool packs) {
  if (packs && first >= begin && first + 4 <= end) {
    const Four<X> four = *reinterpret_cast<const Four<X>*>(from + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = static_cast<T>(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = first + i >= begin && first + i < end ? static_cast<T>(from[first + i]) : T(0);
  }
}

template <class T>
__device__ inline void store_four(T* to, const T (&from)[4], int64_t first, int64_t begin, int64_t end, bool packs) {
  if (packs && first >= begin && first + 4 <= end) {
    *reinterpret_cast<Four<T>*>(to + first) = {{from[0], from[1], from[2], from[3]}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i >= begin && first + i < end) to[first + i] = from[i];
  }
}

template <class T, class X>
__global__ void __launch_bounds__(kRowThreads) dequantize_kernel(const DequantizeCall<T> a) {
  __shared__ T partial[kRowWarps];
  // As `row_thread`, in a form that takes a register less: with it the kernel for float64 spills one.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t r = a.wide ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  const int thread = a.wide ? static_cast<int>(threadIdx.x) : lane, threads = a.wide ? kRowThreads : kWarp;
  if (r >= a.rows) return;  // the whole warp, or the whole block
  const RandomStream stream{a.noise ? 0 : static_cast<std::uint64_t>(*a.seed), static_cast<std::uint64_t>(a.stream)};
  const int64_t begin = r * a.features, end = begin + a.features;
  T total = T(0);
  for (int64_t first = begin / 4 * 4 + 4 * thread; first < end; first += 4 * threads) {
    T x[4], noise[4];
    load_four(x, static_cast<const X*>(a.x), first, begin, end, a.packs);
    if (a.noise) {
      load_four(noise, a.noise, first, begin, end, a.packs);
    } else {
      std::uint32_t words[4];
      philox::block(stream, static_cast<std::uint64_t>(first) / 4, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) noise[i] = uniform_of_word(words[i], T(0));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (a.logit) {
        const Dequantized<T> out = dequantize_logit(x[i], noise[i], a.options);
        x[i] = out.y;
        total += first + i >= begin && first + i < end ? out.logdet : T(0);
      } else {
        x[i] = dequantize_plain(x[i], noise[i], T(1) / a.options.levels);
      }
    }
    store_four(a.y, x, first, begin, end, a.packs);
  }
  total = row_sum(total, a.wide, partial);
  if (thread == 0) a.logdet[r] = a.logit ? total : a.plain_logdet;
}

std::tuple<Tensor, Tensor> dequantize(const Tensor& x, const std::optional<Tensor>& noise, const Tensor& seed,
                                      int64_t stream, int64_t levels, bool logit, double margin, bool in_double) {
  const OnDevice device(x);
  const int64_t rows = x.size(0), features = x.size(1);
  const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor y = new_empty(x, {rows, features}, type), logdet = new_empty(x, {rows}, type);
  const Tensor given = as_contiguous(x);
  std::optional<Tensor> drawn;
  if (noise) drawn = as_contiguous(*noise);
  const bool bytes = given.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bytes || given.scalar_type() == type, "x must be uint8 or of the type that is calculated in");
  dispatch_float(y, [&]<class T>() {
    DequantizeCall<T> a{};
    a.x = given.const_data_ptr();
    a.noise = data_or_null<T>(drawn);
    a.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    a.stream = stream;
    a.rows = rows;
    a.features = features;
    a.options = dequantization<T>(levels, logit, margin);
    a.plain_logdet = static_cast<T>(-std::log(static_cast<double>(levels)) * static_cast<double>(features));
    a.logit = logit;
    a.wide = wide_rows(device, rows, features);
    a.y = static_cast<T*>(y.mutable_data_ptr());
    a.logdet = static_cast<T*>(logdet.mutable_data_ptr());
    a.packs = (bytes ? holds_packs(static_cast<const std::uint8_t*>(a.x)) : holds_packs(static_cast<const T*>(a.x))) &&
              holds_packs(a.noise) && holds_packs(a.y);
    launch(device, "dequantize", bytes ? dequantize_kernel<T, std::uint8_t> : dequantize_kernel<T, T>,
           row_blocks(rows, a.wide), kRowThreads, 0, a);
  });
  return {y, logdet};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def(
      "dequantize(Tensor x, Tensor? noise, Tensor seed, int stream, int levels, bool logit, float margin, bool "
      "in_double) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) { m.impl("dequantize", TORCH_BOX(&fk::dequantize)); }
