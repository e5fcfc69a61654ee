// What kernels share that give a row to a warp, or to a block where rows are long or few.
#pragma once
#include "cuda/launch.h"

namespace fk {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / kWarp;
// Rows of more than this many groups of four for each lane are a block's.
inline constexpr int kLaneQuads = 6;

inline bool is_wide(const OnDevice& device, int64_t rows, int64_t columns) {
  return columns > 4 * kWarp * kLaneQuads ||
         (columns > 256 && rows < 16 * static_cast<int64_t>(device.multiprocessors()));
}

// Of what is read once and kept nowhere.
inline bool wide_rows(const OnDevice& device, int64_t rows, int64_t features) {
  return features > 4096 || (features > 512 && rows < 16 * static_cast<int64_t>(device.multiprocessors()));
}

inline int64_t row_blocks(int64_t rows, bool wide) { return blocks_for(rows, wide ? 1 : kRowWarps); }

// Which of the threads of which row this one is.
struct RowThread {
  int64_t row;
  int thread, threads;
};

__device__ inline RowThread row_thread(bool wide) {
  const int thread = static_cast<int>(threadIdx.x);
  if (wide) return {static_cast<int64_t>(blockIdx.x), thread, kRowThreads};
  return {static_cast<int64_t>(blockIdx.x) * kRowWarps + thread / kWarp, thread % kWarp, kWarp};
}

__device__ inline void sync_row(bool wide) {
  if (wide)
    __syncthreads();
  else
    __syncwarp();
}

// Over the threads of a row: a warp, or the block if rows are `wide`; `partial` has room for kRowWarps numbers.
template <class T>
__device__ inline T row_sum(T v, bool wide, T* partial) {
  v = warp_sum(v);
  if (!wide) return v;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = T(0);
  for (int w = 0; w < kRowWarps; ++w) v += partial[w];
  return v;
}

// What the lane that differs in the bits of `step` holds.
template <class S>
__device__ inline S lane_xor(const S& mine, int step) {
  static_assert(sizeof(S) % 4 == 0);
  std::uint32_t words[sizeof(S) / 4];
  std::memcpy(words, &mine, sizeof(S));
#pragma unroll
  for (std::uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, step);
  S other;
  std::memcpy(&other, words, sizeof(S));
  return other;
}

// merge(first, second) over the threads of a row, in a fixed order; every thread gets the result. `shared` is written
// once: it holds kRowWarps.
template <class S, class Merge>
__device__ inline S merge_row(S mine, bool wide, S* shared, Merge&& merge) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const S other = lane_xor(mine, step);
    // Both sides of a pair have to add in the same order.
    mine = (threadIdx.x & step) ? merge(other, mine) : merge(mine, other);
  }
  if (wide) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = mine;
    __syncthreads();
    mine = shared[0];
    for (int w = 1; w < kRowWarps; ++w) mine = merge(mine, shared[w]);
  }
  return mine;
}

}  // namespace fk
