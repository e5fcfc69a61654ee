// Sums that keep what rounding takes away.
#pragma once
#include "common/math.h"

namespace fk {

// sum + rest stays the sum of all values to about twice the precision of T (Knuth's two-sum).
template <class T>
FK_INLINE void add_exactly(T& sum, T& rest, T value) {
  const T total = sum + value, added = total - sum;
  rest += (sum - (total - added)) + (value - added);
  sum = total;
}

}  // namespace fk
