// Loops over a fixed number of lanes, and rows that lie apart.
#pragma once
#include <cstdint>

#include "common/math.h"

// Rows of lanes are reached by a pointer taken before the loop, row = data + k * Lanes: with an index k * Lanes + i
// inside, GCC loads one number at a time (rq_spline, K = 8: 59 ns per element, 25 with pointers).
//
// Before such a loop: without it the compiler unrolls short loops first, and then finds nothing to vectorise in some of
// them (rq_spline, K = 8: 490 ns per 16 elements without, 350 with).
#if defined(__CUDACC__)
#define FK_SIMD
#else
#define FK_SIMD _Pragma("omp simd")
#endif

namespace fk {

// Element k of what is meant lies at data[k * stride]; used as a pointer.
template <class T>
struct Strided {
  T* data;
  std::int64_t stride;
  FK_INLINE T& operator[](std::int64_t k) const { return data[k * stride]; }
  FK_INLINE Strided operator+(std::int64_t k) const { return {data + k * stride, stride}; }
};

}  // namespace fk
