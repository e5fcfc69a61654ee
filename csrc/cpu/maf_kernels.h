// Kernels of the autoregressive operators for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FK_VECTOR_BYTES), aligned(sizeof(T))));
};

// ---------------------------------------------------------------------------------------------------------------------
// acc[row][lane] += sum over columns of weight[column][row] * a[column][lane]: all of the arithmetic happens here.
// The weights are read as broadcasts, one multiply-add each; accumulators stay in registers.

template <class T>
inline constexpr int kVectors = kLanes * sizeof(T) / FK_VECTOR_BYTES;  // registers per row of lanes

template <class T>
inline constexpr int kRows = FK_VECTOR_BYTES == 64 ? 16 / kVectors<T> : (8 / kVectors<T> > 0 ? 8 / kVectors<T> : 1);

template <int Rows, class T>
void multiply_add(T* acc, const T* weight, int64_t height, const T* a, int64_t columns) {
  using Vector = typename VectorOf<T>::type;
  constexpr int V = kVectors<T>, per = kLanes / V;
  // Few rows are few chains of dependent additions: split the columns over more accumulators to hide the latency.
  constexpr int Split = Rows * V >= 4 ? 1 : 4 / (Rows * V);
  Vector sum[Split][Rows][V];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < V; ++v) {
      sum[0][r][v] = *reinterpret_cast<const Vector*>(acc + r * kLanes + v * per);
      for (int s = 1; s < Split; ++s) sum[s][r][v] = Vector{};
    }
  int64_t k = 0;
  for (; k + Split <= columns; k += Split)
    for (int s = 0; s < Split; ++s) {
      Vector x[V];
      for (int v = 0; v < V; ++v) x[v] = *reinterpret_cast<const Vector*>(a + (k + s) * kLanes + v * per);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < V; ++v) sum[s][r][v] += weight[(k + s) * height + r] * x[v];
    }
  if constexpr (Split > 1)
    for (; k < columns; ++k)
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < V; ++v)
          sum[0][r][v] += weight[k * height + r] * *reinterpret_cast<const Vector*>(a + k * kLanes + v * per);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < V; ++v) {
      for (int s = 1; s < Split; ++s) sum[0][r][v] += sum[s][r][v];
      *reinterpret_cast<Vector*>(acc + r * kLanes + v * per) = sum[0][r][v];
    }
}

template <int Rows, class T>
FK_INLINE void multiply_add_rest(T* acc, const T* weight, int64_t height, const T* a, int64_t columns, int64_t rows) {
  if (rows >= Rows) {
    multiply_add<Rows>(acc, weight, height, a, columns);
    acc += Rows * kLanes;
    weight += Rows;
    rows -= Rows;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) multiply_add_rest<Rows / 2>(acc, weight, height, a, columns, rows);
  }
}

// Any number of rows that are neighbours in one panel.
template <class T>
void multiply_add_rows(T* acc, const T* weight, int64_t height, const T* a, int64_t columns, int64_t rows) {
  if (columns <= 0) return;
  for (; rows >= kRows<T>; rows -= kRows<T>, acc += kRows<T> * kLanes, weight += kRows<T>)
    multiply_add<kRows<T>>(acc, weight, height, a, columns);
  if constexpr (kRows<T> > 1)
    if (rows > 0) multiply_add_rest<kRows<T> / 2>(acc, weight, height, a, columns, rows);
}

