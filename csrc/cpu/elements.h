// Operators whose elements have a row of parameters each work on kElementLanes elements at once: what they share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/sums.h"
#include "cpu/tensor.h"

namespace fk {

inline constexpr int kElementLanes = 16;

// x and its like are (rows, features), parameters (rows, features, count); strides in elements, element e is row e /
// features.
template <class T>
struct ElementView {
  T* data = nullptr;
  int64_t row = 0, column = 0, parameter = 0;
  FK_INLINE T* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

inline void check_elements(const Tensor& x, const Tensor& parameters, int64_t count) {
  STD_TORCH_CHECK(x.dim() == 2 && parameters.dim() == 3, "expected x (N, D) and parameters (N, D, P)");
  STD_TORCH_CHECK(parameters.size(2) == count, "parameters must have ", count, " numbers per feature, got ",
                  parameters.size(2));
}

template <class T>
ElementView<const T> element_view(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

template <class T>
ElementView<T> mutable_element_view(Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.dim() > 2 ? t.stride(2) : 0};
}

// Where there are no features, no kernel writes a row's log-det.
template <class T>
void only_running(const std::optional<Tensor>& logdet, Tensor& total) {
  const T* from = data_or_null<T>(logdet);
  T* to = static_cast<T*>(total.mutable_data_ptr());
  for (int64_t r = 0; r < total.size(0); ++r) to[r] = from ? from[r] : T(0);
}

// The place of the lanes of one group of elements. Lanes beyond the last element repeat it and are not stored.
struct ElementLanes {
  int64_t row[kElementLanes], column[kElementLanes];
  int count;
  ElementLanes(int64_t element, int64_t end, int64_t features) {
    count = static_cast<int>(std::min<int64_t>(kElementLanes, end - element));
    int64_t r = element / features, c = element % features;
    for (int i = 0; i < kElementLanes; ++i) {
      row[i] = r;
      column[i] = c;
      if (i + 1 < count && ++c == features) {
        c = 0;
        ++r;
      }
    }
  }
};

}  // namespace fk
