// Elementary functions for the CPU and CUDA kernels, header-only and free of torch.
//
// float on the host: branch-free code (arithmetic, bit casts, comparisons and selects), so the
// compiler turns a plain loop over these calls into SIMD code. Compile with
//   -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast
// and never with -ffast-math: infinities and NaN are part of the contract, and the range
// reductions rely on the written order of operations.
// double, and float on the device: the standard or CUDA functions in the same stable formulas.
//
// The "max ulp" figures are the largest errors that tests/cpp/math_accuracy.cpp finds, in units
// in the last place of the true result, with and without fused multiply-add.
// Polynomial coefficients are minimax fits (Remez exchange) made for this file, rounded to float
// one at a time with the rest refitted. Results below the smallest normal float become 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef FK_HD
#if defined(__CUDACC__)
#define FK_HD __host__ __device__
#else
#define FK_HD
#endif
#endif

#ifndef FK_INLINE
#if defined(__CUDACC__)
#define FK_INLINE FK_HD __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define FK_INLINE FK_HD inline __attribute__((always_inline))
#else
#define FK_INLINE FK_HD inline
#endif
#endif

// On the device a function of its own: for loops that take far longer than a call, and whose copies would be most of a
// kernel's code and of the time that nvcc takes.
#ifndef FK_CALLED
#if defined(__CUDACC__)
#define FK_CALLED FK_HD __noinline__
#else
#define FK_CALLED FK_INLINE
#endif
#endif

