// A plan (flowkernels/plan.py) as the kernels see it: views into one int64 table.
//
// Net: a chain of layers over sorted units. Row r of a layer needs the columns [0, depth) of the layer before it; a
// unit of time m is final after m steps. The same struct describes the network forwards (features -> hidden ->
// parameters) and backwards (gradients of parameters -> hidden -> features, weights transposed, time reversed).
#pragma once
#include <cstdint>

namespace fk {

inline constexpr int kPanelRows = 16;  // flowkernels/plan.py: PANEL_ROWS

// Up to 16 consecutive rows, packed as [column][height] so that one column of the panel is contiguous.
struct Panel {
  int64_t row, rows;  // first row and how many
  int64_t height;     // rows rounded up to 4, the padding is zero
  int64_t depth;      // columns that any row uses
  int64_t offset;     // of its weights in the packed buffer
};

struct Layer {
  int64_t rows, columns;
  int64_t weight;      // index of the weight that it multiplies by
  int64_t transposed;  // 1: multiplies by the transpose
  int64_t activation;
  int64_t residual;             // layer whose pre-activation is added, or -1
  const int64_t* residual_row;  // [rows] row of that layer, -1: none
  const int64_t* perm;          // [rows] index of each row in the user's order
  const int64_t* up_to;         // [steps + 1] rows that are final at each time
  const int64_t* group;         // [blocks + 2] first panel of: time 0, block 0, block 1, ...
  const Panel* panel;
  int64_t panels;
  int64_t bias;            // offset of the biases in the packed buffer, -1: none
  int64_t context_column;  // first column of its context term, -1: none
  int64_t weight_columns;  // row stride of the user's weight
};

inline constexpr int kMaxLayers = 64;

struct Net {
  int64_t steps, layers, blocks, inputs, packed_size, features, parameters, context_width, widest;
  const int64_t* input_perm;
  const int64_t* data_perm;  // where the inputs lie in a row of x and y
  const int64_t* input_up_to;
  const int64_t* block;  // [blocks + 1] step at which each block begins
  Layer layer[kMaxLayers];

  const Layer& output() const { return layer[layers - 1]; }
  const int64_t* columns_up_to(int64_t l) const { return l ? layer[l - 1].up_to : input_up_to; }
  const int64_t* column_perm(int64_t l) const { return l ? layer[l - 1].perm : input_perm; }
};

inline Net read_net(const int64_t* table) {
  Net net;
  net.steps = table[0];
  net.layers = table[1];
  net.blocks = table[2];
  net.inputs = table[3];
  net.packed_size = table[4];
  net.input_perm = table + table[5];
  net.input_up_to = table + table[6];
  net.block = table + table[7];
  net.features = table[8];
  net.parameters = table[9];
  net.context_width = table[10];
  net.widest = table[11];
  net.data_perm = table + table[12];
  for (int64_t l = 0; l < net.layers && l < kMaxLayers; ++l) {
    const int64_t* r = table + 16 + 16 * l;
    net.layer[l] = Layer{r[0],
                         r[1],
                         r[2],
                         r[3],
                         r[4],
                         r[5],
                         r[6] < 0 ? nullptr : table + r[6],
                         table + r[7],
                         table + r[8],
                         table + r[9],
                         reinterpret_cast<const Panel*>(table + r[10]),
                         r[11],
                         r[12],
                         r[13],
                         r[14]};
  }
  return net;
}

}  // namespace fk
