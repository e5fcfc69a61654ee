// Compiles one file of kernels several times, once per instruction set, and picks the best at run time.
//
// A source file says
//     #define FK_KERNELS "cpu/affine_coupling_kernels.h"
//     #include "cpu/foreach_isa.h"
// and the kernels file puts its code into namespace fk::FK_ISA. Then FK_BEST(f)(args...) calls fk::avx512::f,
// fk::avx2::f or fk::baseline::f. The kernels file must include nothing: everything it needs is included here or
// before, outside the target pragmas, so that no inline function of a standard header is compiled for the wrong
// machine.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/elementwise.h"
#include "cpu/isa.h"

#if defined(__clang__)
#define FK_TARGET_PUSH(features) \
  _Pragma(FK_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define FK_TARGET_POP _Pragma("clang attribute pop")
#else
#define FK_TARGET_PUSH(features) _Pragma("GCC push_options") _Pragma(FK_STRING(GCC target(features)))
#define FK_TARGET_POP _Pragma("GCC pop_options")
#endif
#define FK_STRING(...) #__VA_ARGS__

#define FK_ISA baseline
#define FK_VECTOR_BYTES 16
#include FK_KERNELS
#undef FK_ISA
#undef FK_VECTOR_BYTES

#if defined(__x86_64__)
FK_TARGET_PUSH("avx2,fma,bmi2")
#define FK_ISA avx2
#define FK_VECTOR_BYTES 32
#include FK_KERNELS
#undef FK_ISA
#undef FK_VECTOR_BYTES
FK_TARGET_POP

FK_TARGET_PUSH("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi2,prefer-vector-width=512")
#define FK_ISA avx512
#define FK_VECTOR_BYTES 64
#include FK_KERNELS
#undef FK_ISA
#undef FK_VECTOR_BYTES
FK_TARGET_POP

#define FK_BEST(...)                                                        \
  (::fk::isa_level() == ::fk::IsaLevel::avx512 ? &::fk::avx512::__VA_ARGS__ \
   : ::fk::isa_level() == ::fk::IsaLevel::avx2 ? &::fk::avx2::__VA_ARGS__   \
                                               : &::fk::baseline::__VA_ARGS__)
#else
#define FK_BEST(...) (&::fk::baseline::__VA_ARGS__)
#endif
