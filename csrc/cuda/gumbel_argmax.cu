// gumbel_argmax on CUDA. One sample of a row is the largest of its logits plus noise; several are looked up among the
// cumulated probabilities, a tile of which lies in shared memory: four categories for each thread of the row, which is
// a warp or, when the row is long, a block.
#include <algorithm>

#include "common/philox.h"
#include "cuda/row.h"

namespace fk {

template <class T>
struct ArgmaxCall {
  View<const T> logits;
  int64_t rows, classes, samples, pieces;
  const int64_t* seed;
  int64_t stream;
  bool wide;
  int64_t* index;            // (rows, samples)
  T *log_prob, *normaliser;  // (rows, samples), (rows, 2)
};

// The maximum of logits, and the sum of exp(l - top) of all others: log1p of that keeps the digits of a probability
// that is nearly 1.
template <class T>
struct Normaliser {
  T top, others;

  __device__ inline void add(const Normaliser& more) {
    const T e = math::exp(more.top == top ? T(0) : -math::abs(more.top - top));
    others = more.top > top ? more.others + (others + T(1)) * e : others + (more.others + T(1)) * e;
    top = more.top > top ? more.top : top;
  }
  __device__ inline void add(T logit) { add(Normaliser{logit, T(0)}); }
  // NaN where the maximum is infinite.
  __device__ inline T log_sum() const { return math::log1p(others + (top - top)); }
};

template <class T>
__device__ inline Normaliser<T> of_none() {
  return {-std::numeric_limits<T>::infinity(), T(0)};
}

template <class T>
__device__ inline Normaliser<T> merge(Normaliser<T> first, const Normaliser<T>& second) {
  first.add(second);
  return first;
}

// The first of the largest logits + noise.
template <class T>
struct Winner {
  int64_t index;
  T value;
  Normaliser<T> all;
};

template <class T>
__device__ inline void store_normaliser(const ArgmaxCall<T>& a, int64_t r, const Normaliser<T>& all) {
  a.normaliser[2 * r] = all.top;
  a.normaliser[2 * r + 1] = all.log_sum();
}

template <class T>
__device__ inline void store_sample(const ArgmaxCall<T>& a, int64_t r, int64_t sample, int64_t index,
                                    const Normaliser<T>& all) {
  a.index[sample] = index;
  a.log_prob[sample] = (a.logits(r, index) - all.top) - all.log_sum();
}

template <class T>
__device__ inline RandomStream stream_of(const ArgmaxCall<T>& a) {
  return {static_cast<std::uint64_t>(*a.seed), static_cast<std::uint64_t>(a.stream)};
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) gumbel_argmax_kernel(const ArgmaxCall<T> a) {
  __shared__ Winner<T> shared[kRowWarps];
  const auto [r, thread, threads] = row_thread(a.wide);
  if (r >= a.rows) return;  // the whole warp, or the whole block
  const RandomStream stream = stream_of(a);
  Winner<T> best{0, -std::numeric_limits<T>::infinity(), of_none<T>()};
  // One block of the stream for four neighbours.
  for (int64_t first = r * a.classes / 4 * 4 + 4 * thread; first < (r + 1) * a.classes; first += 4 * threads) {
    std::uint32_t words[4];
    philox::block(stream, static_cast<std::uint64_t>(first) / 4, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = first + i - r * a.classes;
      if (c < 0 || c >= a.classes) continue;
      const T logit = a.logits(r, c), value = logit + gumbel_of_word(words[i], T(0));
      if (value > best.value) {
        best.value = value;
        best.index = c;
      }
      best.all.add(logit);
    }
  }
  best = merge_row(best, a.wide, shared, [](const Winner<T>& x, const Winner<T>& y) {
    const bool second = y.value > x.value || (y.value == x.value && y.index < x.index);
    return Winner<T>{second ? y.index : x.index, second ? y.value : x.value, merge(x.all, y.all)};
  });
  if (thread == 0) {
    store_normaliser(a, r, best.all);
    store_sample(a, r, r, best.index, best.all);
  }
}

// tile[i] = before + the sum of the probabilities of the categories begin .. begin + i, unnormalised; returns the last.
// Each half of a stretch is summed by itself and the first one's sum is added to all of the second: so no sum is
// smaller than the one before it, and one of a category that is impossible is the same.
template <class T>
__device__ inline double cumulate(const ArgmaxCall<T>& a, const RowThread& me, int64_t r, T top, int64_t begin,
                                  double before, double* tile, double* ends) {
  double sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t c = begin + 4 * me.thread + i;
    sums[i] = c < a.classes ? static_cast<double>(math::exp(a.logits(r, c) - top)) : 0.0;
  }
  sums[1] += sums[0];
  sums[3] += sums[2];
  sums[2] += sums[1];
  sums[3] += sums[1];
  const int lane = me.thread % kWarp, warp = me.thread / kWarp;
#pragma unroll
  for (int half = 1; half < kWarp; half *= 2) {
    const double first = __shfl_sync(kAllLanes, sums[3], lane / (2 * half) * (2 * half) + half - 1);
    if (lane & half)
#pragma unroll
      for (double& sum : sums) sum += first;
  }
  double after = before;
  if (a.wide) {
    if (lane == kWarp - 1) ends[warp] = sums[3];
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) {
      if (w == warp) before = after;
      after += ends[w];
    }
  } else {
    after += __shfl_sync(kAllLanes, sums[3], kWarp - 1);
    __syncwarp();
  }
  // The barrier above was the last reader's of the tile before this one.
