// What kernels over packed panels share with their launch code. No torch here.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "common/elementwise.h"
#include "common/net.h"

namespace fk {

// Samples are worked on in tiles of this many: one AVX-512 register of float32.
inline constexpr int kLanes = 16;

// The gradient of one layer's weights: rows of gradients times rows of the outputs of the layer before, both kept in
// chunks [chunk][sample][row].
template <class T>
struct WeightGradient {
  int64_t rows;
  const int64_t* row_perm;     // [rows] index in the user's order
  const int64_t* column_perm;  // of the layer before
  const int64_t* chunk_depth;  // columns that any row of a chunk has
  const T* g;
  const T* a;
  int64_t stride, samples;   // samples per chunk, and how many of them count
  const bool* mask;          // of the user's weight, or null:
  const int64_t* row_depth;  // then row r has the columns [0, row_depth[r])
  int64_t weight_columns;
  T* weight;
  T* bias;
};

// Scratch memory of one thread, aligned, kept between calls: fresh memory costs page faults.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// The panels of one layer into packed memory. Entries that `exists(row, column, at)` denies are zero; `at` is the place
// of the entry in the user's weight.
template <class T, class Exists>
void pack_panels(const Layer& layer, const int64_t* column_perm, int64_t begin, int64_t end, const T* weight, T* packed,
                 const Exists& exists) {
  const int64_t row_stride = layer.transposed ? 1 : layer.weight_columns;
  const int64_t column_stride = layer.transposed ? layer.weight_columns : 1;
  for (int64_t i = begin; i < end; ++i) {
    const Panel& p = layer.panel[i];
    T* to = packed + p.offset;
    int64_t row[kPanelRows];
    for (int64_t r = 0; r < p.rows; ++r) row[r] = layer.perm[p.row + r] * row_stride;
    // Columns outside: what is written is contiguous, and a transposed weight is read row by row.
    for (int64_t k = 0; k < p.depth; ++k, to += p.height) {
      const int64_t column = column_perm[k] * column_stride;
      for (int64_t r = 0; r < p.rows; ++r)
        to[r] = exists(p.row + r, k, row[r] + column) ? weight[row[r] + column] : T(0);
      for (int64_t r = p.rows; r < p.height; ++r) to[r] = T(0);
    }
  }
}

inline int64_t pack_grain(const Layer& layer) { return std::max<int64_t>(1, 65536 / (kPanelRows * layer.columns + 1)); }

}  // namespace fk
