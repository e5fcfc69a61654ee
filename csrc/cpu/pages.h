// Huge pages for large fresh outputs: their page faults cost more than the arithmetic that fills them.
#pragma once
#include "cpu/tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fk {

// Asks for huge pages under a large tensor that nobody has touched yet; what the system refuses costs
// nothing.
inline void prefer_huge_pages(Tensor& t, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) & ~(kPage - 1),
                  end = (data + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// new_empty in the type of `like`, for outputs that may be large.
inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> size) {
  Tensor t = new_empty(like, size);
  prefer_huge_pages(t, t.numel() * (like.scalar_type() == ScalarType::Double ? 8 : 4));
  return t;
}

}  // namespace fk
