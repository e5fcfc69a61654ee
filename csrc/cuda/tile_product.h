// Products in tiles of 64 x 64 outputs, a tile to a thread block: the operands come through shared memory, sums run
// over the depth in one order, so that the same input gives the same bits.
#pragma once
#include <algorithm>

#include "cuda/tensor_cores.h"

namespace fk {

inline constexpr int kTile = 64, kProductThreads = 128;
// Depth of one step. Its operands wait in registers while the step before is multiplied.
template <class S>
inline constexpr int kStep = sizeof(S) == 2 ? 32 : 16;
// Blocks on one multiprocessor: it bounds the registers. With four, what waits of two half operands would spill.
template <class S>
inline constexpr int kResident = sizeof(S) == 4 ? 4 : 3;

// element(o, k) of an operand: o counts rows or columns of the result, k the depth of the product; there are those with
// first[o] <= k < last[o]. A null order: as it is. Null bounds: all of them.
template <class S>
struct Operand {
  const S* data;
  const int64_t *outer, *inner;
  int64_t outer_stride, inner_stride, count;
  const int64_t *first = nullptr, *last = nullptr;
};

// What one tile has to know of an operand's o, looked up once.
struct TileRows {
  int64_t first[kTile], last[kTile], offset[kTile];

  template <class S>
  __device__ void look_up(const Operand<S>& from, int64_t o0, int64_t end) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile; i += kProductThreads) {
      const int64_t o = o0 + i;
      const bool exists = o < from.count;
      const int64_t last_k = exists && from.last ? from.last[o] : end;
      first[i] = exists && from.first ? from.first[o] : 0;
      last[i] = !exists ? 0 : last_k < end ? last_k : end;
      offset[i] = exists ? (from.outer ? from.outer[o] : o) * from.outer_stride : 0;
    }
  }
};

// An operand in shared memory, along the dimension along which neighbouring threads read it.
template <class S, bool DepthFast>
struct SharedTile {
  // Rows end with a gap, so that what a warp reads at once lies in different banks.
  static constexpr int kGap = kUnits<S> == Units::ordinary ? 1 : kUnits<S> == Units::tf32 && DepthFast ? 4 : 8;
  static constexpr int kStride = (DepthFast ? kStep<S> : kTile) + kGap;
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

  static __device__ void fetch(S (&to)[kPerThread], const Operand<S>& from, const TileRows& rows, int64_t k0,
                               int64_t end) {
    auto along_depth = [&](int64_t k) { return (from.inner ? from.inner[k] : k) * from.inner_stride; };
    if constexpr (DepthFast) {  // a thread has one k and many o, otherwise the reverse
      const int64_t k = k0 + depth_of(0), at = k < end ? along_depth(k) : 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int o = outer_of(i);
        to[i] = k >= rows.first[o] && k < rows.last[o] ? from.data[rows.offset[o] + at] : S(0);
      }
    } else {
      const int o = outer_of(0);
      const int64_t first = rows.first[o], last = rows.last[o], offset = rows.offset[o];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t k = k0 + depth_of(i);
        to[i] = k >= first && k < last ? from.data[offset + along_depth(k)] : S(0);
      }
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

template <class S, class T, bool AFast, bool BFast, Units = kUnits<S>>
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

// Four warps, each with 32 x 32 of the result.
struct Quarter {
  static __device__ int row0() { return static_cast<int>(threadIdx.x) / kWarp / 2 * 32; }
  static __device__ int column0() { return static_cast<int>(threadIdx.x) / kWarp % 2 * 32; }
};

template <class S, class T, bool AFast, bool BFast>
struct Sums<S, T, AFast, BFast, Units::tf32> : Quarter {
  float sum[2][4][4] = {};

  __device__ void add(const SharedTile<S, AFast>& a, const SharedTile<S, BFast>& b) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, group = lane / 4, in_group = lane % 4;
#pragma unroll 1  // two steps at once would spill
    for (int k = in_group; k < kStep<S>; k += 8) {
      Tf32Operand<2> y[4][1];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) y[j][0].set(e, b.at(column0() + 8 * j + group, k + 4 * e));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Tf32Operand<4> x[1];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[0].set(e, a.at(row0() + 16 * i + group + e % 2 * 8, k + e / 2 * 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add(sum[i][j], x, y[j]);
      }
    }
  }
  __device__ void store(T* result) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    T* to = result + (row0() + lane / 4) * kResultStride<T> + column0() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) to[(16 * i + e / 2 * 8) * kResultStride<T> + 8 * j + e % 2] = sum[i][j][e];
  }
};

template <class S, class T, bool AFast, bool BFast>
struct Sums<S, T, AFast, BFast, Units::halves> : Quarter {
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

// Shared memory for both operands of a step, and afterwards for the result.
template <class S, class T, bool AFast, bool BFast>
inline constexpr size_t kProductBytes = std::max(
    (SharedTile<S, AFast>::kSize + SharedTile<S, BFast>::kSize) * sizeof(S), kTile* kResultStride<T> * sizeof(T));

// sums += a[i0 + i][k] b[j0 + j][k] over the depth [begin, end). Returns the sum of a's row i0 + i to thread i if asked
// for.
template <bool AFast, bool BFast, class S, class T>
__device__ T add_products(Sums<S, T, AFast, BFast>& sums, S* memory, const Operand<S>& from_a, const Operand<S>& from_b,
                          int64_t i0, int64_t j0, int64_t begin, int64_t end, bool with_row_sums) {
  using ATile = SharedTile<S, AFast>;
  using BTile = SharedTile<S, BFast>;
  static_assert(ATile::kSize * sizeof(S) % 32 == 0, "tensor cores read 32 bytes at a time");
  __shared__ TileRows a_rows, b_rows;
  const ATile a{memory};
  const BTile b{memory + ATile::kSize};
  const int thread = static_cast<int>(threadIdx.x);
  T row_sum = T(0);
  S a_next[ATile::kPerThread], b_next[BTile::kPerThread];
  a_rows.look_up(from_a, i0, end);
  b_rows.look_up(from_b, j0, end);
  __syncthreads();
  if (begin < end) {
    ATile::fetch(a_next, from_a, a_rows, begin, end);
    BTile::fetch(b_next, from_b, b_rows, begin, end);
  }
  for (int64_t k0 = begin; k0 < end; k0 += kStep<S>) {
    a.put(a_next);
    b.put(b_next);
    __syncthreads();
    if (k0 + kStep<S> < end) {
      ATile::fetch(a_next, from_a, a_rows, k0 + kStep<S>, end);
      BTile::fetch(b_next, from_b, b_rows, k0 + kStep<S>, end);
    }
    if (with_row_sums && thread < kTile) {
      T part = T(0);
#pragma unroll
      for (int k = 0; k < kStep<S>; ++k) part += static_cast<T>(a.at(thread, k));
      row_sum += part;
    }
    sums.add(a, b);
    __syncthreads();
  }
  return row_sum;
}

}  // namespace fk
