// A number that changes when the contents of tensors change. Autograd's version counters miss too much: `p.data`,
// NumPy, and fused optimizers write without counting. Reading the weights once costs a fraction of a pass that
// multiplies by them.
#include "cpu/tensor.h"

#define FK_KERNELS "cpu/fingerprint_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

// (groups,) one int64 for each run of `lengths[i]` tensors.
Tensor fingerprint(const std::vector<Tensor>& tensors, const std::vector<int64_t>& lengths) {
  constexpr int64_t kBytes = 65536;  // fixed chunks: the result does not depend on the number of threads
  struct Chunk {
    const unsigned char* bytes;
    int64_t size;
  };
  std::vector<Tensor> held;
  std::vector<Chunk> chunks;
  held.reserve(tensors.size());
  std::vector<int64_t> ends;
  size_t next = 0;
  for (int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i) {
      held.push_back(as_contiguous(tensors[next++]));
      const auto* bytes = static_cast<const unsigned char*>(held.back().const_data_ptr());
      const int64_t size = held.back().numel() * static_cast<int64_t>(held.back().element_size());
      for (int64_t at = 0; at < size; at += kBytes) chunks.push_back({bytes + at, std::min(kBytes, size - at)});
    }
    ends.push_back(static_cast<int64_t>(chunks.size()));
  }
  std::vector<uint64_t> prints(chunks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) prints[i] = FK_BEST(fingerprint_chunk)(chunks[i].bytes, chunks[i].size);
  });
  const int64_t groups = static_cast<int64_t>(lengths.size());
  Tensor out = torch::stable::empty({groups}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(out.mutable_data_ptr());
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t total = 0;
    for (; at < ends[g]; ++at) total = (total ^ prints[at] ^ (prints[at] >> 31)) * 0xD6E8FEB86659FD93u + 1;
    result[g] = static_cast<int64_t>(total);
  }
  return out;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fk::fingerprint)); }
