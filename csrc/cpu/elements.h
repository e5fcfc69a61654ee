// Operators whose elements have a row of parameters each work on kElementLanes elements at once: what they share.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fk {

inline constexpr int kElementLanes = 16;

// x and its like are (rows, features), parameters (rows, features, count); strides in elements, element e is row e / features.
template <class T>
struct ElementView {
  T* data = nullptr;
  int64_t row = 0, column = 0, parameter = 0;
  T* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

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
