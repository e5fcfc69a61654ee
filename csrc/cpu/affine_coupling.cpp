// affine_coupling on the CPU: y and the log-det of an affine transform, one pass over memory, and its
// backward.
#include "cpu/tensor.h"

#include "common/elementwise.h"

namespace fk {

// A row is walked in chunks of this many features, each copied to local arrays first: the compiler then
// vectorises the arithmetic whatever the strides are, and the log-det has the same summation order for every
// instruction set.
// 32, because GCC unrolls loops of up to 16 rounds completely before it looks for vectors, and then finds
// none.
inline constexpr int kChunk = 32;

// What a mask makes of one chunk of features.
enum class Part : int {
  dense,   // all transformed, their parameters adjacent
  copy,    // all identity
  select,  // some transformed, parameters of the full width
  expand,  // some transformed, parameters of these alone and in their order
  gather,  // parameters in another order
};

struct Chunk {
  Part part = Part::dense;
  int64_t parameter = 0;              // where the parameters of a chunk begin, unless it is a gather
  int32_t count = 0;                  // how many features are transformed
  int32_t lane[kChunk];               // each feature's parameter, -1: identity
  int32_t before[kChunk / 2];         // how many features before feature 2 i are transformed
  int32_t transformed[2 * kChunk]{};  // which ones are; the rest is there to be read past the end
};

struct AffineArguments {
  Rows x, shift, scale, grad_y;
  Rows y, grad_x, grad_shift, grad_scale;  // a gradient that nobody needs has no data
  const void* logdet_in = nullptr;
  const void* grad_logdet = nullptr;
  void* logdet = nullptr;
  int64_t features = 0;
  const Chunk* chunks = nullptr;  // null: every feature is transformed
  int64_t width = 0;              // columns of shift and scale
  bool full_width = true;         // shift and scale have a column for every feature
  Law law_name = Law::exp;
  double law[3] = {};
  Form form = Form::scale_shift;
  bool inverse = false;
};

}  // namespace fk

#define FK_KERNELS "cpu/affine_coupling_kernels.h"
#include "cpu/foreach_isa.h"

namespace fk {

// Which gradients are wanted, as bits of the operator's `needs`.
enum Needs : int64_t { kNeedsX = 1, kNeedsShift = 2, kNeedsScale = 4 };

// positions[i] is the column of feature i in shift and scale, -1 where it stays as it is.
std::vector<Chunk> chunks_of(const Tensor& positions, int64_t features, int64_t width) {
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.dim() == 1 &&
                      positions.size(0) == features && (features == 1 || positions.stride(0) == 1),
                  "positions must be ", features, " adjacent int64 numbers");
  STD_TORCH_CHECK(features < (int64_t{1} << 31), "masks are for fewer than 2^31 features, got ", features);
  const int64_t* position = static_cast<const int64_t*>(positions.const_data_ptr());
  std::vector<Chunk> chunks((features + kChunk - 1) / kChunk);
  int64_t selected = 0, highest = -1;
  bool ordered = true;
  for (int64_t c = 0; c < features; c += kChunk) {
    Chunk& chunk = chunks[c / kChunk];
    const int n = static_cast<int>(std::min<int64_t>(kChunk, features - c));
    int transformed = 0, own = 0, adjacent = 0;
    for (int i = 0; i < kChunk; ++i) {
      const int64_t p = i < n ? position[c + i] : -1;
      STD_TORCH_CHECK(p >= -1 && p < width, "feature ", c + i, " of the mask asks for parameter ", p, " of ", width);
      chunk.lane[i] = static_cast<int32_t>(p);
      if (i % 2 == 0) chunk.before[i / 2] = transformed;
      if (p >= 0) {
        chunk.transformed[transformed] = i;
        ordered = ordered && p == highest + 1;
        highest = p;
      }
      transformed += p >= 0;
      own += p == c + i;
      adjacent += i < n && p >= 0 && p == position[c] + i;
    }
    chunk.part = transformed == 0                          ? Part::copy
                 : adjacent == n                           ? Part::dense
                 : own == transformed && width == features ? Part::select
                                                           : Part::gather;
    chunk.count = transformed;
    chunk.parameter = chunk.part == Part::dense ? position[c] : chunk.part == Part::gather ? selected : c;
    selected += transformed;
  }
  // All of them or none: what is stored past the end of a chunk's gradients is written over by the next chunk.
  for (Chunk& chunk : chunks)
    if (ordered && width == selected && chunk.part == Part::gather) chunk.part = Part::expand;
  STD_TORCH_CHECK(width == features || width == selected, "shift and scale have ", width,
                  " columns, but the mask selects ", selected, " of ", features, " features");
  return chunks;
}

