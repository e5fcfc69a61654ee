// Kernels of masked_linear for one instruction set; included by foreach_isa.h.
#include "cpu/panel_kernels.h"

namespace fk::FK_ISA {

// Rows of lanes from a (samples, columns) matrix, sorted by `perm`; lanes beyond the last sample are zero.
template <class T>
void load_tile(T* rows, View<const T> from, const int64_t* perm, int64_t count, int64_t first, int64_t samples) {
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kLanes; ++i) rows[k * kLanes + i] = i < samples ? from(first + i, perm[k]) : T(0);
}

template <class T>
void masked_linear(const MaskedLinearCall<T>& call, int64_t begin, int64_t end) {
  const Layer& layer = *call.layer;
  T* columns = scratch().template get<T>((layer.columns + kPanelRows) * kLanes);
  T* rows = columns + layer.columns * kLanes;
  const RowsFunction<T> act = activation_function<T>(layer.activation);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kLanes, count = std::min<int64_t>(kLanes, call.samples - first);
    load_tile(columns, call.input, call.column_perm, layer.columns, first, count);
    for (int64_t p = 0; p < layer.panels; ++p) {
      const Panel& panel = layer.panel[p];
      for (int64_t r = 0; r < panel.rows; ++r)
        for (int i = 0; i < kLanes; ++i) rows[r * kLanes + i] = call.bias ? call.bias[layer.perm[panel.row + r]] : T(0);
      multiply_add_rows(rows, call.packed + panel.offset, panel.height, columns, panel.depth, panel.rows);
      act(rows, rows, panel.rows * kLanes);
      for (int64_t r = 0; r < panel.rows; ++r)
        for (int64_t i = 0; i < count; ++i) call.output(first + i, layer.perm[panel.row + r]) = rows[r * kLanes + i];
    }
  }
}

// A matrix (samples, columns), sorted by `perm`, in chunks [chunk][sample][column] as weight_gradient reads them.
template <class T>
void keep_matrix(View<const T> from, const int64_t* perm, int64_t count, int64_t samples, int64_t stride, T* kept,
                 int64_t begin, int64_t end) {
  for (int64_t c = 0; c < count; c += kLanes, kept += stride * kLanes)
    for (int64_t s = begin * kLanes; s < end * kLanes; ++s)
      for (int64_t i = 0; i < kLanes; ++i)
        kept[s * kLanes + i] = s < samples && c + i < count ? from(s, perm[c + i]) : T(0);
}

}  // namespace fk::FK_ISA