#pragma unroll
  for (int i = 0; i < 4; ++i) tile[4 * me.thread + i] = before + sums[i];
  sync_row(a.wide);
  return after;
}

// The first of n sums, a power of two, that is above `at`.
__device__ inline int first_above(const double* sums, int n, double at) {
  int low = 0;
  for (int half = n / 2; half > 0; half /= 2) low += sums[low + half - 1] <= at ? half : 0;
  return low;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) gumbel_argmax_several_kernel(const ArgmaxCall<T> a) {
  __shared__ Normaliser<T> shared[kRowWarps];
  __shared__ double tiles[4 * kRowThreads], ends[kRowWarps];
  constexpr int kSamples = 4;  // of each thread at a time
  RowThread me = row_thread(a.wide);
  if (me.row >= a.rows * a.pieces) return;
  const int64_t r = me.row / a.pieces, piece = me.row % a.pieces;
  const RandomStream stream = stream_of(a);
  Normaliser<T> all = of_none<T>();
  for (int64_t c = me.thread; c < a.classes; c += me.threads) all.add(a.logits(r, c));
  all = merge_row(all, a.wide, shared, [](const Normaliser<T>& x, const Normaliser<T>& y) { return merge(x, y); });
  if (piece == 0 && me.thread == 0) store_normaliser(a, r, all);
  double* tile = tiles + (a.wide ? 0 : 4 * (static_cast<int>(threadIdx.x) - me.thread));
  const int length = 4 * me.threads;
  double total = 0.0;
  for (int64_t begin = 0; begin < a.classes; begin += length)
    total = cumulate(a, me, r, all.top, begin, total, tile, ends);
  const int64_t samples_end = (r + 1) * a.samples, step = static_cast<int64_t>(kSamples) * me.threads;
  // A block of the stream holds the two words of two samples: threads take pairs.
  for (int64_t first = r * a.samples / 2 * 2 + piece * step; first < samples_end; first += a.pieces * step) {
    double at[kSamples];
    int64_t index[kSamples] = {};
#pragma unroll
    for (int i = 0; i < kSamples; i += 2) {
      std::uint32_t words[4];
      philox::block(stream, static_cast<std::uint64_t>(first + i * me.threads) / 2 + me.thread, words);
      at[i] = total * uniform_of_words(words[0], words[1]);
      at[i + 1] = total * uniform_of_words(words[2], words[3]);
    }
    double before = 0.0;
    for (int64_t begin = 0; begin < a.classes; begin += length) {
      const double after = a.classes <= length ? total : cumulate(a, me, r, all.top, begin, before, tile, ends);
#pragma unroll
      for (int i = 0; i < kSamples; ++i)
        if (at[i] >= before && at[i] < after) index[i] = begin + first_above(tile, length, at[i]);
      before = after;
    }
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const int64_t sample = first + i / 2 * 2 * me.threads + 2 * me.thread + i % 2;
      if (sample >= r * a.samples && sample < samples_end) store_sample(a, r, sample, index[i], all);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> gumbel_argmax(const Tensor& logits, const Tensor& seed, int64_t stream,
                                                 int64_t samples) {
  const OnDevice device(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(rows == 0 || classes > 0, "logits must have a category");
  Tensor index = new_empty(logits, {rows, samples}, ScalarType::Long), log_prob = new_empty(logits, {rows, samples}),
         normaliser = new_empty(logits, {rows, 2});
  dispatch_float(logits, [&]<class T>() {
    ArgmaxCall<T> a{};
    a.logits = view<T>(logits);
    a.rows = rows;
    a.classes = classes;
    a.samples = samples;
    a.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    a.stream = stream;
    a.wide = is_wide(device, rows, samples == 1 ? classes : std::max(classes, samples));
    a.index = static_cast<int64_t*>(index.mutable_data_ptr());
    a.log_prob = static_cast<T*>(log_prob.mutable_data_ptr());
    a.normaliser = static_cast<T*>(normaliser.mutable_data_ptr());
    // Many samples of few rows are shared among blocks, each of which sums the row for itself.
    const int64_t groups = (samples + 4 * kRowThreads - 1) / (4 * kRowThreads);
    a.pieces = a.wide ? std::clamp<int64_t>(2 * device.multiprocessors() / std::max<int64_t>(1, rows), 1,
                                            std::max<int64_t>(1, groups))
                      : 1;
    launch(device, "gumbel_argmax", samples == 1 ? gumbel_argmax_kernel<T> : gumbel_argmax_several_kernel<T>,
           row_blocks(rows * a.pieces, a.wide), kRowThreads, 0, a);
  });
  return {index, log_prob, normaliser};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def("gumbel_argmax(Tensor logits, Tensor seed, int stream, int samples) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("gumbel_argmax", TORCH_BOX(&fk::gumbel_argmax));
}
