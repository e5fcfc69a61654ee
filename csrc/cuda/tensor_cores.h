// Matrix products on tensor cores: what they take of each type, and float32 products that are as good as float32's own.
#pragma once
#if !defined(FK_HOST_SHIM)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/launch.h"

namespace fk {

// Where elements of type S are multiplied: halves as they are, with sums in float32; float32 in the three products
// below; float64 in the ordinary units.
enum class Units { ordinary, halves, tf32 };
template <class S>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr Units kUnits = Units::ordinary;  // tensor cores that know neither bfloat16 nor tf32
#else
inline constexpr Units kUnits = sizeof(S) == 2   ? Units::halves
                                : sizeof(S) == 4 ? Units::tf32
                                                 : Units::ordinary;
#endif

#if defined(FK_HOST_SHIM)
template <class S>
using Native = S;
#else
template <class S>
using Native = std::conditional_t<std::is_same_v<S, torch::headeronly::Half>, __half, __nv_bfloat16>;
#endif

// A warp's sum += a b for a of 16 x 8 and b of 8 x 8. Lane 4 g + t holds
//   a: [g][t], [g + 8][t], [g][t + 4], [g + 8][t + 4]     b: [t][g], [t + 4][g]
//   sum: [g][2 t], [g][2 t + 1], [g + 8][2 t], [g + 8][2 t + 1].
// The warp has to be together when it comes here.
__device__ inline void mma_tf32(float (&sum)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if defined(FK_HOST_SHIM)
  host_shim::mma_tf32(sum, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// An operand's part in one step. Of a float, tensor cores read the first 11 of its 24 significant bits (tf32) and
// ignore the other 13, which the device's own conversion does not clear either. Two such numbers hold all bits but the
// last, now and then: v = high + low. What is NaN stays NaN, in `low` if not in `high`; an infinity becomes NaN.
template <int N>
struct Tf32Operand {
  std::uint32_t high[N], low[N];

  __device__ void set(int i, float v) {
    high[i] = (math::float_bits(v) + 0x1000u) & 0xffffe000u;
    low[i] = math::float_bits(v - math::bits_float(high[i]));
  }
  // Of what was half a float: all its bits are high ones. Rounded, a NaN, which a device gives all bits, would be zero.
  __device__ void set_whole(int i, float v) { high[i] = math::float_bits(v); }
};

// sum += the products of some steps, with an error like that of float32: three of the four products of the parts, the
// small ones first; the fourth would be below float32's last place, and two are enough where `a` was half a float
// before, `Whole`. Tensor cores cut off where float32 rounds, which adds up over a long sum, so the steps' own sum is
// added outside them (Ootomo and Yokota 2022, arXiv:2203.03341).
template <bool Whole = false, int Steps>
__device__ inline void multiply_add(float (&sum)[4], const Tf32Operand<4> (&a)[Steps],
                                    const Tf32Operand<2> (&b)[Steps]) {
  float steps[4] = {};
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
    if constexpr (!Whole) mma_tf32(steps, a[i].low, b[i].high);
    mma_tf32(steps, a[i].high, b[i].low);
  }
#pragma unroll
  for (int i = 0; i < Steps; ++i) mma_tf32(steps, a[i].high, b[i].high);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += steps[i];
}

}  // namespace fk