namespace fk {
namespace math {

// ---- helpers ----------------------------------------------------------------------------------

FK_INLINE std::uint32_t float_bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

FK_INLINE float bits_float(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

FK_INLINE float abs(float x) { return ::fabsf(x); }
FK_INLINE double abs(double x) { return ::fabs(x); }

FK_INLINE float copysign(float x, float s) { return ::copysignf(x, s); }
FK_INLINE double copysign(double x, double s) { return ::copysign(x, s); }

FK_INLINE bool is_nan(float x) { return x != x; }
FK_INLINE bool is_nan(double x) { return x != x; }

// A NaN in the second argument is returned, a NaN in the first is not: put the data second and
// the bound first.
FK_INLINE float min(float bound, float x) { return bound < x ? bound : x; }
FK_INLINE double min(double bound, double x) { return bound < x ? bound : x; }
FK_INLINE float max(float bound, float x) { return bound > x ? bound : x; }
FK_INLINE double max(double bound, double x) { return bound > x ? bound : x; }

// ---- building blocks of the float versions ----------------------------------------------------

namespace detail {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// ln 2 in two parts; the first has 16 bits, so its product with an exponent is exact.
constexpr float kLn2Hi = 0.693145751953125f;
constexpr float kLn2Lo = 1.42860677e-06f;
constexpr float kLog2E = 1.44269504f;
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
constexpr float kRound = 12582912.0f;

// (e^r - 1 - r) / r^2 on |r| <= ln(2)/2.
FK_INLINE float exp_tail(float r) {
  float q = 1.383937895e-03f;
  q = q * r + 8.367056958e-03f;
  q = q * r + 4.166774452e-02f;
  q = q * r + 1.666653901e-01f;
  q = q * r + 4.999999702e-01f;
  return q;
}

// log(1+f) + add_hi + add_lo for f in [-1/4, 1/2], where the argument of the log1p
// cases below reduces exactly:
// f - f^2/2 + f^3 q(f), the small terms first.
FK_INLINE float log_poly(float f, float add_hi, float add_lo) {
  float q = -4.515838623e-02f;
  q = q * f + 1.047496200e-01f;
  q = q * f + -1.316628456e-01f;
  q = q * f + 1.447839141e-01f;
  q = q * f + -1.664686352e-01f;
  q = q * f + 1.999080032e-01f;
  q = q * f + -2.500010431e-01f;
  q = q * f + 3.333345056e-01f;
  q = q * f + -0.5f;
  return add_hi + (f + (q * (f * f) + add_lo));
}

// log(1+y) for y in [0, 1], without the exponent extraction of log1p.
FK_INLINE float log1p_unit(float y) {
  const bool big = y > 0.5f;
  const float f = big ? 0.5f * y - 0.5f : y;
  return log_poly(f, big ? kLn2Hi : 0.0f, big ? kLn2Lo : 0.0f);
}

// e^(x - dx) for a small correction dx to x: n = round(x / ln 2), e^r by polynomial, then n is
// added to the exponent field, which is right for every normal result. Only for x below the
// overflow threshold; a NaN may come back as any value.
FK_INLINE float exp_unguarded(float x, float dx) {
  const float t = (x - dx) * kLog2E + kRound;
  const float n = t - kRound;
  const float r = (x - n * kLn2Hi) + (-(n * kLn2Lo) - dx);  // nothing added where dx is 0
  const float p = 1.0f + (r + (r * r) * exp_tail(r));
  const float y = bits_float(float_bits(p) + (float_bits(t) << 23));
  return x < -87.3365402f ? 0.0f : y;
}

// scale * (e^x - 1) for x in [-18, 89] and scale = 2^shift, so that e^x may pass the largest
// float. 2^n e^r - 1 is summed as (2^n a - (1 - 2^n)) - 2^n w: a is the exactly reduced argument
// and w holds all that is small, so the first bracket is exact where it cancels (n = 1). The
// signs are chosen to keep -0.
FK_INLINE float expm1_scaled(float x, int shift) {
  const float scale = bits_float(static_cast<std::uint32_t>(127 + shift) << 23);
  const float t = x * kLog2E + kRound;
  const float n = t - kRound;
  const float a = x - n * kLn2Hi;
  const float lo = n * kLn2Lo;
  const float r = a - lo;
  const float w = lo - (r * r) * exp_tail(r);
  const float s = bits_float((float_bits(t) << 23) + float_bits(scale));
  return (s * a - (scale - s)) - s * w;
}

// log(x) for x in (0, infinity): x = 2^e (1 + f) with 1 + f in [3/4, 3/2).
// The exponent of a subnormal is read after scaling it up.
FK_INLINE float log_normal(float x, float e0) {
  const std::uint32_t k = float_bits(x) - 0x3f400000u;
  const float e = static_cast<float>(static_cast<std::int32_t>(k) >> 23) + e0;
  const float f = bits_float(float_bits(x) - (k & 0xff800000u)) - 1.0f;
  return log_poly(f, e * kLn2Hi, e * kLn2Lo);
}

}  // namespace detail

// ---- float ------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__)

// e^x: see exp_unguarded; the last select gives infinity above the threshold and keeps NaN.
// Results below 2^-126 become 0. Max 1.1 ulp.
FK_INLINE float exp(float x) {
  const float y = detail::exp_unguarded(x, 0.0f);
  return x <= 88.7228317f ? y : x + detail::kInf;
}

// e^x - 1: see expm1_scaled; computed at half scale because e^x itself may overflow first.
// Max 1.3 ulp.
FK_INLINE float expm1(float x) {
  const float c = min(89.0f, max(-18.0f, x));
  return 2.0f * detail::expm1_scaled(c, -1);
}

// log(x): see log_normal. Max 1.0 ulp, subnormals included.
FK_INLINE float log(float x) {
  const bool tiny = x < std::numeric_limits<float>::min();
  float y = detail::log_normal(tiny ? x * 8388608.0f : x, tiny ? -23.0f : 0.0f);
  y = x > 0.0f ? y : (x == 0.0f ? -detail::kInf : detail::kNaN);
  return x < detail::kInf ? y : x;
}

// log(1 + x): the exponent e comes from the rounded sum u = 1 + x, but f = x 2^-e + (2^-e - 1)
// from x itself, so nothing rounded away in u is lost. The factor 2^(2-e) keeps the scale normal
// up to e = 128. Where u = 1 the answer is x (also for -0 and subnormals). Max 1.0 ulp.
FK_INLINE float log1p(float x) {
  const float u = 1.0f + x;
  const std::uint32_t k = float_bits(u) - 0x3f400000u;
  const float e = static_cast<float>(static_cast<std::int32_t>(k) >> 23);
  const float s = bits_float(0x40800000u - (k & 0xff800000u));
  const float f = (0.25f * x) * s + (0.25f * s - 1.0f);
  float y = detail::log_poly(f, e * detail::kLn2Hi, e * detail::kLn2Lo);
  y = u > 0.0f ? y : (u == 0.0f ? -detail::kInf : detail::kNaN);
  y = u == 1.0f ? x : y;
  return x < detail::kInf ? y : x;
}

// 1 / (1 + y) or y / (1 + y) with y = e^-|x|. What 1 + y and the quotient round off is known exactly, and is divided by
// 1 + y to within five percent, which is enough to give it back. Max 1.9 ulp, 1.5 with fused multiply-add.
FK_INLINE float sigmoid(float x) {
  const float y = detail::exp_unguarded(-abs(x), 0.0f);
  const float d = 1.0f + y, lost = y - (d - 1.0f), n = x < 0.0f ? y : 1.0f;
  const float q = n / d;
  const float r = q + ((n - q * d) - q * lost) * (1.457f - 0.5f * d);
  return x == x ? r : x;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): the exponential never overflows, the tail is e^x
// below and x above. A NaN comes through the max. Max 1.8 ulp.
FK_INLINE float softplus(float x) {
  const float y = detail::exp_unguarded(-abs(x), 0.0f);
  return max(0.0f, x) + detail::log1p_unit(y);
}

// log(sigmoid(x)) = -softplus(-x). Max 1.8 ulp.
FK_INLINE float log_sigmoid(float x) {
  const float y = detail::exp_unguarded(-abs(x), 0.0f);
  return min(0.0f, x) - detail::log1p_unit(y);
}

// tanh(|x|) = |d / (d + 2)| with d = e^(+-2|x|) - 1, cut off at |x| = 10 where it is 1 in float.
// The minus sign, for small |x|, keeps d + 2 below 2, where it is rounded more finely; above, the
// plus sign gives the more accurate d. Max 2.0 ulp.
FK_INLINE float tanh(float x) {
  const float a = min(20.0f, 2.0f * abs(x));
  const std::uint32_t sign = a < 0.34f ? 0x80000000u : 0u;
  const float d = detail::expm1_scaled(bits_float(float_bits(a) ^ sign), 0);
  return copysign(d / (d + 2.0f), x);
}

// atan(a) = a + a^3 P(a^2) on [0, 1], pi/2 - atan(1/a) above. Max 2.1 ulp.
FK_INLINE float atan(float x) {
  const float a = abs(x);
  const bool big = a > 1.0f;
  const float b = big ? 1.0f / a : a;
  const float z = b * b;
  float p = 2.919387305e-03f;
  p = p * z + -1.636309363e-02f;
  p = p * z + 4.320463166e-02f;
  p = p * z + -7.551655918e-02f;
  p = p * z + 1.066576838e-01f;
  p = p * z + -1.421100199e-01f;
  p = p * z + 1.999376714e-01f;
  p = p * z + -3.333315253e-01f;
  const float y = b + (b * z) * p;
  return copysign(big ? 1.57079633f - y : y, x);
}

// erf(x) = x + x P(x^2) for |x| <= 0.9, 1 - e^(-|x| Q(|x|)) above; 1 in float from |x| = 4.
// Max 1.2 ulp.
FK_INLINE float erf(float x) {
  const float a = abs(x);
  const float z = x * x;
  float p = -6.020799628e-04f;
  p = p * z + 4.998959135e-03f;
  p = p * z + -2.677049302e-02f;
  p = p * z + 1.128192171e-01f;
  p = p * z + -3.761250377e-01f;
  p = p * z + 1.283791512e-01f;
  const float c = min(4.0f, a);
  float q = -2.146065526e-04f;
  q = q * c + 3.220088780e-03f;
  q = q * c + -2.290644310e-02f;
  q = q * c + 1.052875593e-01f;
  q = q * c + 6.356987953e-01f;
  q = q * c + 1.128520131e+00f;
  const float tail = 1.0f - detail::exp_unguarded(-(c * q), 0.0f);
  return a > 0.9f ? copysign(tail, x) : x + x * p;
}

// Standard normal distribution function: Phi(-a) = e^(-a^2/2) / (sqrt(2 pi) a + P(a) / N(a)), and
// 1 - Phi(-a) on the other side. P/N falls from 2 to about sqrt(2 pi) / a, so its rounding errors
// matter less and less, and with positive coefficients nothing cancels. a^2/2 is
// h^2/2 + (a-h)(a+h)/2 with h the upper 12 bits of a: the first part is exact and the tail keeps
// its relative accuracy. Max 3.5 ulp (4.1 without FMA) for x > -12; 0 where the result
// is subnormal.
FK_INLINE float normal_cdf(float x) {
  const float a = min(15.0f, abs(x));
  const float h = bits_float(float_bits(a) & 0xfffff000u);
  const float e = detail::exp_unguarded(-0.5f * (h * h), (0.5f * (a - h)) * (a + h));
  float p = 5.222180393e-03f;
  p = p * a + 6.276003271e-02f;
  p = p * a + 3.508100510e-01f;
  p = p * a + 1.065303206e+00f;
  p = p * a + 1.7f;
  float n = 2.083112486e-03f;
  n = n * a + 2.504916117e-02f;
  n = n * a + 1.438734680e-01f;
  n = n * a + 4.781666994e-01f;
  n = n * a + 9.197667837e-01f;
  n = n * a + 0.85f;
  const float y = e * (n / ((2.50662827f * a) * n + p));
  return x > 0.0f ? 1.0f - y : y;
}

#else  // on the device: the CUDA functions, which are as accurate, in the same formulas

FK_INLINE float exp(float x) { return ::expf(x); }
FK_INLINE float expm1(float x) { return ::expm1f(x); }
FK_INLINE float log(float x) { return ::logf(x); }
FK_INLINE float log1p(float x) { return ::log1pf(x); }
FK_INLINE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FK_INLINE float softplus(float x) { return max(0.0f, x) + ::log1pf(::expf(-abs(x))); }
FK_INLINE float log_sigmoid(float x) { return min(0.0f, x) - ::log1pf(::expf(-abs(x))); }
FK_INLINE float tanh(float x) { return ::tanhf(x); }
FK_INLINE float atan(float x) { return ::atanf(x); }
FK_INLINE float erf(float x) { return ::erff(x); }
FK_INLINE float normal_cdf(float x) { return ::normcdff(x); }

#endif

// ---- double -----------------------------------------------------------------------------------

FK_INLINE double exp(double x) { return ::exp(x); }
FK_INLINE double expm1(double x) { return ::expm1(x); }
FK_INLINE double log(double x) { return ::log(x); }
FK_INLINE double log1p(double x) { return ::log1p(x); }
FK_INLINE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FK_INLINE double softplus(double x) { return max(0.0, x) + ::log1p(::exp(-abs(x))); }
FK_INLINE double log_sigmoid(double x) { return min(0.0, x) - ::log1p(::exp(-abs(x))); }
FK_INLINE double tanh(double x) { return ::tanh(x); }
FK_INLINE double atan(double x) { return ::atan(x); }
FK_INLINE double erf(double x) { return ::erf(x); }
FK_INLINE double normal_cdf(double x) {
#if defined(__CUDA_ARCH__)
  return ::normcdf(x);
#else
  return 0.5 * ::erfc(x * -0.70710678118654752440);
#endif
}

}  // namespace math
}  // namespace fk
