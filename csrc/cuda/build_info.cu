// flowkernels_cuda::architectures: what the CUDA kernels were compiled for, "80,90".
#include <string>

#include "cuda/launch.h"

namespace fk {

std::string architectures() {
  std::string text;
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__}) text += (text.empty() ? "" : ",") + std::to_string(arch / 10);
#endif
  return text;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) { m.def("architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&fk::architectures));
}
