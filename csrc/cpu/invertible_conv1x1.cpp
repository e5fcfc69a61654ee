// invertible_conv1x1 on the CPU: tiles of positions, all channels of which stay in the cache while W is applied or its
// triangular factors are solved for; the gradient of W is summed in the same pass.
#include "cpu/tensor.h"

namespace fk {

template <class T>
struct ConvArguments {
  const T* x = nullptr;       // (rows, channels, positions)
  const T* flow_x = nullptr;  // backward: what the gradient of W is summed with
  T* y = nullptr;
  bool solve = false;
  const T *first = nullptr, *second = nullptr;  // solve: lower and upper triangle; else the matrix, and nothing
  const T* matrix_transposed = nullptr;         // where there is one position: rows of `padded` numbers
  const T *first_diagonal = nullptr, *second_diagonal = nullptr;
  const int64_t *order_in = nullptr, *order_out = nullptr;
  double* sums = nullptr;            // backward: (blocks, channels, channels), zeros; rows before they are reordered
  int64_t channels = 0, padded = 0;  // padded with zeros to whole vectors
  int64_t positions = 0, elements = 0, block = 0;
};

}  // namespace fk

#define FK_KERNELS "cpu/invertible_conv1x1_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

// L, U and W in double, whatever they are stored in: they are small, and every position sees their errors.
struct ConvFactors {
  int64_t channels, positions;
  std::vector<int64_t> permutation;
  std::vector<double> left, right, log_diagonal;  // (C, C) with their diagonals, (C, C), (C)

  template <class T>
  ConvFactors(const Tensor& x, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonals,
              const Tensor& signs, const Tensor& order, T) {
    const int64_t C = channels = lower.size(0);
    for (const Tensor* t : {&lower, &upper, &log_diagonals, &signs})
      STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->size(0) == C && t->size(t->dim() - 1) == C,
                      "the factors must have x's type and ", C, " channels");
    STD_TORCH_CHECK(x.size(1) % C == 0 && order.scalar_type() == ScalarType::Long && order.size(0) == C,
                    "permutation must be int64 and x have a multiple of ", C, " features");
    positions = x.size(1) / C;
    const Tensor l = as_contiguous(lower), u = as_contiguous(upper), d = as_contiguous(log_diagonals),
                 s = as_contiguous(signs), p = as_contiguous(order);
    const T *lo = static_cast<const T*>(l.const_data_ptr()), *up = static_cast<const T*>(u.const_data_ptr()),
            *diagonal = static_cast<const T*>(d.const_data_ptr()), *sign = static_cast<const T*>(s.const_data_ptr());
    left.assign(C * C, 0.0);
    right.assign(C * C, 0.0);
    for (int64_t i = 0; i < C; ++i) {
      log_diagonal.push_back(static_cast<double>(diagonal[i]));
      for (int64_t j = 0; j < i; ++j) left[i * C + j] = static_cast<double>(lo[i * C + j]);
      for (int64_t j = i + 1; j < C; ++j) right[i * C + j] = static_cast<double>(up[i * C + j]);
      left[i * C + i] = 1;
      right[i * C + i] = static_cast<double>(sign[i]) * std::exp(log_diagonal[i]);
    }
    const int64_t* from = static_cast<const int64_t*>(p.const_data_ptr());
    permutation.assign(from, from + C);
    for (int64_t i : permutation) STD_TORCH_CHECK(i >= 0 && i < C, "permutation has ", i, ", beyond ", C, " channels");
  }

  std::vector<double> weight() const {
    std::vector<double> product(channels * channels), w;
    FK_BEST(multiply_factors)(product.data(), left.data(), right.data(), channels);
    for (int64_t row : permutation)
      w.insert(w.end(), product.begin() + row * channels, product.begin() + (row + 1) * channels);
    return w;
  }

  double logdet(bool inverse) const {
    double sum = 0;
    for (double value : log_diagonal) sum += value;
    return static_cast<double>(inverse ? -positions : positions) * sum;
  }
};

template <class T>
std::vector<T> rounded(const std::vector<double>& from, int64_t channels, bool transposed) {
  std::vector<T> to(from.size());
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j < channels; ++j)
      to[i * channels + j] = static_cast<T>(transposed ? from[j * channels + i] : from[i * channels + j]);
  return to;
}

