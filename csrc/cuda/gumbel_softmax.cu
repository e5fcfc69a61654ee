// gumbel_softmax on CUDA. A row belongs to a warp, or to a block when it is long; a thread draws the four words of one
// block of the stream for four neighbours. The noise of the first kLaneQuads groups of a thread stays in registers,
// that of longer rows is drawn twice and never stored.
#include "common/philox.h"
#include "cuda/row.h"

namespace fk {

template <class T>
struct GumbelCall {
  View<const T> logits, grad;
  const T* tau;
  int64_t tau_stride, rows, classes;
  const int64_t* seed;
  int64_t stream;
  bool hard, wide;
  T* y;         // (rows, classes), contiguous; backwards: the gradient of the logits
  T* grad_tau;  // or null
};

// Running maximum, where it is, and the sum of exp((p - maximum) / tau).
template <class T>
struct SoftMax {
  T top, sum;
  int64_t index;
};

template <class T>
__device__ inline T base_of(T top) {
  return top == -std::numeric_limits<T>::infinity() ? T(0)
                                                    : top;  // while all are -inf: -inf - -inf must not become NaN
}

template <class T>
__device__ inline SoftMax<T> merge(const SoftMax<T>& a, const SoftMax<T>& b, T tau) {
  const bool second = b.top > a.top || (b.top == a.top && b.index < a.index);
  const T top = second ? b.top : a.top, base = base_of(top);
  return {top, a.sum * math::exp((a.top - base) / tau) + b.sum * math::exp((b.top - base) / tau),
          second ? b.index : a.index};
}

// logits + noise of the four elements from 4 * block on; -inf where they do not belong to row r.
template <class T>
__device__ inline void perturbed(T (&p)[4], const GumbelCall<T>& a, int64_t r, int64_t first,
                                 const RandomStream& stream) {
  std::uint32_t words[4];
  philox::block(stream, static_cast<std::uint64_t>(first) / 4, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t c = first + i - r * a.classes;
    p[i] =
        c >= 0 && c < a.classes ? a.logits(r, c) + gumbel_of_word(words[i], T(0)) : -std::numeric_limits<T>::infinity();
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) gumbel_softmax_kernel(const GumbelCall<T> a) {
  __shared__ SoftMax<T> shared[kRowWarps];
  const auto [r, thread, threads] = row_thread(a.wide);
  if (r >= a.rows) return;  // the whole warp, or the whole block
  const RandomStream stream{static_cast<std::uint64_t>(*a.seed), static_cast<std::uint64_t>(a.stream)};
  const T tau = a.tau[r * a.tau_stride];
  const int64_t begin = r * a.classes / 4 * 4 + 4 * thread, end = (r + 1) * a.classes, step = 4 * threads;
  SoftMax<T> row{-std::numeric_limits<T>::infinity(), T(0), end};
  T kept[kLaneQuads][4];
  auto add = [&](const T(&p)[4], int64_t first) {
    T top = row.top;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (p[i] > top) {
        top = p[i];
        row.index = first + i;
      }
    const T base = base_of(top);
    if (top != row.top) row.sum *= math::exp((row.top - base) / tau);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = first + i - r * a.classes;
      if (c >= 0 && c < a.classes) row.sum += math::exp((p[i] - base) / tau);
    }
    row.top = top;
  };
#pragma unroll
  for (int q = 0; q < kLaneQuads; ++q) {
    const int64_t first = begin + q * step;
    if (first < end) {
      perturbed(kept[q], a, r, first, stream);
      add(kept[q], first);
    }
  }
  for (int64_t first = begin + kLaneQuads * step; first < end; first += step) {
    T p[4];
    perturbed(p, a, r, first, stream);
    add(p, first);
  }
  row = merge_row(row, a.wide, shared,
                  [tau](const SoftMax<T>& first, const SoftMax<T>& second) { return merge(first, second, tau); });
  auto write = [&](const T(&p)[4], int64_t first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = first + i - r * a.classes;
      if (c < 0 || c >= a.classes) continue;
      T y = math::exp((p[i] - row.top) / tau) / row.sum;
      if (a.hard && row.sum > T(0)) y = first + i == row.index ? T(1) : T(0);
      a.y[first + i] = y;
    }
  };
#pragma unroll
  for (int q = 0; q < kLaneQuads; ++q)
    if (begin + q * step < end) write(kept[q], begin + q * step);
  for (int64_t first = begin + kLaneQuads * step; first < end; first += step) {
    T p[4];
    perturbed(p, a, r, first, stream);
    write(p, first);
  }
}

