// vector_quantize on the CPU: the nearest code of every sample; distances live in registers, never in memory.
#include <memory>

#include "cpu/tensor.h"

namespace fk {

// Codes are packed in panels of this many: (panel, feature, code).
inline constexpr int64_t kPanel = 16;

template <class T>
struct QuantizeArguments {
  View<const T> x, grad_quantized;
  const T *codebook = nullptr, *packed = nullptr, *half_norm = nullptr, *grad_loss = nullptr;
  const int64_t* index_in = nullptr;
  int64_t rows = 0, features = 0, codes = 0;
  T weight = T(0);
  T *quantized = nullptr, *distance = nullptr, *sums = nullptr;
  int64_t* index = nullptr;
};

}  // namespace fk

#define FK_KERNELS "cpu/vector_quantize_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

template <class T>
struct Packed {
  std::vector<T> panels, half_norm;
};

template <class T>
Packed<T> pack(const T* codebook, int64_t codes, int64_t features) {
  const int64_t padded = (codes + kPanel - 1) / kPanel * kPanel;
  Packed<T> p{std::vector<T>(padded * features), std::vector<T>(padded, std::numeric_limits<T>::infinity())};
  torch::stable::parallel_for(0, codes, grain_for(features), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T norm = T(0);
      for (int64_t f = 0; f < features; ++f) {
        const T e = codebook[k * features + f];
        p.panels[k / kPanel * kPanel * features + f * kPanel + k % kPanel] = e;
        norm += e * e;
      }
      p.half_norm[k] = norm / T(2);
    }
  });
  return p;
}

// The search; `a` has the outputs that are wanted.
template <class T>
void search(QuantizeArguments<T> a, const Tensor& x, const Tensor& codebook, Tensor& index) {
  const Tensor dense = as_contiguous(codebook);
  a.x = view<T>(x);
  a.codebook = static_cast<const T*>(dense.const_data_ptr());
  a.features = x.size(1);
  a.codes = codebook.size(0);
  const Packed<T> packed = pack(a.codebook, a.codes, a.features);
  a.packed = packed.panels.data();
  a.half_norm = packed.half_norm.data();
  a.index = static_cast<int64_t*>(index.mutable_data_ptr());
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(kPanel, grain_for(a.features * a.codes)),
                              [&](int64_t begin, int64_t end) { FK_BEST(vector_quantize<T>)(a, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> vector_quantize(const Tensor& x, const Tensor& codebook) {
  const int64_t rows = x.size(0);
  Tensor quantized = new_empty(x, {rows, x.size(1)}), index = new_empty(x, {rows}, ScalarType::Long),
         distance = new_empty(x, {rows});
  dispatch_float(x, [&]<class T>() {
    QuantizeArguments<T> a;
    a.quantized = static_cast<T*>(quantized.mutable_data_ptr());
    a.distance = static_cast<T*>(distance.mutable_data_ptr());
    search(a, x, codebook, index);
  });
  return {quantized, index, distance};
}

Tensor nearest_code(const Tensor& x, const Tensor& codebook) {
  Tensor index = new_empty(x, {x.size(0)}, ScalarType::Long);
  dispatch_float(x, [&]<class T>() { search(QuantizeArguments<T>{}, x, codebook, index); });
  return index;
}

// Sums over the samples of each code: one pass per 16 features, threads take features.
template <class T>
void sum_by_code(const QuantizeArguments<T>& a) {
  torch::stable::parallel_for(0, (a.features + 15) / 16, grain_for(16 * a.rows),
                              [&](int64_t begin, int64_t end) { FK_BEST(vector_quantize_sums<T>)(a, begin, end); });
}

std::tuple<Tensor, Tensor> vector_quantize_backward(const Tensor& grad_quantized, const Tensor& grad_loss,
                                                    const Tensor& x, const Tensor& codebook, const Tensor& index,
                                                    double commitment, double codebook_weight, bool for_codebook) {
  const int64_t rows = x.size(0), features = x.size(1), codes = codebook.size(0);
  Tensor grad_x = new_empty(x, {rows, features}), grad_codebook = new_empty(x, {for_codebook ? codes : 0, features});
  const Tensor dense = as_contiguous(codebook), loss = as_contiguous(grad_loss), which = as_contiguous(index);
  dispatch_float(x, [&]<class T>() {
    QuantizeArguments<T> a;
    a.x = view<T>(x);
    a.grad_quantized = view<T>(grad_quantized);
    a.codebook = static_cast<const T*>(dense.const_data_ptr());
    a.grad_loss = static_cast<const T*>(loss.const_data_ptr());
    a.index_in = static_cast<const int64_t*>(which.const_data_ptr());
    a.rows = rows;
    a.features = features;
    a.codes = codes;
    a.weight = static_cast<T>(commitment);
    a.quantized = static_cast<T*>(grad_x.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, grain_for(features),
                                [&](int64_t begin, int64_t end) { FK_BEST(vector_quantize_grad_x<T>)(a, begin, end); });
    if (for_codebook) {
      a.weight = static_cast<T>(codebook_weight);
      a.sums = static_cast<T*>(grad_codebook.mutable_data_ptr());
      sum_by_code(a);
    }
  });
  return {grad_x, grad_codebook};
}

std::tuple<Tensor, Tensor> vector_quantize_sums(const Tensor& x, const Tensor& index, int64_t codes) {
  Tensor sums = new_empty(x, {codes, x.size(1)}), counts = new_empty(x, {codes});
  const Tensor which = as_contiguous(index);
  dispatch_float(x, [&]<class T>() {
    QuantizeArguments<T> a;
    a.x = view<T>(x);
    a.index_in = static_cast<const int64_t*>(which.const_data_ptr());
    a.rows = x.size(0);
    a.features = x.size(1);
    a.codes = codes;
    a.sums = static_cast<T*>(sums.mutable_data_ptr());
    for (int64_t r = 0; r < a.rows; ++r)
      STD_TORCH_CHECK(0 <= a.index_in[r] && a.index_in[r] < codes, "index must lie in [0, ", codes, "), got ",
                      a.index_in[r]);
    sum_by_code(a);
    std::vector<int64_t> count(codes);
    for (int64_t r = 0; r < a.rows; ++r) ++count[a.index_in[r]];
    T* out = static_cast<T*>(counts.mutable_data_ptr());
    for (int64_t k = 0; k < codes; ++k) out[k] = static_cast<T>(count[k]);
  });
  return {sums, counts};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&fk::vector_quantize));
  m.impl("nearest_code", TORCH_BOX(&fk::nearest_code));
  m.impl("vector_quantize_backward", TORCH_BOX(&fk::vector_quantize_backward));
  m.impl("vector_quantize_sums", TORCH_BOX(&fk::vector_quantize_sums));
}