// Rows [begin, end) of one group of panels, columns [from, to).
template <class T>
void multiply_add_range(const Layer& layer, const Panel* group, const T* packed, T* rows, const T* columns,
                        int64_t begin, int64_t end, int64_t from, int64_t to) {
  for (int64_t r = begin; r < end;) {
    const Panel& p = group[(r - group->row) / kPanelRows];
    const int64_t stop = std::min(end, p.row + p.rows), depth = std::min(to, p.depth);
    multiply_add_rows(rows + r * kLanes, packed + p.offset + from * p.height + (r - p.row), p.height,
                      columns + from * kLanes, depth - from, stop - r);
    r = stop;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations and transforms over rows of lanes.

template <class T>
using RowsFunction = void (*)(const T* in, T* out, int64_t count);
template <class T>
using SlopeFunction = void (*)(const T* kept, T* grad, int64_t count);

template <Activation A, class T>
void activate_rows(const T* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = activate<A>(in[i]);
}

template <Activation A, class T>
void slope_row(const T* kept, T* grad, int64_t) {
  for (int i = 0; i < kLanes; ++i) grad[i] *= slope_from_kept<A>(kept[i]);
}

template <class T>
RowsFunction<T> activation_function(int64_t a) {
  return dispatch_activation(static_cast<Activation>(a),
                             []<Activation A>() -> RowsFunction<T> { return activate_rows<A, T>; });
}

template <class T>
SlopeFunction<T> slope_function(int64_t a) {
  return dispatch_activation(static_cast<Activation>(a),
                             []<Activation A>() -> SlopeFunction<T> { return slope_row<A, T>; });
}

template <Law L, Form F, bool Inverse, class T>
void affine_lanes(const T* x, const T* parameters, T* y, T* logdet, const LawParameters<T>& law) {
  for (int i = 0; i < kLanes; ++i) {
    const Transformed<T> out = affine<L, F, Inverse>(x[i], parameters[i], parameters[kLanes + i], law);
    y[i] = out.y;
    logdet[i] += out.logdet;
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_lanes_backward(const T* grad_y, const T* grad_logdet, const T* x, const T* parameters, T* grad_x,
                           T* grad_parameters, const LawParameters<T>& law) {
  for (int i = 0; i < kLanes; ++i) {
    const AffineGradient<T> g = affine_backward<L, F, Inverse>(grad_y[i], grad_logdet[i], x[i], parameters[i],
                                                              parameters[kLanes + i], law);
    grad_x[i] = g.x;
    grad_parameters[i] = g.shift;
    grad_parameters[kLanes + i] = g.u;
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

template <class T>
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
    return rows * kLanes;
  }

  Tile(const Net& n, const T* weights, T* memory) : net(n), packed(weights), first(0), count(0) {
    inputs = memory;
    memory += net.inputs * kLanes;
    for (int64_t l = 0; l < net.layers; ++l) {
      output[l] = before[l] = memory;
      memory += net.layer[l].rows * kLanes;
      before[l] = memory;
      memory += net.layer[l].rows * kLanes;
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

// Rows of lanes into rows of samples. Lanes beyond the last sample are written as zero, so that sums over samples may run
// over whole vectors.
template <class T>
void keep_rows(const Tile<T>& tile, T* kept, int64_t stride, int64_t kept_row, const T* rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* to = kept + (kept_row + r) * stride + tile.first;
    for (int i = 0; i < kLanes; ++i) to[i] = i < tile.count ? rows[r * kLanes + i] : T(0);
  }
}

template <class T>
void load_lanes(const Tile<T>& tile, T* row, const T* from, int64_t stride) {
  for (int i = 0; i < kLanes; ++i) row[i] = i < tile.count ? from[(tile.first + i) * stride] : T(0);
}

template <class T>
void store_lanes(const Tile<T>& tile, T* to, int64_t stride, const T* row) {
  for (int64_t i = 0; i < tile.count; ++i) to[(tile.first + i) * stride] = row[i];
}

// Forwards: pre-activation = bias + context + residual + product, output = activation.
template <class T>
struct ForwardStage {
  const MafCall<T>& call;

  void begin(Tile<T>& tile, int64_t l, int64_t r0, int64_t r1) const {
    const Layer& layer = tile.net.layer[l];
    const T* bias = tile.packed + layer.bias;
    for (int64_t r = r0; r < r1; ++r) {
      T* row = tile.before[l] + r * kLanes;
      for (int i = 0; i < kLanes; ++i) row[i] = bias[r];
      if (layer.context_column >= 0 && call.context) {
        const T* context = call.context + layer.context_column + layer.perm[r];
        for (int64_t i = 0; i < tile.count; ++i) row[i] += context[(tile.first + i) * call.context_stride];
      }
    }
  }

  void finish(Tile<T>& tile, int64_t l, int64_t r0, int64_t r1) const {
    const Layer& layer = tile.net.layer[l];
    T* before = tile.before[l];
    if (layer.residual >= 0)
      for (int64_t r = r0; r < r1; ++r) {
        const T* source = tile.before[layer.residual] + layer.residual_row[r] * kLanes;
        for (int i = 0; i < kLanes; ++i) before[r * kLanes + i] += source[i];
      }
    tile.activation[l](before + r0 * kLanes, tile.output[l] + r0 * kLanes, (r1 - r0) * kLanes);
    if (call.saved) {
      keep_rows(tile, call.saved, call.kept.stride, call.kept.output[l], tile.output[l], r0, r1);
      if (call.kept.slope[l] != call.kept.output[l])
        keep_rows(tile, call.saved, call.kept.stride, call.kept.slope[l], before, r0, r1);
    }
  }
};

// Backwards: gradient of the output = product, of the pre-activation = slope times that, plus the residual's.
template <class T>
struct BackwardStage {
  const MafCall<T>& call;

  void begin(Tile<T>& tile, int64_t l, int64_t r0, int64_t r1) const {
    std::memset(tile.before[l] + r0 * kLanes, 0, static_cast<size_t>(r1 - r0) * kLanes * sizeof(T));
  }

  void finish(Tile<T>& tile, int64_t l, int64_t r0, int64_t r1) const {
    if (l == tile.net.layers - 1) return;  // gradients of the features: the caller adds them up
    const Layer& layer = tile.net.layer[l];
    const int64_t forward = tile.net.layers - 2 - l, last = layer.rows - 1;
    const T* kept = call.saved_in + call.kept.slope[forward] * call.kept.stride + tile.first;
    for (int64_t r = r0; r < r1; ++r) {
      T* row = tile.output[l] + r * kLanes;
      tile.slope[l](kept + (last - r) * call.kept.stride, row, 1);
      if (layer.residual >= 0 && layer.residual_row[r] >= 0) {
        const T* source = tile.output[layer.residual] + layer.residual_row[r] * kLanes;
        for (int i = 0; i < kLanes; ++i) row[i] += source[i];
      }
    }
    keep_rows(tile, call.grads, call.kept_back.stride, call.kept_back.output[l], tile.output[l], r0, r1);
  }
};

// The whole net at once, every layer after the other: the density direction.
template <class T, class Stage>
void run_dense(Tile<T>& tile, const Stage& stage) {
  for (int64_t l = 0; l < tile.net.layers; ++l) {
    const Layer& layer = tile.net.layer[l];
    stage.begin(tile, l, 0, layer.rows);
    for (int64_t p = 0; p < layer.panels; ++p) {
      const Panel& panel = layer.panel[p];
      multiply_add_rows(tile.before[l] + panel.row * kLanes, tile.packed + panel.offset, panel.height, tile.columns(l),
                        panel.depth, panel.rows);
    }
    stage.finish(tile, l, 0, layer.rows);
  }
}

// The sweep, the sampling direction: at each step the output rows of that step become final, `step(row0, row1, s)` turns them
// into input rows, and those make more hidden units final. What earlier blocks of steps contribute is one product per layer
// and block; only the rest inside a block goes step by step.
template <class T, class Stage, class Step>
void run_sweep(Tile<T>& tile, const Stage& stage, const Step& step) {
  const Net& net = tile.net;
  const int64_t last = net.layers - 1;
  for (int64_t l = 0; l < last; ++l) {
    const Layer& layer = net.layer[l];
    stage.begin(tile, l, 0, layer.up_to[0]);
    multiply_add_range(layer, layer.panel, tile.packed, tile.before[l], tile.columns(l), 0, layer.up_to[0], 0,
                       net.columns_up_to(l)[0]);
    stage.finish(tile, l, 0, layer.up_to[0]);
  }
  for (int64_t b = 0; b < net.blocks; ++b) {
    const int64_t begin = net.block[b], end = net.block[b + 1];
    for (int64_t l = 0; l <= last; ++l) {
      const Layer& layer = net.layer[l];
      stage.begin(tile, l, layer.up_to[begin], layer.up_to[end]);
      multiply_add_range(layer, layer.panel + layer.group[b + 1], tile.packed, tile.before[l], tile.columns(l),
                         layer.up_to[begin], layer.up_to[end], 0, net.columns_up_to(l)[begin]);
    }
    auto advance = [&](int64_t l, int64_t s, int64_t time) {
      const Layer& layer = net.layer[l];
      const int64_t* columns = net.columns_up_to(l);
      multiply_add_range(layer, layer.panel + layer.group[b + 1], tile.packed, tile.before[l], tile.columns(l),
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
// The operators, tiles [begin, end).

template <class T>
void for_each_tile(const MafCall<T>& call, int64_t begin, int64_t end, Tile<T>& tile, auto&& body) {
  for (int64_t t = begin; t < end; ++t) {
    tile.first = t * kLanes;
    tile.count = std::min<int64_t>(kLanes, call.samples - tile.first);
    body();
  }
}

template <class T>
void maf_forward(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  Tile<T> tile(net, call.packed, scratch().template get<T>(Tile<T>::scratch_size(net) + kLanes));
  const int64_t last = net.layers - 1, features = net.features;
  for_each_tile(call, begin, end, tile, [&] {
    for (int64_t f = 0; f < features; ++f)
      load_lanes(tile, tile.inputs + f * kLanes, call.input + net.input_perm[f], features);
    if (call.saved) keep_rows(tile, call.saved, call.kept.stride, 0, tile.inputs, 0, features);
    run_dense(tile, ForwardStage<T>{call});
    alignas(64) T logdet[kLanes] = {}, y[kLanes];
    for (int64_t f = 0; f < features; ++f) {
      call.transform.forward(tile.inputs + f * kLanes, tile.output[last] + f * net.parameters * kLanes, y, logdet,
                             call.transform.law);
      store_lanes(tile, call.output + net.input_perm[f], features, y);
    }
    store_lanes(tile, call.logdet, 1, logdet);
  });
}

template <class T>
void maf_inverse(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  Tile<T> tile(net, call.packed, scratch().template get<T>(Tile<T>::scratch_size(net) + kLanes));
  const int64_t last = net.layers - 1, features = net.features, per = net.parameters;
  for_each_tile(call, begin, end, tile, [&] {
    alignas(64) T logdet[kLanes] = {}, z[kLanes];
    run_sweep(tile, ForwardStage<T>{call}, [&](int64_t r0, int64_t r1) {
      for (int64_t f = r0 / per; f < r1 / per; ++f) {
        T* x = tile.inputs + f * kLanes;
        load_lanes(tile, z, call.input + net.input_perm[f], features);
        call.transform.forward(z, tile.output[last] + f * per * kLanes, x, logdet, call.transform.law);
        store_lanes(tile, call.output + net.input_perm[f], features, x);
      }
      if (call.saved) keep_rows(tile, call.saved, call.kept.stride, 0, tile.inputs, r0 / per, r1 / per);
    });
    store_lanes(tile, call.logdet, 1, logdet);
  });
}

// Gradient rows of one feature's parameters sit in reverse order in the backward net.
template <class T>
void store_reversed(T* rows, int64_t per, const T* grads) {
  for (int64_t p = 0; p < per; ++p)
    for (int i = 0; i < kLanes; ++i) rows[(per - 1 - p) * kLanes + i] = grads[p * kLanes + i];
}

inline constexpr int kMaxParameters = 256;

template <class T>
void maf_forward_backward(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  const Net& back = *call.back;
  const int64_t features = net.features, per = net.parameters;
  const int64_t size = Tile<T>::scratch_size(back);
  T* memory = scratch().template get<T>(size + (features + kMaxParameters + 1) * kLanes);
  Tile<T> tile(back, call.packed_back, memory);
  T* direct = memory + size;
  T* grads = direct + features * kLanes;
  const T* parameters = call.saved_in + call.kept.output[net.layers - 1] * call.kept.stride;
  alignas(64) T grad_logdet[kLanes], grad_y[kLanes], theta[kMaxParameters * kLanes];
  for_each_tile(call, begin, end, tile, [&] {
    load_lanes(tile, grad_logdet, call.grad_logdet, 1);
    for (int64_t f = 0; f < features; ++f) {
      load_lanes(tile, grad_y, call.grad_output + net.input_perm[f], features);
      for (int64_t p = 0; p < per; ++p)
        std::memcpy(theta + p * kLanes, parameters + (f * per + p) * call.kept.stride + tile.first, kLanes * sizeof(T));
      call.transform.backward(grad_y, grad_logdet, call.saved_in + f * call.kept.stride + tile.first, theta,
                              direct + f * kLanes, grads, call.transform.law);
      store_reversed(tile.inputs + (features - 1 - f) * per * kLanes, per, grads);
    }
    keep_rows(tile, call.grads, call.kept_back.stride, 0, tile.inputs, 0, back.inputs);
    run_dense(tile, BackwardStage<T>{call});
    const T* through = tile.output[back.layers - 1];
    for (int64_t f = 0; f < features; ++f) {
      T* row = direct + f * kLanes;
      for (int i = 0; i < kLanes; ++i) row[i] += through[(features - 1 - f) * kLanes + i];
      store_lanes(tile, call.grad_input + net.input_perm[f], features, row);
    }
  });
}

// The sweep in reverse: the gradient of a feature is final when all later features have passed theirs on.
template <class T>
void maf_inverse_backward(const MafCall<T>& call, int64_t begin, int64_t end) {
  const Net& net = *call.net;
  const Net& back = *call.back;
  const int64_t features = net.features, per = net.parameters;
  const int64_t size = Tile<T>::scratch_size(back);
  T* memory = scratch().template get<T>(size + (kMaxParameters + 1) * kLanes);
  Tile<T> tile(back, call.packed_back, memory);
  T* grads = memory + size;
  const T* parameters = call.saved_in + call.kept.output[net.layers - 1] * call.kept.stride;
  alignas(64) T grad_logdet[kLanes], grad_x[kLanes], grad_z[kLanes], z[kLanes], theta[kMaxParameters * kLanes];
  for_each_tile(call, begin, end, tile, [&] {
    load_lanes(tile, grad_logdet, call.grad_logdet, 1);
    run_sweep(tile, BackwardStage<T>{call}, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t f = features - 1 - r;
        load_lanes(tile, grad_x, call.grad_output + net.input_perm[f], features);
        load_lanes(tile, z, call.input + net.input_perm[f], features);
        const T* through = tile.output[back.layers - 1] + r * kLanes;
        for (int i = 0; i < kLanes; ++i) grad_x[i] += through[i];
        for (int64_t p = 0; p < per; ++p)
          std::memcpy(theta + p * kLanes, parameters + (f * per + p) * call.kept.stride + tile.first,
                      kLanes * sizeof(T));
        call.transform.backward(grad_x, grad_logdet, z, theta, grad_z, grads, call.transform.law);
        store_reversed(tile.inputs + r * per * kLanes, per, grads);
        store_lanes(tile, call.grad_input + net.input_perm[f], features, grad_z);
      }
      keep_rows(tile, call.grads, call.kept_back.stride, 0, tile.inputs, r0 * per, r1 * per);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of weights: products of rows of samples, G (rows of gradients) with A (rows of outputs of the layer before).

template <class T>
FK_INLINE T sum_of(typename VectorOf<T>::type v) {
  constexpr int N = FK_VECTOR_BYTES / sizeof(T);
  alignas(64) T lanes[N];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = N / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int Rows, int Columns, class T>
void dot_block(const T* g, int64_t g_stride, const T* a, int64_t a_stride, int64_t samples, T* out) {
  using Vector = typename VectorOf<T>::unaligned;
  constexpr int N = FK_VECTOR_BYTES / sizeof(T);
  typename VectorOf<T>::type sum[Rows][Columns] = {};
  for (int64_t i = 0; i < samples; i += N) {
    typename VectorOf<T>::type x[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) x[c] = *reinterpret_cast<const Vector*>(a + c * a_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename VectorOf<T>::type y = *reinterpret_cast<const Vector*>(g + r * g_stride + i);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[r][c] += y * x[c];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r * Columns + c] = sum_of<T>(sum[r][c]);
}

inline constexpr int kDotRows = 4;
inline constexpr int kDotColumns = FK_VECTOR_BYTES == 64 ? 6 : 2;

template <int Rows, class T>
void dot_rows(int64_t rows, const T* g, int64_t g_stride, const T* a, int64_t a_stride, int64_t samples, T* out) {
  if (rows == Rows) return dot_block<Rows, kDotColumns>(g, g_stride, a, a_stride, samples, out);
  if constexpr (Rows > 1) dot_rows<Rows - 1>(rows, g, g_stride, a, a_stride, samples, out);
}

// The rows of some panels. A few columns stay in the first-level cache while all rows of a panel pass by.
template <class T>
void weight_gradient(const WeightGradient<T>& w, int64_t panel_begin, int64_t panel_end) {
  const Layer& layer = *w.layer;
  alignas(64) T out[kDotRows * kDotColumns];
  for (int64_t i = panel_begin; i < panel_end; ++i) {
    const Panel& panel = layer.panel[i];
    for (int64_t r = 0; r < panel.rows; ++r) {
      const T* g = w.g - (panel.row + r) * w.g_stride;
      typename VectorOf<T>::type sum = {};
      for (int64_t s = 0; s < w.samples; s += FK_VECTOR_BYTES / sizeof(T))
        sum += *reinterpret_cast<const typename VectorOf<T>::unaligned*>(g + s);
      w.bias[layer.perm[panel.row + r]] = sum_of<T>(sum);
    }
    for (int64_t k = 0; k < panel.depth; k += kDotColumns) {
      const int64_t columns = std::min<int64_t>(kDotColumns, panel.depth - k);
      for (int64_t r = 0; r < panel.rows; r += kDotRows) {
        const int64_t rows = std::min<int64_t>(kDotRows, panel.rows - r);
        const T* g = w.g - (panel.row + r) * w.g_stride;
        const T* a = w.a + k * w.a_stride;
        if (columns == kDotColumns)
          dot_rows<kDotRows>(rows, g, -w.g_stride, a, w.a_stride, w.samples, out);
        else
          for (int64_t x = 0; x < columns; ++x)
            for (int64_t y = 0; y < rows; ++y)
              dot_block<1, 1>(g - y * w.g_stride, 0, a + x * w.a_stride, 0, w.samples, out + y * kDotColumns + x);
        for (int64_t y = 0; y < rows; ++y) {
          const int64_t row = layer.perm[panel.row + r + y] * layer.weight_columns;
          for (int64_t x = 0; x < columns; ++x) {
            const int64_t at = row + w.column_perm[k + x];
            w.weight[at] = w.mask[at] ? out[y * kDotColumns + x] : T(0);
          }
        }
      }
    }
  }
}

}  // namespace fk::FK_ISA
