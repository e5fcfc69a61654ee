// Kernels of actnorm for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

// Which features of row r count: the positions, once for every channel.
template <class T>
void spread_mask(const ActnormArguments<T>& a, int64_t r, std::uint8_t* to) {
  const std::uint8_t* from = a.mask + r * a.positions;
  if (a.positions == 1)
    std::memset(to, *from, a.features);
  else
    for (int64_t c = 0; c < a.features; c += a.positions) std::memcpy(to + c, from, a.positions);
}

// n features of one row; `counts` says which of them do, or is null. Shifts and factors are pointers or constants.
template <bool Inverse, class T, class Values>
FK_INLINE void actnorm_run(const T* x, T* y, const std::uint8_t* counts, int64_t n, Values shift, Values factor) {
  if (counts) {
    FK_SIMD
    for (int64_t c = 0; c < n; ++c) {
      const T value = actnorm_of<Inverse>(x[c], shift[c], factor[c]);
      y[c] = counts[c] ? value : x[c];
    }
  } else {
    FK_SIMD
    for (int64_t c = 0; c < n; ++c) y[c] = actnorm_of<Inverse>(x[c], shift[c], factor[c]);
  }
}

template <bool Inverse, class T>
void actnorm_rows(const ActnormArguments<T>& a, int64_t begin, int64_t end) {
  // Channel by channel where one fills vectors: shifts and factors of every feature would be as much to read as x.
  const bool by_channel = a.positions >= kActnormPositions;
  std::vector<std::uint8_t> mask(a.mask && !by_channel ? a.features : 0);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = a.x + r * a.x_row;
    T* y = a.y + r * a.features;
    if (by_channel) {
      const std::uint8_t* counts = a.mask ? a.mask + r * a.positions : nullptr;
      for (int64_t c = 0; c < a.features; c += a.positions)
        actnorm_run<Inverse>(x + c, y + c, counts, a.positions, Constant<T>{a.shift[c]}, Constant<T>{a.factor[c]});
    } else {
      if (a.mask) spread_mask(a, r, mask.data());
      actnorm_run<Inverse>(x, y, a.mask ? mask.data() : nullptr, a.features, a.shift, a.factor);
    }
  }
}

// K rows at once, whose gradients of shift and scale are added in T before they go into the sums in double: one pass
// over the sums for K rows, and hardly a rounding error.
template <bool Inverse, bool Masked, int K, class T>
void actnorm_backward_rows(const ActnormArguments<T>& a, int64_t r, std::uint8_t* mask, T* unwanted, double* by_shift,
                           double* by_scale) {
  const T *shift = a.shift, *factor = a.factor;
  const T *grad[K], *y[K];
  const std::uint8_t* counts[K];
  T* grad_x[K];
  for (int k = 0; k < K; ++k) {
    grad[k] = a.x + (r + k) * a.x_row;
    y[k] = a.output + (r + k) * a.output_row;
    grad_x[k] = a.y ? a.y + (r + k) * a.features : unwanted + k * a.features;
    counts[k] = mask + k * a.features;
    if constexpr (Masked) spread_mask(a, r + k, mask + k * a.features);
  }
  FK_SIMD
  for (int64_t c = 0; c < a.features; ++c) {
    T sum_shift = 0, sum_scale = 0;
    for (int k = 0; k < K; ++k) {
      ActnormGradient<T> g = actnorm_backward_of<Inverse>(grad[k][c], y[k][c], shift[c], factor[c]);
      if constexpr (Masked) {
        const bool in = counts[k][c] != 0;
        g = {in ? g.x : grad[k][c], in ? g.shift : T(0), in ? g.log_scale : T(0)};
      }
      grad_x[k][c] = g.x;
      sum_shift += g.shift;
      sum_scale += g.log_scale;
    }
    by_shift[c] += static_cast<double>(sum_shift);
    by_scale[c] += static_cast<double>(sum_scale);
  }
}

template <bool Inverse, bool Masked, class T>
void actnorm_backward_blocks(const ActnormArguments<T>& a, int64_t begin, int64_t end) {
  std::vector<std::uint8_t> mask(Masked ? kActnormRows * a.features : 0);
  std::vector<T> unwanted(a.y ? 0 : kActnormRows * a.features);
  std::vector<double> sums(2 * a.features);
  double *by_shift = sums.data(), *by_scale = by_shift + a.features;
  for (int64_t block = begin; block < end; ++block) {
    std::fill(sums.begin(), sums.end(), 0.0);
    int64_t r = block * a.block_rows;
    const int64_t last = std::min<int64_t>(a.rows, r + a.block_rows);
    for (; r + kActnormRows <= last; r += kActnormRows)
      actnorm_backward_rows<Inverse, Masked, kActnormRows>(a, r, mask.data(), unwanted.data(), by_shift, by_scale);
    for (; r < last; ++r)
      actnorm_backward_rows<Inverse, Masked, 1>(a, r, mask.data(), unwanted.data(), by_shift, by_scale);
    double* out = a.sums + 2 * block * a.channels;
    for (int64_t c = 0; c < a.channels; ++c) {
      double shift = 0, scale = 0;
      for (int64_t p = c * a.positions; p < (c + 1) * a.positions; ++p) {
        shift += by_shift[p];
        scale += by_scale[p];
      }
      out[c] = shift;
      out[a.channels + c] = scale;
    }
  }
}

template <class T>
void actnorm(const ActnormArguments<T>& a, int64_t begin, int64_t end) {
  a.inverse ? actnorm_rows<true>(a, begin, end) : actnorm_rows<false>(a, begin, end);
}

template <class T>
void actnorm_backward(const ActnormArguments<T>& a, int64_t begin, int64_t end) {
  if (a.mask)
    a.inverse ? actnorm_backward_blocks<true, true>(a, begin, end)
              : actnorm_backward_blocks<false, true>(a, begin, end);
  else
    a.inverse ? actnorm_backward_blocks<true, false>(a, begin, end)
              : actnorm_backward_blocks<false, false>(a, begin, end);
}

}  // namespace fk::FK_ISA
