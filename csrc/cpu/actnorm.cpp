// actnorm on the CPU: one pass over memory each way; the gradients of shift and scale are summed in the same pass.
#include "common/actnorm.h"

#include "common/lanes.h"
#include "cpu/tensor.h"

namespace fk {

// So many rows are read together on the way back.
inline constexpr int kActnormRows = 4;

// With at least so many positions, channels are worked on one by one.
inline constexpr int64_t kActnormPositions = 64;

// One value for all features, read as if it were many.
template <class T>
struct Constant {
  T value;
  FK_INLINE T operator[](int64_t) const { return value; }
};

template <class T>
struct ActnormArguments {
  const T* x = nullptr;  // backward: the gradient of the output
  const T* output = nullptr;
  int64_t x_row = 0, output_row = 0;
  const std::uint8_t* mask = nullptr;           // (rows, positions), or null
  T* y = nullptr;                               // backward: the gradient of the input, null where nobody needs it
  const T *shift = nullptr, *factor = nullptr;  // of every feature
  double* sums = nullptr;                       // backward: (blocks, 2, channels)
  int64_t rows = 0, features = 0, channels = 0, positions = 0, block_rows = 0;
  bool inverse = false;
};

}  // namespace fk

#define FK_KERNELS "cpu/actnorm_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

// The tensors that `ActnormArguments` points into.
template <class T>
struct Actnorm {
  Tensor x, shift, log_scale;
  std::optional<Tensor> mask;
  std::vector<T> per_feature;
  double sum = 0;  // of the log-scales, with the direction's sign
  ActnormArguments<T> a;

  Actnorm(const Tensor& given, const Tensor& t, const Tensor& u, const std::optional<Tensor>& m, bool inverse)
      : x(adjacent(given)), shift(as_contiguous(t)), log_scale(as_contiguous(u)) {
    a.rows = x.size(0), a.features = x.size(1), a.channels = shift.size(0), a.inverse = inverse;
    STD_TORCH_CHECK(a.channels > 0 && log_scale.size(0) == a.channels && a.features % a.channels == 0, "x has ",
                    a.features, " features, shift and log_scale have ", a.channels, " and ", log_scale.size(0),
                    " channels");
    STD_TORCH_CHECK(shift.scalar_type() == x.scalar_type() && log_scale.scalar_type() == x.scalar_type(),
                    "x, shift and log_scale must have one type");
    a.positions = a.features / a.channels;
    a.x = static_cast<const T*>(x.const_data_ptr());
    a.x_row = x.stride(0);
    if (m.has_value()) {
      mask = as_contiguous(*m);
      STD_TORCH_CHECK(
          mask->scalar_type() == ScalarType::Bool && mask->size(0) == a.rows && mask->size(1) == a.positions,
          "mask must be boolean, rows by positions");
      a.mask = static_cast<const std::uint8_t*>(mask->const_data_ptr());
    }
    const T *shifts = static_cast<const T*>(shift.const_data_ptr()),
            *scales = static_cast<const T*>(log_scale.const_data_ptr());
    per_feature.resize(2 * a.features);
    for (int64_t c = 0; c < a.channels; ++c) {
      const double u_c = inverse ? -static_cast<double>(scales[c]) : static_cast<double>(scales[c]);
      sum += u_c;
      std::fill_n(per_feature.begin() + c * a.positions, a.positions, shifts[c]);
      std::fill_n(per_feature.begin() + a.features + c * a.positions, a.positions, static_cast<T>(std::exp(u_c)));
    }
    a.shift = per_feature.data();
    a.factor = a.shift + a.features;
  }

  static Tensor adjacent(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1 ? t : as_contiguous(t); }

  // How many positions of row r count.
  double count(int64_t r) const {
    if (!a.mask) return static_cast<double>(a.positions);
    return static_cast<double>(std::count(a.mask + r * a.positions, a.mask + (r + 1) * a.positions, std::uint8_t(1)));
  }
};

std::tuple<Tensor, Tensor> actnorm(const Tensor& x, const Tensor& shift, const Tensor& log_scale,
                                   const std::optional<Tensor>& logdet, const std::optional<Tensor>& mask,
                                   bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  dispatch_float(x, [&]<class T>() {
    Actnorm<T> call(x, shift, log_scale, mask, inverse);
    call.a.y = static_cast<T*>(y.mutable_data_ptr());
    std::optional<Tensor> running;
    if (logdet.has_value()) running = as_contiguous(*logdet);
    const T* from = data_or_null<T>(running);
    T* to = static_cast<T*>(total.mutable_data_ptr());
    for (int64_t r = 0; r < call.a.rows; ++r) {
      const T own = static_cast<T>(call.count(r) * call.sum);
      to[r] = from ? from[r] + own : own;
    }
    torch::stable::parallel_for(0, call.a.rows, grain_for(call.a.features),
                                [&](int64_t begin, int64_t end) { FK_BEST(actnorm<T>)(call.a, begin, end); });
  });
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> actnorm_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& y,
                                                    const Tensor& shift, const Tensor& log_scale,
                                                    const std::optional<Tensor>& mask, bool inverse, bool want_x) {
  const int64_t rows = y.size(0), channels = shift.size(0);
  Tensor grad_x = new_empty(y, {rows, want_x ? y.size(1) : 0});
  Tensor grad_shift = new_empty(y, {channels}), grad_log_scale = new_empty(y, {channels});
  dispatch_float(y, [&]<class T>() {
    Actnorm<T> call(grad_y, shift, log_scale, mask, inverse);
    const Tensor output = Actnorm<T>::adjacent(y), logdets = as_contiguous(grad_logdet);
    auto& a = call.a;
    a.output = static_cast<const T*>(output.const_data_ptr());
    a.output_row = output.stride(0);
    a.y = want_x ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;
    // Blocks depend on the number of rows alone, and their sums are added in order: the same bits with any number of
    // threads.
    a.block_rows = std::max<int64_t>(16 * kActnormRows, (rows / 64 + kActnormRows) / kActnormRows * kActnormRows);
    const int64_t blocks = (rows + a.block_rows - 1) / a.block_rows;
    std::vector<double> sums(2 * blocks * channels), total(2 * channels);
    a.sums = sums.data();
    torch::stable::parallel_for(0, blocks, grain_for(a.features * a.block_rows),
                                [&](int64_t begin, int64_t end) { FK_BEST(actnorm_backward<T>)(a, begin, end); });
    for (int64_t i = 0; i < 2 * blocks * channels; ++i) total[i % (2 * channels)] += sums[i];
    double by_logdet = 0;
    const T* g = static_cast<const T*>(logdets.const_data_ptr());
    for (int64_t r = 0; r < rows; ++r) by_logdet += call.count(r) * static_cast<double>(g[r]);
    T *to_shift = static_cast<T*>(grad_shift.mutable_data_ptr()),
      *to_scale = static_cast<T*>(grad_log_scale.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      to_shift[c] = static_cast<T>(total[c]);
      to_scale[c] = static_cast<T>(total[channels + c] + (inverse ? -by_logdet : by_logdet));
    }
  });
  return {grad_x, grad_shift, grad_log_scale};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&fk::actnorm));
  m.impl("actnorm_backward", TORCH_BOX(&fk::actnorm_backward));
}
