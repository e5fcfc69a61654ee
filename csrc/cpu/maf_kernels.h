// Kernels of the autoregressive operators for one instruction set; included by foreach_isa.h.
#include "cpu/panel_kernels.h"

namespace fk::FK_ISA {

// Rows [begin, end) of one panel, columns [from, to).
template <int Lanes, class T>
void multiply_add_panel(const Panel& p, int64_t begin, int64_t end, const T* packed, T* rows, const T* columns,
                        int64_t from, int64_t to) {
  const T* weight = packed + p.offset + from * p.height;
  if constexpr (Lanes == 1)
    multiply_add_one(rows + begin, weight, p.height, columns + from, to - from, begin - p.row, end - begin);
  else
    multiply_add_rows(rows + begin * Lanes, weight + (begin - p.row), p.height, columns + from * Lanes, to - from,
                      end - begin);
}

// Rows [begin, end) of one group of panels, columns [from, to).
template <int Lanes, class T>
void multiply_add_range(const Layer& layer, const Panel* group, const T* packed, T* rows, const T* columns,
                        int64_t begin, int64_t end, int64_t from, int64_t to) {
  for (int64_t r = begin; r < end;) {
    const Panel& p = group[(r - group->row) / kPanelRows];
    const int64_t stop = std::min(end, p.row + p.rows);
    multiply_add_panel<Lanes>(p, r, stop, packed, rows, columns, from, std::min(to, p.depth));
    r = stop;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Transforms over rows of lanes. The law is copied first: results that are stored might lie where a reference points,
// and a law that may change from lane to lane is worked out one lane at a time.

template <Law L, Form F, bool Inverse, class T>
void affine_lanes(const T* x, const T* parameters, T* y, T* logdet, const Transform<T>& t) {
  const LawParameters<T> law = t.law;
  const T *shift = parameters, *u = parameters + kLanes;
  FK_SIMD
  for (int i = 0; i < kLanes; ++i) {
    const Transformed<T> out = affine<L, F, Inverse>(x[i], shift[i], u[i], law);
    y[i] = out.y;
    logdet[i] += out.logdet;
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_lanes_backward(const T* grad_y, const T* grad_logdet, const T* x, const T* parameters, T* grad_x,
                           T* grad_parameters, const Transform<T>& t) {
  const LawParameters<T> law = t.law;
  const T *shift = parameters, *u = parameters + kLanes;
  T *grad_shift = grad_parameters, *grad_u = grad_parameters + kLanes;
  FK_SIMD
  for (int i = 0; i < kLanes; ++i) {
    const AffineGradient<T> g = affine_backward<L, F, Inverse>(grad_y[i], grad_logdet[i], x[i], shift[i], u[i], law);
    grad_x[i] = g.x;
    grad_shift[i] = g.shift;
    grad_u[i] = g.u;
  }
}

template <class T>
void bind_affine(Transform<T>& t, Law law, Form form, bool inverse) {
  dispatch_affine(law, form, inverse, [&]<Law L, Form F, bool Inverse>() {
    t.forward = affine_lanes<L, F, Inverse, T>;
    t.backward = affine_lanes_backward<L, F, Inverse, T>;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// One tile of samples on its way through a net.

template <class T, int Lanes>
struct Tile {
  const Net& net;
  const T* packed;
  int64_t first, count;  // samples
  T* inputs;             // [row][lane], rows of the net's input
  T* output[kMaxLayers];
  T* before[kMaxLayers];  // pre-activations; the same memory as output where nobody needs them afterwards
  RowsFunction<T> activation[kMaxLayers];
  SlopeFunction<T> slope[kMaxLayers];

  const T* columns(int64_t l) const { return l ? output[l - 1] : inputs; }

  static int64_t scratch_size(const Net& net) {
    int64_t rows = net.inputs;
    for (int64_t l = 0; l < net.layers; ++l) rows += 2 * net.layer[l].rows;
    return rows * Lanes;
  }

  Tile(const Net& n, const T* weights, T* memory) : net(n), packed(weights), first(0), count(0) {
    inputs = memory;
    memory += net.inputs * Lanes;
    for (int64_t l = 0; l < net.layers; ++l) {
      output[l] = before[l] = memory;
      memory += net.layer[l].rows * Lanes;
      before[l] = memory;
      memory += net.layer[l].rows * Lanes;
      activation[l] = activation_function<T>(net.layer[l].activation);
      slope[l] = slope_function<T>(net.layer[l].activation);
    }
    // In place, unless a residual connection or a slope reads the pre-activation later.
    for (int64_t l = 0; l < net.layers; ++l) {
      bool later = slope_needs_input(static_cast<Activation>(net.layer[l].activation));
      for (int64_t m = l + 1; m < net.layers; ++m) later |= net.layer[m].residual == l;
      if (net.layer[l].transposed || !later) before[l] = output[l];
    }
  }
};

template <class T, int Lanes>
void load_lanes(const Tile<T, Lanes>& tile, T* row, const T* from, int64_t stride) {
  for (int i = 0; i < Lanes; ++i) row[i] = i < tile.count ? from[(tile.first + i) * stride] : T(0);
}

template <class T, int Lanes>
void store_lanes(const Tile<T, Lanes>& tile, T* to, int64_t stride, const T* row) {
  for (int64_t i = 0; i < tile.count; ++i) to[(tile.first + i) * stride] = row[i];
}

// Forwards: pre-activation = bias + context + residual + product, output = activation.
template <class T, int Lanes>
struct ForwardStage {
  const MafCall<T>& call;

  void begin(Tile<T, Lanes>& tile, int64_t l, int64_t r0, int64_t r1) const {
    const Layer& layer = tile.net.layer[l];
    const T* bias = tile.packed + layer.bias;
    for (int64_t r = r0; r < r1; ++r) {
      T* row = tile.before[l] + r * Lanes;
      for (int i = 0; i < Lanes; ++i) row[i] = bias[r];
      if (layer.context_column >= 0 && call.context) {
        const T* context = call.context + layer.context_column + layer.perm[r];
        for (int64_t i = 0; i < tile.count; ++i) row[i] += context[(tile.first + i) * tile.net.context_width];
      }
    }
  }

  void finish(Tile<T, Lanes>& tile, int64_t l, int64_t r0, int64_t r1) const {
    const Layer& layer = tile.net.layer[l];
    T* before = tile.before[l];
    if (layer.residual >= 0)
      for (int64_t r = r0; r < r1; ++r) {
        const T* source = tile.before[layer.residual] + layer.residual_row[r] * Lanes;
        for (int i = 0; i < Lanes; ++i) before[r * Lanes + i] += source[i];
      }
    tile.activation[l](before + r0 * Lanes, tile.output[l] + r0 * Lanes, (r1 - r0) * Lanes);
  }

  // The tile is whole: what the backward pass will ask for.
  void keep(const Tile<T, Lanes>& tile) const {
    if constexpr (Lanes == kLanes) {
      if (!call.saved) return;
      auto section = [&](int64_t row, const T* rows, int64_t count) {
        keep_rows(rows, count, tile.count, call.saved + row * call.kept.stride, call.kept.stride, tile.first);
      };
      section(0, tile.inputs, tile.net.inputs);
      for (int64_t l = 0; l < tile.net.layers; ++l) {
        section(call.kept.output[l], tile.output[l], tile.net.layer[l].rows);
        if (call.kept.slope[l] != call.kept.output[l])
          section(call.kept.slope[l], tile.before[l], tile.net.layer[l].rows);
      }
    }
  }
};

// Backwards: gradient of the output = product, of the pre-activation = slope times that, plus the residual's. `held` is
// what the forward pass has kept of this tile, as rows of lanes.
template <class T>
struct BackwardStage {
  const MafCall<T>& call;
  T* held;

  void load(const Tile<T, kLanes>& tile) const {
    load_rows(held, call.kept.rows, call.saved_in, call.kept.stride, tile.first);
  }

  const T* held_input(int64_t feature) const { return held + feature * kLanes; }
  const T* held_noise(int64_t feature) const { return held + (call.kept.noise + feature) * kLanes; }
  const T* held_parameters(int64_t feature) const {
    return held + (call.kept.output[call.net->layers - 1] + feature * call.net->parameters) * kLanes;
  }

  void begin(Tile<T, kLanes>& tile, int64_t l, int64_t r0, int64_t r1) const {
    std::memset(tile.before[l] + r0 * kLanes, 0, static_cast<size_t>(r1 - r0) * kLanes * sizeof(T));
  }

  void finish(Tile<T, kLanes>& tile, int64_t l, int64_t r0, int64_t r1) const {
    if (l == tile.net.layers - 1) return;  // gradients of the features: the caller adds them up
    const Layer& layer = tile.net.layer[l];
    const T* kept = held + (call.kept.slope[tile.net.layers - 2 - l] + layer.rows - 1) * kLanes;
    for (int64_t r = r0; r < r1; ++r) {
      T* row = tile.output[l] + r * kLanes;
      tile.slope[l](kept - r * kLanes, row, 1);
      if (layer.residual >= 0 && layer.residual_row[r] >= 0) {
        const T* source = tile.output[layer.residual] + layer.residual_row[r] * kLanes;
        for (int i = 0; i < kLanes; ++i) row[i] += source[i];
      }
    }
  }

  void keep(const Tile<T, kLanes>& tile) const {
    auto section = [&](int64_t row, const T* rows, int64_t count) {
      keep_rows(rows, count, tile.count, call.grads + row * call.kept_back.stride, call.kept_back.stride, tile.first);
    };
    section(0, tile.inputs, tile.net.inputs);
    for (int64_t l = 0; l + 1 < tile.net.layers; ++l)
      section(call.kept_back.output[l], tile.output[l], tile.net.layer[l].rows);
  }
};

// The whole net at once, every layer after the other: the density direction.
template <class T, int Lanes, class Stage>
void run_dense(Tile<T, Lanes>& tile, const Stage& stage) {
  for (int64_t l = 0; l < tile.net.layers; ++l) {
    const Layer& layer = tile.net.layer[l];
    stage.begin(tile, l, 0, layer.rows);
    for (int64_t p = 0; p < layer.panels; ++p) {
      const Panel& panel = layer.panel[p];
      multiply_add_panel<Lanes>(panel, panel.row, panel.row + panel.rows, tile.packed, tile.before[l], tile.columns(l),
                                0, panel.depth);
    }
    stage.finish(tile, l, 0, layer.rows);
  }
}

// The sweep, the sampling direction: at each step the output rows of that step become final, `step(row0, row1, s)`
// turns them into input rows, and those make more hidden units final. What earlier blocks of steps contribute is one
// product per layer and block; only the rest inside a block goes step by step.
template <class T, int Lanes, class Stage, class Step>
void run_sweep(Tile<T, Lanes>& tile, const Stage& stage, const Step& step) {
  const Net& net = tile.net;
  const int64_t last = net.layers - 1;
  for (int64_t l = 0; l < last; ++l) {
    const Layer& layer = net.layer[l];
    stage.begin(tile, l, 0, layer.up_to[0]);
    multiply_add_range<Lanes>(layer, layer.panel, tile.packed, tile.before[l], tile.columns(l), 0, layer.up_to[0], 0,
                              net.columns_up_to(l)[0]);
    stage.finish(tile, l, 0, layer.up_to[0]);
  }
  for (int64_t b = 0; b < net.blocks; ++b) {
    const int64_t begin = net.block[b], end = net.block[b + 1];
    for (int64_t l = 0; l <= last; ++l) {
      const Layer& layer = net.layer[l];
      stage.begin(tile, l, layer.up_to[begin], layer.up_to[end]);
      multiply_add_range<Lanes>(layer, layer.panel + layer.group[b + 1], tile.packed, tile.before[l], tile.columns(l),
                                layer.up_to[begin], layer.up_to[end], 0, net.columns_up_to(l)[begin]);
    }
    auto advance = [&](int64_t l, int64_t s, int64_t time) {
      const Layer& layer = net.layer[l];
      const int64_t* columns = net.columns_up_to(l);
      multiply_add_range<Lanes>(layer, layer.panel + layer.group[b + 1], tile.packed, tile.before[l], tile.columns(l),
                                layer.up_to[s], layer.up_to[s + 1], columns[begin], columns[time]);
      stage.finish(tile, l, layer.up_to[s], layer.up_to[s + 1]);
    };
    for (int64_t s = begin; s < end; ++s) {
      advance(last, s, s);  // output rows of step s need what is final at s
      step(net.output().up_to[s], net.output().up_to[s + 1]);
      for (int64_t l = 0; l < last; ++l) advance(l, s, s + 1);  // hidden units of time s + 1
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The transforms at the end of a net, kLanes numbers at a time: SIMD runs across the samples of one feature, or across
// the features of one sample.

template <class T, int Lanes>
struct Elements {
  static constexpr int kFeatures = kLanes / Lanes;  // at once
  const MafCall<T>& call;
  T* parameters;  // room for those of kFeatures features
  // Log-dets, in float64: a sum over hundreds of features would round off more than all the rest.
  alignas(64) double total[Lanes];

  static int64_t scratch_size(const Net& net) { return Lanes == 1 ? net.parameters * kLanes : 0; }

  Elements(const MafCall<T>& c, T* memory) : call(c), parameters(memory) {}

  void begin(const Tile<T, Lanes>& tile) {
    for (int i = 0; i < Lanes; ++i)
      total[i] = !call.first && i < tile.count ? static_cast<double>(call.logdet[tile.first + i]) : 0.0;
  }

  // n <= kFeatures features: y[feature][lane] from x and theta, rows of lanes.
  void run(const T* x, const T* theta, T* y, int64_t n) {
    alignas(64) T out[kLanes], logdet[kLanes] = {};
    if constexpr (Lanes == 1) {
      alignas(64) T in[kLanes];
      const int64_t per = call.net->parameters;
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t f = std::min(i, n - 1);
        in[i] = x[f];
        for (int64_t p = 0; p < per; ++p) parameters[p * kLanes + i] = theta[f * per + p];
      }
      call.transform.forward(in, parameters, out, logdet, call.transform);
    } else {
      call.transform.forward(x, theta, out, logdet, call.transform);
    }
    for (int64_t i = 0; i < n * Lanes; ++i) {
      y[i] = out[i];
      total[i % Lanes] += static_cast<double>(logdet[i]);
      if (call.density) total[i % Lanes] -= 0.5 * static_cast<double>(out[i]) * static_cast<double>(out[i]);
    }
  }

  void store(const Tile<T, Lanes>& tile) {
    constexpr double kHalfLog2Pi = 0.91893853320467274178;
    const double base = call.density ? kHalfLog2Pi * static_cast<double>(call.net->features) : 0.0;
    for (int64_t i = 0; i < tile.count; ++i) call.logdet[tile.first + i] = static_cast<T>(total[i] - base);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The operators, tiles [begin, end). In the backward passes `input` is the gradient that comes in, `output` the one
// that goes out.

template <class T, int Lanes>
void for_each_tile(const MafCall<T>& call, int64_t begin, int64_t end, Tile<T, Lanes>& tile, auto&& body) {
  const int64_t stop = std::min(end * kLanes, call.samples);
  for (tile.first = begin * kLanes; tile.first < stop; tile.first += Lanes) {
    tile.count = std::min<int64_t>(Lanes, stop - tile.first);
    body();
  }
}

template <int Lanes, class T>
void maf_forward_by(const MafCall<T>& call, int64_t begin, int64_t end) {
  using Run = Elements<T, Lanes>;
  const Net& net = *call.net;
  const int64_t features = net.features, per = net.parameters, size = Tile<T, Lanes>::scratch_size(net);
  T* memory = scratch().template get<T>(size + Run::scratch_size(net));
  Tile<T, Lanes> tile(net, call.packed, memory);
  Run elements(call, memory + size);
  const ForwardStage<T, Lanes> stage{call};
  for_each_tile(call, begin, end, tile, [&] {
    for (int64_t f = 0; f < features; ++f)
      load_lanes(tile, tile.inputs + f * Lanes, call.input + net.data_perm[f], features);
    run_dense(tile, stage);
    const T* theta = tile.output[net.layers - 1];
    elements.begin(tile);
    for (int64_t f = 0; f < features; f += Run::kFeatures) {
      alignas(64) T y[kLanes];
      const int64_t n = std::min<int64_t>(Run::kFeatures, features - f);
      elements.run(tile.inputs + f * Lanes, theta + f * per * Lanes, y, n);
      for (int64_t i = 0; i < n; ++i) store_lanes(tile, call.output + net.data_perm[f + i], features, y + i * Lanes);
    }
    elements.store(tile);
    stage.keep(tile);
  });
}

template <int Lanes, class T>
void maf_inverse_by(const MafCall<T>& call, int64_t begin, int64_t end) {
  using Run = Elements<T, Lanes>;
  const Net& net = *call.net;
  const int64_t features = net.features, per = net.parameters, size = Tile<T, Lanes>::scratch_size(net);
  T* memory = scratch().template get<T>(size + features * Lanes + Run::scratch_size(net));
  Tile<T, Lanes> tile(net, call.packed, memory);
  T* noise = memory + size;
  Run elements(call, noise + features * Lanes);
  const ForwardStage<T, Lanes> stage{call};
  for_each_tile(call, begin, end, tile, [&] {
    for (int64_t f = 0; f < features; ++f) load_lanes(tile, noise + f * Lanes, call.input + net.data_perm[f], features);
    const T* theta = tile.output[net.layers - 1];
    elements.begin(tile);
    run_sweep(tile, stage, [&](int64_t r0, int64_t r1) {
      for (int64_t f = r0 / per; f < r1 / per; f += Run::kFeatures)
        elements.run(noise + f * Lanes, theta + f * per * Lanes, tile.inputs + f * Lanes,
                     std::min<int64_t>(Run::kFeatures, r1 / per - f));
    });
    for (int64_t f = 0; f < features; ++f)
      store_lanes(tile, call.output + net.data_perm[f], features, tile.inputs + f * Lanes);
    elements.store(tile);
    stage.keep(tile);
    if constexpr (Lanes == kLanes)
      if (call.saved)
        keep_rows(noise, features, tile.count, call.saved + call.kept.noise * call.kept.stride, call.kept.stride,
                  tile.first);
  });
}

// A few samples leave most lanes of a tile empty: those go one by one.
template <class T>
bool one_by_one(const MafCall<T>& call) {
  return call.samples <= kOneByOne && !call.saved;
}

template <class T>
void maf_forward(const MafCall<T>& call, int64_t begin, int64_t end) {
  one_by_one(call) ? maf_forward_by<1>(call, begin, end) : maf_forward_by<kLanes>(call, begin, end);
}

template <class T>
void maf_inverse(const MafCall<T>& call, int64_t begin, int64_t end) {
  one_by_one(call) ? maf_inverse_by<1>(call, begin, end) : maf_inverse_by<kLanes>(call, begin, end);
}

// Gradient rows of one feature's parameters sit in reverse order in the backward net.
template <class T>
void store_reversed(T* rows, int64_t per, const T* grads) {
  for (int64_t p = 0; p < per; ++p)
    for (int i = 0; i < kLanes; ++i) rows[(per - 1 - p) * kLanes + i] = grads[p * kLanes + i];
}

// Scratch of the backward passes: the tile, what the forward pass has kept of it, the features' own gradients, and one
// feature's parameter gradients.
template <class T>
struct BackwardScratch {
  T *tile, *held, *direct, *grads;
  explicit BackwardScratch(const MafCall<T>& call) {
    const int64_t size = Tile<T, kLanes>::scratch_size(*call.back), held_size = call.kept.rows * kLanes;
    const int64_t direct_size = call.net->features * kLanes;
    tile = scratch().template get<T>(size + held_size + direct_size + call.net->parameters * kLanes);
    held = tile + size;
    direct = held + held_size;
    grads = direct + direct_size;
  }
};

template <class T>
void maf_forward_backward(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  const int64_t features = net.features, per = net.parameters;
  const BackwardScratch<T> memory(call);
  Tile<T, kLanes> tile(*call.back, call.packed_back, memory.tile);
  const BackwardStage<T> stage{call, memory.held};
  alignas(64) T grad_logdet[kLanes], grad_y[kLanes];
  for_each_tile(call, begin, end, tile, [&] {
    stage.load(tile);
    load_lanes(tile, grad_logdet, call.grad_logdet, 1);
    for (int64_t f = 0; f < features; ++f) {
      load_lanes(tile, grad_y, call.input + net.data_perm[f], features);
      call.transform.backward(grad_y, grad_logdet, stage.held_input(f), stage.held_parameters(f),
                              memory.direct + f * kLanes, memory.grads, call.transform);
      store_reversed(tile.inputs + (features - 1 - f) * per * kLanes, per, memory.grads);
    }
    run_dense(tile, stage);
    const T* through = tile.output[tile.net.layers - 1];
    for (int64_t f = 0; f < features; ++f) {
      T* row = memory.direct + f * kLanes;
      for (int i = 0; i < kLanes; ++i) row[i] += through[(features - 1 - f) * kLanes + i];
      store_lanes(tile, call.output + net.data_perm[f], features, row);
    }
    stage.keep(tile);
  });
}

// The sweep in reverse: the gradient of a feature is final when all later features have passed theirs on.
template <class T>
void maf_inverse_backward(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  const int64_t features = net.features, per = net.parameters;
  const BackwardScratch<T> memory(call);
  Tile<T, kLanes> tile(*call.back, call.packed_back, memory.tile);
  const BackwardStage<T> stage{call, memory.held};
  alignas(64) T grad_logdet[kLanes], grad_x[kLanes], grad_z[kLanes];
  for_each_tile(call, begin, end, tile, [&] {
    stage.load(tile);
    load_lanes(tile, grad_logdet, call.grad_logdet, 1);
    run_sweep(tile, stage, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t f = features - 1 - r;
        load_lanes(tile, grad_x, call.input + net.data_perm[f], features);
        const T* through = tile.output[tile.net.layers - 1] + r * kLanes;
        for (int i = 0; i < kLanes; ++i) grad_x[i] += through[i];
        call.transform.backward(grad_x, grad_logdet, stage.held_noise(f), stage.held_parameters(f), grad_z,
                                memory.grads, call.transform);
        store_reversed(tile.inputs + r * per * kLanes, per, memory.grads);
        store_lanes(tile, call.output + net.data_perm[f], features, grad_z);
      }
    });
    stage.keep(tile);
  });
}

}  // namespace fk::FK_ISA
