// The little of torch's stable ABI that the CPU launch code needs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A strided view of a 2-D tensor, rows by columns.
template <class T>
struct View {
  T* data = nullptr;
  int64_t row = 0, column = 0;  // strides in elements
  T& operator()(int64_t r, int64_t c) const { return data[r * row + c * column]; }
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

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> size,
                        std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, dtype ? *dtype : like.scalar_type());
}

// Calls f.template operator()<T>() with the tensor's own type; the public face has turned half precision into float.
template <class F>
void dispatch_float(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Double)
    f.template operator()<double>();
  else if (t.scalar_type() == ScalarType::Float)
    f.template operator()<float>();
  else
    STD_TORCH_CHECK(false, "expected float32 or float64");
}

// Work per thread below which starting threads costs more than it saves, in elementwise operations.
inline constexpr int64_t kGrain = 16384;

inline int64_t grain_for(int64_t work_per_item) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item)); }

}  // namespace fk
