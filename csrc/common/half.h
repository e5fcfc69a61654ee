// bfloat16 and float16 as they lie in memory, and their conversions to and from float: round to nearest, ties
// to even, branch-free so that loops over them vectorise on every instruction set.
#pragma once
#include <type_traits>

#include "common/math.h"

namespace fk {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

FK_INLINE float to_compute(float v) { return v; }
FK_INLINE double to_compute(double v) { return v; }
FK_INLINE float to_compute(bfloat16 v) { return math::bits_float(std::uint32_t{v.bits} << 16); }

FK_INLINE float to_compute(float16 v) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  const std::uint32_t magnitude = std::uint32_t{v.bits} & 0x7fffu, sign = (std::uint32_t{v.bits} & 0x8000u) << 16;
  // The fields moved into place are the value times 2^-112; multiplying also normalises the subnormals.
  const std::uint32_t finite = math::float_bits(math::bits_float(magnitude << 13) * math::bits_float(0x77800000u));
#if defined(FK_HOST_SHIM)
  if (magnitude > 0x7c00u) return math::bits_float(0x7fffffffu);  // a device's one NaN
#endif
  return math::bits_float(sign | (magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite));
#endif
}

template <class S, class T>
FK_INLINE S from_compute(T v) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    const std::uint32_t u = math::float_bits(v);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded)};
  } else if constexpr (std::is_same_v<S, float16>) {
    const std::uint32_t u = math::float_bits(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose last place is float16's smallest subnormal, lets the addition do the rounding.
    const std::uint32_t subnormal = math::float_bits(math::bits_float(magnitude) + 0.5f) - 0x3f000000u;
    std::uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x47800000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return {static_cast<std::uint16_t>(sign | h)};
  } else {
    return static_cast<S>(v);
  }
}

}  // namespace fk
