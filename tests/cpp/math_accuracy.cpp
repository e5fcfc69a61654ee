// Accuracy check of csrc/common/math.h; stand-alone, no torch.
//
//   g++ -std=c++17 -O3 -mavx512f -mavx512vl -mavx512dq -mavx512bw -fno-math-errno
//       -fno-trapping-math -ffp-contract=fast -I csrc tests/cpp/math_accuracy.cpp -o math_accuracy
//   ./math_accuracy          errors in ulp over the whole float range, special values; exit 1 on
//                            a bound exceeded
//   ./math_accuracy 7        the same with every 7th bit pattern instead of every 97th
//   ./math_accuracy 1 tanh   every float, for one function
//   ./math_accuracy time     nanoseconds per element of each function's loop
//
// Add -fopt-info-vec to see that each loop_* function below is vectorised ("loop vectorized using
// 64 byte vectors"); repeat with "-mavx2 -mfma" (32) and with neither (16).
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "common/math.h"

namespace {

using Loop = void (*)(const float*, float*, int);
using Reference = long double (*)(long double);

#define FK_LOOP(name)                                                                                          \
  __attribute__((noinline)) void loop_##name(const float* __restrict__ x, float* __restrict__ y, int blocks) { \
    for (int b = 0; b < blocks; ++b, x += 16, y += 16)                                                         \
      for (int i = 0; i < 16; ++i) y[i] = fk::math::name(x[i]);                                                \
  }

FK_LOOP(exp)
FK_LOOP(expm1)
FK_LOOP(log)
FK_LOOP(log1p)
FK_LOOP(sigmoid)
FK_LOOP(softplus)
FK_LOOP(log_sigmoid)
FK_LOOP(tanh)
FK_LOOP(atan)
FK_LOOP(erf)
FK_LOOP(normal_cdf)

long double ref_sigmoid(long double x) { return 1.0L / (1.0L + std::exp(-x)); }
long double ref_softplus(long double x) { return (x > 0 ? x : 0.0L) + std::log1p(std::exp(-std::fabs(x))); }
long double ref_log_sigmoid(long double x) { return -ref_softplus(-x); }
long double ref_normal_cdf(long double x) { return 0.5L * std::erfc(x * -0.707106781186547524400844362104849L); }

struct Case {
  const char* name;
  Loop loop;
  Reference reference;
  double bound;   // ulp
  double lowest;  // smallest x tested for accuracy
  bool absolute;  // error relative to max(|result|, 1)
};

// Without fused multiply-add the normal distribution function rounds three more times.
#if defined(__FMA__)
constexpr double kNormalCdfBound = 4.0;
#else
constexpr double kNormalCdfBound = 4.5;
#endif

const Case kCases[] = {
    {"exp", loop_exp, [](long double x) { return std::exp(x); }, 1.5, -1e39, false},
    {"expm1", loop_expm1, [](long double x) { return std::expm1(x); }, 1.5, -1e39, false},
    {"log", loop_log, [](long double x) { return std::log(x); }, 1.5, -1e39, false},
    {"log1p", loop_log1p, [](long double x) { return std::log1p(x); }, 1.5, -1e39, false},
    {"sigmoid", loop_sigmoid, ref_sigmoid, 2.0, -1e39, false},
    {"softplus", loop_softplus, ref_softplus, 2.5, -1e39, false},
    {"log_sigmoid", loop_log_sigmoid, ref_log_sigmoid, 2.5, -1e39, false},
    {"tanh", loop_tanh, [](long double x) { return std::tanh(x); }, 2.5, -1e39, false},
    {"atan", loop_atan, [](long double x) { return std::atan(x); }, 2.5, -1e39, false},
    {"erf", loop_erf, [](long double x) { return std::erf(x); }, 3.0, -1e39, false},
    {"normal_cdf", loop_normal_cdf, ref_normal_cdf, kNormalCdfBound, -12.0, false},
};

const float kInf = std::numeric_limits<float>::infinity();
const float kNaN = std::numeric_limits<float>::quiet_NaN();
const float kMinNormal = std::numeric_limits<float>::min();

bool same(float got, float want) {
  if (std::isnan(want)) return std::isnan(got);
  return got == want && std::signbit(got) == std::signbit(want);
}

// Error of `got` in ulp; infinity where one of them is not finite and the other is.
double ulp_error(float got, long double want, bool absolute) {
  const float rounded = static_cast<float>(want);
  if (std::isnan(rounded) || std::isnan(got)) return std::isnan(rounded) && std::isnan(got) ? 0.0 : 1e30;
  if (std::isinf(rounded) || std::isinf(got)) return rounded == got ? 0.0 : 1e30;
  long double size = std::fabs(want);
  // A subnormal result may be 0.
  if (size < kMinNormal && got == 0.0f) return 0.0;
  if (absolute && size < 1.0L) size = 1.0L;
  int exponent = 0;
  std::frexp(size, &exponent);
  if (exponent < -125) exponent = -125;
  return static_cast<double>(std::fabs(got - want) / std::ldexp(1.0L, exponent - 24));
}