template <class T>
__device__ inline T sum_row(T v, bool wide, T* shared) {
  v = warp_sum(v);
  if (wide) {
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    v = T(0);
    for (int w = 0; w < kRowWarps; ++w) v += shared[w];
  }
  return v;
}

// From y alone: (y / tau) (grad - sum y grad), and for tau - sum of that times log y. `logits` is y here.
template <class T>
__global__ void __launch_bounds__(kRowThreads) gumbel_softmax_backward_kernel(const GumbelCall<T> a) {
  __shared__ T shared[kRowWarps];
  const auto [r, thread, threads] = row_thread(a.wide);
  if (r >= a.rows) return;
  const T tau = a.tau[r * a.tau_stride];
  T dot = T(0);
#pragma unroll 4
  for (int64_t c = thread; c < a.classes; c += threads) dot += a.logits(r, c) * a.grad(r, c);
  dot = sum_row(dot, a.wide, shared);
  T for_tau = T(0);
#pragma unroll 4
  for (int64_t c = thread; c < a.classes; c += threads) {
    const T y = a.logits(r, c), g = y / tau * (a.grad(r, c) - dot);
    a.y[r * a.classes + c] = g;
    if (a.grad_tau) for_tau += g * math::log(math::max(std::numeric_limits<T>::min(), y));
  }
  if (a.grad_tau) {
    for_tau = sum_row(for_tau, a.wide, shared);
    if (thread == 0) a.grad_tau[r] = -for_tau;
  }
}

Tensor gumbel_softmax(const Tensor& logits, const Tensor& tau, const Tensor& seed, int64_t stream, bool hard) {
  const OnDevice device(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor y = new_empty(logits, {rows, classes});
  if (classes == 0) return y;
  dispatch_float(logits, [&]<class T>() {
    GumbelCall<T> a{};
    a.logits = view<T>(logits);
    a.tau = static_cast<const T*>(tau.const_data_ptr());
    a.tau_stride = tau.stride(0);
    a.rows = rows;
    a.classes = classes;
    a.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    a.stream = stream;
    a.hard = hard;
    a.wide = is_wide(device, rows, classes);
    a.y = static_cast<T*>(y.mutable_data_ptr());
    launch(device, "gumbel_softmax", gumbel_softmax_kernel<T>, row_blocks(rows, a.wide), kRowThreads, 0, a);
  });
  return y;
}

std::tuple<Tensor, Tensor> gumbel_softmax_backward(const Tensor& grad, const Tensor& y, const Tensor& tau,
                                                   bool for_tau) {
  const OnDevice device(y);
  const int64_t rows = y.size(0), classes = y.size(1);
  Tensor grad_logits = new_empty(y, {rows, classes}), grad_tau = new_empty(y, {for_tau ? rows : 0});
  dispatch_float(y, [&]<class T>() {
    GumbelCall<T> a{};
    a.logits = view<T>(y);
    a.grad = view<T>(grad);
    a.tau = static_cast<const T*>(tau.const_data_ptr());
    a.tau_stride = tau.stride(0);
    a.rows = rows;
    a.classes = classes;
    a.wide = is_wide(device, rows, classes);
    a.y = static_cast<T*>(grad_logits.mutable_data_ptr());
    a.grad_tau = for_tau ? static_cast<T*>(grad_tau.mutable_data_ptr()) : nullptr;
    launch(device, "gumbel_softmax_backward", gumbel_softmax_backward_kernel<T>, row_blocks(rows, a.wide), kRowThreads,
           0, a);
  });
  return {grad_logits, grad_tau};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def("gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, int stream, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor grad, Tensor y, Tensor tau, bool for_tau) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&fk::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&fk::gumbel_softmax_backward));
}
