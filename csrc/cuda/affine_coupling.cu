// affine_coupling on CUDA: one pass over memory, sixteen bytes at a time where strides and addresses allow it.
//
// A row belongs to one warp, or to a whole block when rows are few or very wide. The log-det is summed per thread over
// a fixed set of features and then across threads in a fixed order, so the same input gives the same bits.
#include "common/affine_by_name.h"
#include "cuda/row.h"

namespace fk {

template <class S, class T>
struct AffineCall {
  View<const S> x, shift, scale, grad_y;
  View<S> y, grad_x, grad_shift, grad_scale;
  const T* logdet_in;
  const T* grad_logdet;
  T* logdet;
  int64_t rows, features;
  // Column of each feature in shift and scale, -1: the feature stays as it is. Null: every feature has its own.
  const int64_t* positions;
  NamedAffine<T> affine;
  bool wide;  // a block per row
  // Which tensors can be read and written sixteen bytes at a time.
  bool vector_x, vector_shift, vector_scale;
};

template <class S>
inline constexpr int kPer = Pack16<S>::kCount;

// kPer elements from column c on; what lies beyond the row's end is zero.
template <class S, class T>
__device__ inline void load(T (&to)[kPer<S>], const View<const S>& from, int64_t r, int64_t c, int64_t features,
                            bool vector) {
  const S* at = from.data + r * from.row + c * from.column;
  if (vector) {
    const Pack16<S> pack = *reinterpret_cast<const Pack16<S>*>(at);
#pragma unroll
    for (int i = 0; i < kPer<S>; ++i) to[i] = static_cast<T>(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPer<S>; ++i) to[i] = c + i < features ? static_cast<T>(at[i * from.column]) : T(0);
  }
}

template <class S, class T>
__device__ inline void store(const View<S>& to, int64_t r, int64_t c, const T (&from)[kPer<S>], int64_t features,
                             bool vector) {
  S* at = to.data + r * to.row + c * to.column;
  if (vector) {
    Pack16<S> pack;
#pragma unroll
    for (int i = 0; i < kPer<S>; ++i) pack.value[i] = static_cast<S>(from[i]);
    *reinterpret_cast<Pack16<S>*>(at) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kPer<S>; ++i)
      if (c + i < features) at[i * to.column] = static_cast<S>(from[i]);
  }
}

// Which of kPer features from c on are transformed, and the columns of their parameters.
template <class S, class T>
__device__ inline void find_columns(int64_t (&to)[kPer<S>], const AffineCall<S, T>& a, int64_t c) {
#pragma unroll
  for (int i = 0; i < kPer<S>; ++i) to[i] = c + i < a.features ? a.positions[c + i] : -1;
}

template <class S, class T>
__device__ inline void load_columns(T (&to)[kPer<S>], const View<const S>& from, int64_t r,
                                    const int64_t (&columns)[kPer<S>]) {
#pragma unroll
  for (int i = 0; i < kPer<S>; ++i)
    to[i] = columns[i] >= 0 ? static_cast<T>(from.data[r * from.row + columns[i] * from.column]) : T(0);
}

template <class S, class T>
__device__ inline void store_columns(const View<S>& to, int64_t r, const int64_t (&columns)[kPer<S>],
                                     const T (&from)[kPer<S>]) {
#pragma unroll
  for (int i = 0; i < kPer<S>; ++i)
    if (columns[i] >= 0) to.data[r * to.row + columns[i] * to.column] = static_cast<S>(from[i]);
}