float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Every `stride`-th bit pattern of both signs, NaN patterns included, in blocks of 16.
bool check_accuracy(const Case& c, std::uint32_t stride) {
  constexpr int kBlocks = 64;
  std::vector<float> x(kBlocks * 16), y(kBlocks * 16);
  double worst = 0.0;
  float worst_x = 0.0f;
  std::uint64_t bits = 0;
  while (bits <= 0xffffffffull) {
    for (float& v : x) {
      v = from_bits(static_cast<std::uint32_t>(bits <= 0xffffffffull ? bits : 0));
      // Far arguments cost the reference most of the time and are all alike: go faster there.
      const float a = std::fabs(v);
      bits += (a > 200.0f || a < 1e-9f) ? 16ull * stride : stride;
    }
    c.loop(x.data(), y.data(), kBlocks);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (x[i] < c.lowest) continue;
      const double error = ulp_error(y[i], c.reference(x[i]), c.absolute);
      if (error > worst) {
        worst = error;
        worst_x = x[i];
      }
    }
  }
  const bool ok = worst <= c.bound;
  std::printf("%-13s max %8.3f ulp at x = %-16.9g bound %.1f  %s\n", c.name, worst, worst_x, c.bound,
              ok ? "ok" : "TOO LARGE");
  return ok;
}

struct Special {
  const char* name;
  float x, want;
};

bool check_specials() {
  const Special specials[] = {
      {"exp", -kInf, 0.0f},
      {"exp", kInf, kInf},
      {"exp", 89.0f, kInf},
      {"exp", 0.0f, 1.0f},
      {"exp", -0.0f, 1.0f},
      {"exp", 1e38f, kInf},
      {"exp", -1e38f, 0.0f},
      {"exp", 88.7228394f, kInf},
      {"expm1", -kInf, -1.0f},
      {"expm1", kInf, kInf},
      {"expm1", 0.0f, 0.0f},
      {"expm1", -0.0f, -0.0f},
      {"expm1", 89.0f, kInf},
      {"expm1", -1e38f, -1.0f},
      {"log", 0.0f, -kInf},
      {"log", -0.0f, -kInf},
      {"log", -1.0f, kNaN},
      {"log", kInf, kInf},
      {"log", -kInf, kNaN},
      {"log", 1.0f, 0.0f},
      {"log", -1e-45f, kNaN},
      {"log1p", -1.0f, -kInf},
      {"log1p", -1.5f, kNaN},
      {"log1p", kInf, kInf},
      {"log1p", -kInf, kNaN},
      {"log1p", 0.0f, 0.0f},
      {"log1p", -0.0f, -0.0f},
      {"log1p", 1e-45f, 1e-45f},
      {"sigmoid", -kInf, 0.0f},
      {"sigmoid", kInf, 1.0f},
      {"sigmoid", 0.0f, 0.5f},
      {"softplus", -kInf, 0.0f},
      {"softplus", kInf, kInf},
      {"softplus", 50.0f, 50.0f},
      {"softplus", 3e38f, 3e38f},
      {"log_sigmoid", -kInf, -kInf},
      {"log_sigmoid", kInf, 0.0f},
      {"log_sigmoid", -50.0f, -50.0f},
      {"log_sigmoid", -3e38f, -3e38f},
      {"tanh", -kInf, -1.0f},
      {"tanh", kInf, 1.0f},
      {"tanh", 0.0f, 0.0f},
      {"tanh", -0.0f, -0.0f},
      {"atan", -kInf, -1.57079633f},
      {"atan", kInf, 1.57079633f},
      {"atan", -0.0f, -0.0f},
      {"erf", -kInf, -1.0f},
      {"erf", kInf, 1.0f},
      {"erf", -0.0f, -0.0f},
      {"erf", 5.0f, 1.0f},
      {"normal_cdf", -kInf, 0.0f},
      {"normal_cdf", kInf, 1.0f},
      {"normal_cdf", 0.0f, 0.5f},
  };
  const std::uint32_t nans[] = {0x7fc00000u, 0xffc00000u, 0x7fc12345u, 0x7fffffffu, 0xffffffffu};
  bool ok = true;
  float x[16], y[16];
  const auto check = [&](const Case& c, float in, float want) {
    for (float& v : x) v = in;
    c.loop(x, y, 1);
    for (float v : y) {
      if (same(v, want)) continue;
      std::printf("%s(%.9g) = %.9g, expected %.9g\n", c.name, in, v, want);
      ok = false;
      break;
    }
  };
  for (const Case& c : kCases) {
    for (const Special& s : specials)
      if (std::strcmp(s.name, c.name) == 0) check(c, s.x, s.want);
    for (std::uint32_t bits : nans) check(c, from_bits(bits), kNaN);
  }
  return ok;
}

void time_all() {
  constexpr int kBlocks = 256;
  std::vector<float> x(kBlocks * 16), y(kBlocks * 16);
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = 0.01f + 8.0f * static_cast<float>((i * 2654435761u) % 4096) / 4096.0f;
  for (const Case& c : kCases) {
    double best = 1e30;
    for (int round = 0; round < 20; ++round) {
      const auto start = std::chrono::steady_clock::now();
      for (int repeat = 0; repeat < 100; ++repeat) c.loop(x.data(), y.data(), kBlocks);
      const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
      best = std::fmin(best, spent.count() / (100.0 * static_cast<double>(x.size())));
    }
    std::printf("%-13s %.3f ns per element\n", c.name, best);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "time") == 0) {
    time_all();
    return 0;
  }
  const int stride = argc > 1 ? std::atoi(argv[1]) : 97;
  if (stride < 1) return 2;
  bool ok = check_specials();
  for (const Case& c : kCases) {
    if (argc > 2 && std::strcmp(argv[2], c.name) != 0) continue;
    ok = check_accuracy(c, static_cast<std::uint32_t>(stride)) && ok;
  }
  std::printf(ok ? "all within bounds\n" : "FAILED\n");
  return ok ? 0 : 1;
}