AffineArguments affine_arguments(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                 const std::optional<Tensor>& positions, std::vector<Chunk>& chunks, int64_t law,
                                 const std::vector<double>& law_parameters, int64_t form, bool inverse) {
  AffineArguments a;
  a.x = rows(x);
  a.shift = rows(shift);
  a.scale = rows(scale);
  a.features = x.size(1);
  a.width = shift.size(1);
  a.full_width = a.width == a.features;
  for (const Tensor* t : {&shift, &scale}) {
    STD_TORCH_CHECK(t->size(0) == x.size(0) && t->size(1) == shift.size(1),
                    "shift and scale must have x's rows and one width");
    STD_TORCH_CHECK(compute_type(*t) == compute_type(x), "float64 goes with float64 only");
  }
  if (positions.has_value()) {
    chunks = chunks_of(*positions, a.features, shift.size(1));
    a.chunks = chunks.data();
  } else {
    STD_TORCH_CHECK(a.full_width, "without a mask, shift and scale must have x's width");
  }
  a.law_name = static_cast<Law>(law);
  std::copy_n(law_parameters.begin(), 3, a.law);
  a.form = static_cast<Form>(form);
  a.inverse = inverse;
  return a;
}

template <bool Backward>
void run(const Tensor& x, const AffineArguments& a) {
  dispatch_compute(x, [&]<class T>() {
    torch::stable::parallel_for(0, x.size(0), grain_for(x.size(1)), [&](int64_t begin, int64_t end) {
      FK_BEST(affine_coupling<T, Backward>)(a, begin, end);
    });
  });
}

static std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                  const std::optional<Tensor>& logdet,
                                                  const std::optional<Tensor>& positions, int64_t law,
                                                  const std::vector<double>& law_parameters, int64_t form,
                                                  bool inverse) {
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)}, compute_type(x));
  std::vector<Chunk> chunks;
  auto a = affine_arguments(x, shift, scale, positions, chunks, law, law_parameters, form, inverse);
  std::optional<Tensor> running;
  if (logdet.has_value()) {
    STD_TORCH_CHECK(logdet->scalar_type() == compute_type(x) && logdet->dim() == 1 && logdet->size(0) == x.size(0),
                    "logdet must have one number per row, in the type that is calculated in");
    running = as_contiguous(*logdet);
    a.logdet_in = running->const_data_ptr();
  }
  a.y = rows(y);
  a.logdet = total.mutable_data_ptr();
  run<false>(x, a);
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                            const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                            const std::optional<Tensor>& positions, int64_t law,
                                                            const std::vector<double>& law_parameters, int64_t form,
                                                            bool inverse, int64_t needs) {
  const int64_t n = x.size(0);
  Tensor grad_x = new_empty(x, {n, needs & kNeedsX ? x.size(1) : 0});
  Tensor grad_shift = new_empty(shift, {n, needs & kNeedsShift ? shift.size(1) : 0});
  Tensor grad_scale = new_empty(scale, {n, needs & kNeedsScale ? scale.size(1) : 0});
  std::vector<Chunk> chunks;
  auto a = affine_arguments(x, shift, scale, positions, chunks, law, law_parameters, form, inverse);
  const Tensor grad_rows = as_contiguous(grad_logdet);
  a.grad_y = rows(grad_y);
  a.grad_logdet = grad_rows.const_data_ptr();
  if (needs & kNeedsX) a.grad_x = rows(grad_x);
  if (needs & kNeedsShift) a.grad_shift = rows(grad_shift);
  if (needs & kNeedsScale) a.grad_scale = rows(grad_scale);
  run<true>(x, a);
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&fk::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&fk::affine_coupling_backward));
}