template <class S, class T, bool Masked>
__global__ void __launch_bounds__(kRowThreads) affine_coupling_kernel(const AffineCall<S, T> a) {
  __shared__ T partial[kRowWarps];
  const auto [r, thread, threads] = row_thread(a.wide);
  T total = T(0);
  if (r < a.rows) {
    for (int64_t c = thread * kPer<S>; c < a.features; c += threads * kPer<S>) {
      T x[kPer<S>], shift[kPer<S>], u[kPer<S>];
      load<S, T>(x, a.x, r, c, a.features, a.vector_x);
      int64_t columns[kPer<S>];
      if constexpr (Masked) {
        find_columns(columns, a, c);
        load_columns(shift, a.shift, r, columns);
        load_columns(u, a.scale, r, columns);
      } else {
        load<S, T>(shift, a.shift, r, c, a.features, a.vector_shift);
        load<S, T>(u, a.scale, r, c, a.features, a.vector_scale);
      }
#pragma unroll
      for (int i = 0; i < kPer<S>; ++i) {
        if constexpr (Masked)
          if (columns[i] < 0) continue;
        const Transformed<T> out = affine_by_name(a.affine, x[i], shift[i], u[i]);
        x[i] = out.y;
        total += c + i < a.features ? out.logdet : T(0);
      }
      store<S, T>(a.y, r, c, x, a.features, a.vector_x);
    }
  }
  total = row_sum(total, a.wide, partial);
  if (thread == 0 && r < a.rows) a.logdet[r] = total + (a.logdet_in ? a.logdet_in[r] : T(0));
}

template <class S, class T, bool Masked>
__global__ void __launch_bounds__(kRowThreads) affine_coupling_backward_kernel(const AffineCall<S, T> a) {
  const auto [r, thread, threads] = row_thread(a.wide);
  if (r >= a.rows) return;
  const T grad_logdet = a.grad_logdet[r];
  for (int64_t c = thread * kPer<S>; c < a.features; c += threads * kPer<S>) {
    T x[kPer<S>], shift[kPer<S>], u[kPer<S>], gy[kPer<S>];
    load<S, T>(x, a.x, r, c, a.features, a.vector_x);
    int64_t columns[kPer<S>];
    if constexpr (Masked) {
      find_columns(columns, a, c);
      load_columns(shift, a.shift, r, columns);
      load_columns(u, a.scale, r, columns);
    } else {
      load<S, T>(shift, a.shift, r, c, a.features, a.vector_shift);
      load<S, T>(u, a.scale, r, c, a.features, a.vector_scale);
    }
    load<S, T>(gy, a.grad_y, r, c, a.features, a.vector_x);
#pragma unroll
    for (int i = 0; i < kPer<S>; ++i) {
      if constexpr (Masked)
        if (columns[i] < 0) {
          x[i] = gy[i];
          continue;
        }
      const AffineGradient<T> g = affine_backward_by_name(a.affine, gy[i], grad_logdet, x[i], shift[i], u[i]);
      x[i] = g.x;
      shift[i] = g.shift;
      u[i] = g.u;
    }
    store<S, T>(a.grad_x, r, c, x, a.features, a.vector_x);
    if constexpr (Masked) {
      store_columns(a.grad_shift, r, columns, shift);
      store_columns(a.grad_scale, r, columns, u);
    } else {
      store<S, T>(a.grad_shift, r, c, shift, a.features, a.vector_x);
      store<S, T>(a.grad_scale, r, c, u, a.features, a.vector_x);
    }
  }
}

template <class S>
bool vectorises(const View<S>& v, int64_t features) {
  return v.column == 1 && v.row % kPer<std::remove_const_t<S>> == 0 && features % kPer<std::remove_const_t<S>> == 0 &&
         reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
}

template <class S, class T>
AffineCall<S, T> affine_call(const Tensor& x, const Tensor& shift, const Tensor& scale,
                             const std::optional<Tensor>& positions, int64_t law,
                             const std::vector<double>& law_parameters, int64_t form, bool inverse) {
  AffineCall<S, T> a{};
  a.x = view<S>(x);
  a.shift = view<S>(shift);
  a.scale = view<S>(scale);
  a.positions = data_or_null<int64_t>(positions);
  a.rows = x.size(0);
  a.features = x.size(1);
  a.affine = {law_parameters_of<T>(law_parameters), static_cast<Law>(law), static_cast<Form>(form), inverse};
  a.vector_x = vectorises(a.x, a.features);
  a.vector_shift = vectorises(a.shift, a.features);
  a.vector_scale = vectorises(a.scale, a.features);
  return a;
}

