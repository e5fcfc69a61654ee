// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): the random
// streams of every backend, host and device alike, and what uniform, normal and Gumbel noise make of its
// words.
//
//   key     = the 64-bit seed
//   counter = (block low, block high, stream low, stream high) with block = element / 4
//   word    = element mod 4 of the four that come out
//
// So the noise of an element depends on nothing but (seed, stream, element): no state, no order, no thread.
// flowkernels/random.py says the same in torch's integer arithmetic.
#pragma once
#include "common/math.h"

namespace fk {

struct RandomStream {
  std::uint64_t seed = 0, stream = 0;
};

enum class Noise : int { bits, uniform, normal, gumbel, count };

namespace philox {

inline constexpr std::uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;
inline constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// The four words of one block.
FK_INLINE void block(RandomStream s, std::uint64_t number, std::uint32_t (&words)[4]) {
  std::uint32_t c0 = static_cast<std::uint32_t>(number), c1 = static_cast<std::uint32_t>(number >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(s.stream), c3 = static_cast<std::uint32_t>(s.stream >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(s.seed), k1 = static_cast<std::uint32_t>(s.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kMultiply0) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(kMultiply1) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace philox

// v = (word + 1/2) 2^-32 in (0, 1). A float has no room for the last values below 1: they become the largest
// one, so that log(1 - v) stays finite. Small v, which make the upper tail of the Gumbel noise, keep their
// full relative precision.
FK_INLINE float uniform_of_word(std::uint32_t word, float) {
  return math::min(0.99999994f, (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f);
}
FK_INLINE double uniform_of_word(std::uint32_t word, double) {
  return (static_cast<double>(word) + 0.5) * 2.3283064365386963e-10;
}

// In [0, 1), from the 53 first bits of two words: steps so fine that what is rare by 2^-40 is met as often.
FK_INLINE double uniform_of_words(std::uint32_t high, std::uint32_t low) {
  return math::min(1 - 0x1p-53, (static_cast<double>(high) * 0x1p32 + static_cast<double>(low)) * 0x1p-64);
}

// g = -log E with E = -log(1 - v), exponentially distributed.
FK_INLINE float gumbel_of_word(std::uint32_t word, float) {
  const float v = uniform_of_word(word, 0.0f);
#if defined(__CUDA_ARCH__)
  return -math::log(-math::log1p(-v));
#else
  // log1p(-v) of math.h without its guards: 1 - v = 2^e (1 + f) lies in [2^-24, 1) or rounds to 1, where f =
  // -v.
  const std::uint32_t k = math::float_bits(1.0f - v) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<std::int32_t>(k) >> 23);
  const float s = math::bits_float(0x3f800000u - (k & 0xff800000u));
  const float f = (s - 1.0f) - v * s;
  return -math::detail::log_normal(-math::detail::log_poly(f, e * math::detail::kLn2Hi, e * math::detail::kLn2Lo),
                                   0.0f);
#endif
}
FK_INLINE double gumbel_of_word(std::uint32_t word, double) {
  return -math::log(-math::log1p(-uniform_of_word(word, 0.0)));
}

// Box and Muller: two words give two independent normals, r cos and r sin of an angle of 2 pi w1 / 2^32 with
// r = sqrt(-2 log v0).
template <class T>
struct NormalPair {
  T first, second;
};

FK_INLINE NormalPair<double> normals_of_words(std::uint32_t w0, std::uint32_t w1, double) {
  const double r = ::sqrt(-2.0 * math::log(uniform_of_word(w0, 0.0)));
  const double angle = static_cast<double>(w1) * 1.4629180792671596e-09;
  return {r * ::cos(angle), r * ::sin(angle)};
}
FK_INLINE NormalPair<float> normals_of_words(std::uint32_t w0, std::uint32_t w1, float) {
#if defined(__CUDA_ARCH__)
  const float r = ::sqrtf(-2.0f * math::log(uniform_of_word(w0, 0.0f)));
#else
  const float r = ::sqrtf(-2.0f * math::detail::log_normal(uniform_of_word(w0, 0.0f), 0.0f));
#endif
  // The angle is reduced in integers, so exactly: the nearest quarter turn and a rest within an eighth of a
  // turn.
  const std::uint32_t quarter = (w1 + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<std::int32_t>(w1 - (quarter << 30))) * 1.46291808e-09f;
  const float z = x * x;
  // Taylor series: on |x| <= pi/4 what is left out is below half an ulp.
  const float sine =
      x + x * z * (-1.66666667e-01f + z * (8.33333333e-03f + z * (-1.98412698e-04f + z * 2.75573192e-06f)));
  const float cosine =
      1.0f + z * (-0.5f + z * (4.16666667e-02f + z * (-1.38888889e-03f + z * (2.48015873e-05f - z * 2.75573192e-07f))));
  const bool odd = (quarter & 1u) != 0u;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  const float sign_c = ((quarter + 1u) & 2u) != 0u ? -1.0f : 1.0f, sign_s = (quarter & 2u) != 0u ? -1.0f : 1.0f;
  return {r * (sign_c * c), r * (sign_s * s)};
}

}  // namespace fk
