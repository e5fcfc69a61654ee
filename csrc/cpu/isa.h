// Which instruction set the kernels run with: the best of this processor, or the one that FLOWKERNELS_ISA names.
#pragma once
#include <cstdlib>
#include <cstring>

namespace fk {

enum class IsaLevel { baseline, avx2, avx512 };

inline IsaLevel detect_isa_level() {
#if defined(__x86_64__)
  IsaLevel best = IsaLevel::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    best = IsaLevel::avx2;
  if (best == IsaLevel::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    best = IsaLevel::avx512;
  // Asking for less than the machine has is how the other levels get tested; asking for more is ignored.
  if (const char* asked = std::getenv("FLOWKERNELS_ISA")) {
    if (!std::strcmp(asked, "baseline")) return IsaLevel::baseline;
    if (!std::strcmp(asked, "avx2") && best == IsaLevel::avx512) return IsaLevel::avx2;
  }
  return best;
#else
  return IsaLevel::baseline;
#endif
}

inline IsaLevel isa_level() {
  static const IsaLevel level = detect_isa_level();
  return level;
}

inline const char* isa_name() {
  switch (isa_level()) {
    case IsaLevel::avx512:
      return "avx512";
    case IsaLevel::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fk