template <class S>
View<S> dense(Tensor& t, int64_t features) {
  return {static_cast<S*>(t.mutable_data_ptr()), features, 1};
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                           const std::optional<Tensor>& logdet, const std::optional<Tensor>& positions,
                                           int64_t law, const std::vector<double>& law_parameters, int64_t form,
                                           bool inverse) {
  const OnDevice device(x);
  const int64_t rows = x.size(0), features = x.size(1);
  const ScalarType sum = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = new_empty(x, {rows, features}), total = new_empty(x, {rows}, sum);
  std::optional<Tensor> running;
  if (logdet) running = torch::stable::contiguous(*logdet);
  dispatch_storage(x, [&]<class S, class T>() {
    auto a = affine_call<S, T>(x, shift, scale, positions, law, law_parameters, form, inverse);
    a.y = dense<S>(y, features);
    a.vector_x = a.vector_x && vectorises(a.y, features);
    a.logdet_in = data_or_null<T>(running);
    a.logdet = static_cast<T*>(total.mutable_data_ptr());
    a.wide = wide_rows(device, rows, features);
    launch(device, "affine_coupling",
           positions ? affine_coupling_kernel<S, T, true> : affine_coupling_kernel<S, T, false>,
           row_blocks(rows, a.wide), kRowThreads, 0, a);
  });
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                            const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                            const std::optional<Tensor>& positions, int64_t law,
                                                            const std::vector<double>& law_parameters, int64_t form,
                                                            bool inverse) {
  const OnDevice device(x);
  const int64_t rows = x.size(0), features = x.size(1);
  const int64_t width = shift.size(1);
  Tensor grad_x = new_empty(x, {rows, features});
  // With positions there may be columns that no feature reads.
  const std::vector<int64_t> size{rows, width};
  Tensor grad_shift = positions ? torch::stable::new_zeros(x, size) : torch::stable::new_empty(x, size),
         grad_scale = positions ? torch::stable::new_zeros(x, size) : torch::stable::new_empty(x, size);
  const Tensor grad_rows = torch::stable::contiguous(grad_logdet);
  dispatch_storage(x, [&]<class S, class T>() {
    auto a = affine_call<S, T>(x, shift, scale, positions, law, law_parameters, form, inverse);
    a.grad_y = view<S>(grad_y);
    a.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    a.grad_x = dense<S>(grad_x, features);
    a.grad_shift = dense<S>(grad_shift, width);
    a.grad_scale = dense<S>(grad_scale, width);
    a.vector_x = a.vector_x && vectorises(a.grad_y, features) && vectorises(a.grad_x, features) &&
                 (positions || (vectorises(a.grad_shift, features) && vectorises(a.grad_scale, features)));
    a.wide = wide_rows(device, rows, features);
    launch(device, "affine_coupling_backward",
           positions ? affine_coupling_backward_kernel<S, T, true> : affine_coupling_backward_kernel<S, T, false>,
           row_blocks(rows, a.wide), kRowThreads, 0, a);
  });
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_cuda, m) {
  m.def(
      "affine_coupling(Tensor x, Tensor shift, Tensor scale, Tensor? logdet, Tensor? positions, int law, float[] "
      "law_parameters, int form, "
      "bool inverse) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor shift, Tensor scale, Tensor? "
      "positions, int law, "
      "float[] law_parameters, int form, bool inverse) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flowkernels_cuda, FK_DEVICE_KEY, m) {
  m.impl("affine_coupling", TORCH_BOX(&fk::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&fk::affine_coupling_backward));
}