// y = W x or W^-1 x, transposed: with W' in place of W. With `flow_x`, returns the sum over positions of grad flow_x',
// where grad is x, or y in the inverse direction.
template <class T>
std::vector<double> apply(const ConvFactors& f, const Tensor& given, Tensor& y, bool inverse, bool transposed,
                          const Tensor* flow_x) {
  const int64_t C = f.channels;
  const Tensor x = as_contiguous(given);
  ConvArguments<T> a;
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.y = static_cast<T*>(y.mutable_data_ptr());
  a.solve = inverse;
  a.channels = C;
  a.positions = f.positions;
  a.elements = x.size(0) * f.positions;
  a.padded = (C + 15) / 16 * 16;
  std::vector<T> first, second, padded, diagonal(C);
  if (inverse) {
    // (P L U)^-1 = U^-1 L^-1 P^-1; transposed, P L^-T U^-T.
    first = rounded<T>(transposed ? f.right : f.left, C, transposed);
    second = rounded<T>(transposed ? f.left : f.right, C, transposed);
    for (int64_t i = 0; i < C; ++i) diagonal[i] = static_cast<T>(f.right[i * C + i]);
    (transposed ? a.first_diagonal : a.second_diagonal) = diagonal.data();
    (transposed ? a.order_out : a.order_in) = f.permutation.data();
    a.second = second.data();
  } else {
    first = rounded<T>(f.weight(), C, transposed != (f.positions == 1));
    if (f.positions == 1) {
      padded.resize(C * a.padded);
      for (int64_t i = 0; i < C; ++i) std::copy_n(first.begin() + i * C, C, padded.begin() + i * a.padded);
      a.matrix_transposed = padded.data();
    }
  }
  a.first = first.data();
  // Blocks depend on the number of positions alone, and their sums are added in order: the same bits with any number
  // of threads.
  a.block = std::max<int64_t>(1024, (a.elements / 16 + 1023) / 1024 * 1024);
  const int64_t blocks = (a.elements + a.block - 1) / a.block;
  std::vector<double> sums(flow_x ? blocks * C * C : 0), total(flow_x ? C * C : 0);
  const Tensor kept = as_contiguous(flow_x ? *flow_x : given);
  if (flow_x) a.flow_x = static_cast<const T*>(kept.const_data_ptr());
  a.sums = sums.data();
  torch::stable::parallel_for(0, blocks, grain_for(a.block * C),
                              [&](int64_t begin, int64_t end) { FK_BEST(invertible_conv1x1<T>)(a, begin, end); });
  for (int64_t block = 0; flow_x && block < blocks; ++block)
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = 0; j < C; ++j)
        total[i * C + j] += sums[(block * C + (a.order_out ? a.order_out[i] : i)) * C + j];
  return total;
}

std::tuple<Tensor, Tensor> invertible_conv1x1(const Tensor& x, const Tensor& lower, const Tensor& upper,
                                              const Tensor& log_diagonal, const Tensor& sign, const Tensor& permutation,
                                              const std::optional<Tensor>& logdet, bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  dispatch_float(x, [&]<class T>() {
    const ConvFactors f(x, lower, upper, log_diagonal, sign, permutation, T());
    apply<T>(f, x, y, inverse, false, nullptr);
    std::optional<Tensor> running;
    if (logdet.has_value()) running = as_contiguous(*logdet);
    const T* from = data_or_null<T>(running);
    T* to = static_cast<T*>(total.mutable_data_ptr());
    const T own = static_cast<T>(f.logdet(inverse));
    for (int64_t r = 0; r < x.size(0); ++r) to[r] = from ? from[r] + own : own;
  });
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> invertible_conv1x1_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                                       const Tensor& flow_x, const Tensor& lower,
                                                                       const Tensor& upper, const Tensor& log_diagonal,
                                                                       const Tensor& sign, const Tensor& permutation,
                                                                       bool inverse) {
  const int64_t C = lower.size(0);
  Tensor grad_x = new_empty(grad_y, {grad_y.size(0), grad_y.size(1)});
  Tensor grad_lower = new_empty(lower, {C, C}), grad_upper = new_empty(lower, {C, C}),
         grad_diagonal = new_empty(lower, {C});
  dispatch_float(grad_y, [&]<class T>() {
    const ConvFactors f(grad_y, lower, upper, log_diagonal, sign, permutation, T());
    const std::vector<double> of_weight = apply<T>(f, grad_y, grad_x, inverse, true, &flow_x);
    // Of L U: the rows of W in L's order.
    std::vector<double> product(C * C), of_lower(C * C), of_upper(C * C);
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = 0; j < C; ++j)
        product[f.permutation[i] * C + j] = inverse ? -of_weight[i * C + j] : of_weight[i * C + j];
    const std::vector<double> left = rounded<double>(f.left, C, true), right = rounded<double>(f.right, C, true);
    FK_BEST(factor_gradients)(of_lower.data(), of_upper.data(), product.data(), left.data(), right.data(), C);
    const Tensor logdets = as_contiguous(grad_logdet);
    const T* g = static_cast<const T*>(logdets.const_data_ptr());
    double by_logdet = 0;
    for (int64_t r = 0; r < grad_y.size(0); ++r) by_logdet += static_cast<double>(g[r]);
    by_logdet *= static_cast<double>(inverse ? -f.positions : f.positions);
    T *to_lower = static_cast<T*>(grad_lower.mutable_data_ptr()),
      *to_upper = static_cast<T*>(grad_upper.mutable_data_ptr()),
      *to_diagonal = static_cast<T*>(grad_diagonal.mutable_data_ptr());
    for (int64_t i = 0; i < C; ++i) {
      to_diagonal[i] = static_cast<T>(of_upper[i * C + i] * f.right[i * C + i] + by_logdet);
      for (int64_t j = 0; j < C; ++j) {
        to_lower[i * C + j] = static_cast<T>(j < i ? of_lower[i * C + j] : 0.0);
        to_upper[i * C + j] = static_cast<T>(j > i ? of_upper[i * C + j] : 0.0);
      }
    }
  });
  return {grad_x, grad_lower, grad_upper, grad_diagonal};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("invertible_conv1x1", TORCH_BOX(&fk::invertible_conv1x1));
  m.impl("invertible_conv1x1_backward", TORCH_BOX(&fk::invertible_conv1x1_backward));
}
