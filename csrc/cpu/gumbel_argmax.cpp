// gumbel_argmax on the CPU: exact categorical samples straight from the logits, with their log-probabilities.
#include "cpu/random.h"

namespace fk {

template <class T>
struct ArgmaxArguments {
  View<const T> logits, grad;
  View<const int64_t> index_in;
  const T* normaliser_in = nullptr;
  int64_t classes = 0, samples = 0;
  RandomStream stream;
  int64_t* index = nullptr;
  T *log_prob = nullptr, *normaliser = nullptr;
  View<T> grad_logits;
};

}  // namespace fk

#define FK_KERNELS "cpu/gumbel_argmax_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

static std::tuple<Tensor, Tensor, Tensor> gumbel_argmax(const Tensor& logits, const Tensor& seed, int64_t stream,
                                                        int64_t samples) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor index = new_empty(logits, {rows, samples}, ScalarType::Long), log_prob = new_empty(logits, {rows, samples}),
         normaliser = new_empty(logits, {rows, 2});
  dispatch_float(logits, [&]<class T>() {
    ArgmaxArguments<T> a;
    a.logits = view<T>(logits);
    a.classes = classes;
    a.samples = samples;
    a.stream = stream_of(seed, stream);
    a.index = static_cast<int64_t*>(index.mutable_data_ptr());
    a.log_prob = static_cast<T*>(log_prob.mutable_data_ptr());
    a.normaliser = static_cast<T*>(normaliser.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, grain_for(4 * (classes + samples)), [&](int64_t begin, int64_t end) {
      samples == 1 ? FK_BEST(gumbel_argmax<T>)(a, begin, end) : FK_BEST(gumbel_argmax_several<T>)(a, begin, end);
    });
  });
  return {index, log_prob, normaliser};
}

Tensor gumbel_argmax_backward(const Tensor& grad, const Tensor& logits, const Tensor& normaliser, const Tensor& index) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor grad_logits = new_empty(logits, {rows, classes});
  const Tensor saved = as_contiguous(normaliser);
  dispatch_float(logits, [&]<class T>() {
    ArgmaxArguments<T> a;
    a.logits = view<T>(logits);
    a.grad = view<T>(grad);
    a.index_in = view<int64_t>(index);
    a.normaliser_in = static_cast<const T*>(saved.const_data_ptr());
    a.classes = classes;
    a.samples = index.size(1);
    a.grad_logits = mutable_view<T>(grad_logits);
    torch::stable::parallel_for(0, rows, grain_for(classes),
                                [&](int64_t begin, int64_t end) { FK_BEST(gumbel_argmax_backward<T>)(a, begin, end); });
  });
  return grad_logits;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("gumbel_argmax", TORCH_BOX(&fk::gumbel_argmax));
  m.impl("gumbel_argmax_backward", TORCH_BOX(&fk::gumbel_argmax_backward));
}
