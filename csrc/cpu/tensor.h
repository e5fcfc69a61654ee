// The little of torch's stable ABI that the CPU launch code needs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/math.h"

namespace fk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A strided view of a 2-D tensor, rows by columns.
template <class T>
struct View {
  T* data = nullptr;
  int64_t row = 0, column = 0;  // strides in elements
  FK_INLINE T& operator()(int64_t r, int64_t c) const { return data[r * row + c * column]; }
};

template <class T>
View<const T> view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "expected a 2-D tensor, got ", t.dim(), " dimensions");
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

template <class T>
View<T> mutable_view(Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)};
}

// How the numbers of a tensor lie in memory, as against the type T that a kernel calculates in.
enum class Storage : int { same, bfloat16, float16 };

// A strided 2-D tensor whose storage may be narrower than the type that is calculated in.
struct Rows {
  char* data = nullptr;
  int64_t row = 0, column = 0;  // strides in bytes
  Storage storage = Storage::same;
  char* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

inline Storage storage_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? Storage::bfloat16
         : t.scalar_type() == ScalarType::Half   ? Storage::float16
                                                 : Storage::same;
}

// For reading only, although the pointer does not say so.
inline Rows rows(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "expected a 2-D tensor, got ", t.dim(), " dimensions");
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), t.stride(0) * bytes, t.stride(1) * bytes,
          storage_of(t)};
}

// The type that is calculated in and that log-dets have.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Asks first: a call through the dispatcher that does nothing costs as much as a small network.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Asks for huge pages before the first touch: a large fresh block costs more in page faults than in
// arithmetic. Only advice; where the kernel has none to give, nothing changes.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (bytes < 2 * kHugePage) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Fresh memory for an output. It comes through torch, so that flowkernels.testing.poisoned reaches it.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> size,
                        std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> sizes(size);
  Tensor out = torch::stable::new_empty(like, sizes, dtype ? *dtype : like.scalar_type());
  if (out.numel() > 0 && out.is_cpu()) advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// Calls f.template operator()<T>() with the tensor's own type; the public face has turned half precision into
// float.
template <class F>
void dispatch_float(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Double)
    f.template operator()<double>();
  else if (t.scalar_type() == ScalarType::Float)
    f.template operator()<float>();
  else
    STD_TORCH_CHECK(false, "expected float32 or float64");
}

// Calls f.template operator()<T>() with the type to calculate in: the tensor's own, float for halves.
template <class F>
void dispatch_compute(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half)
    f.template operator()<float>();
  else
    dispatch_float(t, f);
}

// Work per thread below which starting threads costs more than it saves, in elementwise operations.
inline constexpr int64_t kGrain = 16384;

inline int64_t grain_for(int64_t work_per_item) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item));
}

}  // namespace fk
