// flowkernels::build_info: what was built, for `python -m flowkernels info` and explain().
#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fk {

std::string build_info() {
  std::string info = "isa=";
  info += isa_name();
#if defined(__x86_64__)
  info += ";isa_built=baseline,avx2,avx512";
#else
  info += ";isa_built=baseline";
#endif
#if defined(__clang__)
  info += ";compiler=clang " __clang_version__;
#elif defined(__GNUC__)
  info += ";compiler=gcc " __VERSION__;
#endif
  info += ";torch_abi=" + std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
          std::to_string((TORCH_TARGET_VERSION >> 48) & 255);
#if defined(FLOWKERNELS_CUDA)
  info += ";cuda=1";
#else
  info += ";cuda=0";
#endif
  return info;
}

// What kernels get for their outputs: how the test kit sees that poisoning reaches them.
Tensor fresh_output(const Tensor& like) { return new_empty(like, {like.size(0)}); }

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fk::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) { m.impl("fresh_output", TORCH_BOX(&fk::fresh_output)); }
