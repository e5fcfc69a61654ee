// Kernels of affine_coupling for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

// A row is walked in chunks of this many elements, each copied to a local array first: the compiler then vectorises the
// arithmetic whatever the strides are, and the log-det has the same summation order for every instruction set.
inline constexpr int kChunk = 16;

template <class T>
FK_INLINE void load_chunk(T (&to)[kChunk], const T* from, int64_t stride, int n) {
  if (stride == 1 && n == kChunk) {
    for (int i = 0; i < kChunk; ++i) to[i] = from[i];
  } else {
    for (int i = 0; i < kChunk; ++i) to[i] = i < n ? from[i * stride] : T(0);
  }
}

template <class T>
FK_INLINE void store_chunk(T* to, int64_t stride, const T (&from)[kChunk], int n) {
  if (stride == 1 && n == kChunk) {
    for (int i = 0; i < kChunk; ++i) to[i] = from[i];
  } else {
    for (int i = 0; i < n; ++i) to[i * stride] = from[i];
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_rows(const AffineArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T total[kChunk] = {};
    for (int64_t c = 0; c < a.features; c += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, a.features - c));
      T x[kChunk], shift[kChunk], u[kChunk], y[kChunk];
      load_chunk(x, &a.x(r, c), a.x.column, n);
      load_chunk(shift, &a.shift(r, c), a.shift.column, n);
      load_chunk(u, &a.scale(r, c), a.scale.column, n);
      for (int i = 0; i < kChunk; ++i) {
        const Transformed<T> out = affine<L, F, Inverse>(x[i], shift[i], u[i], a.law);
        y[i] = out.y;
        total[i] += i < n ? out.logdet : T(0);
      }
      store_chunk(&a.y(r, c), a.y.column, y, n);
    }
    T sum = a.logdet_in ? a.logdet_in[r] : T(0);
    for (int i = 0; i < kChunk; ++i) sum += total[i];
    a.logdet[r] = sum;
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_backward_rows(const AffineArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.features; c += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, a.features - c));
      T x[kChunk], shift[kChunk], u[kChunk], gy[kChunk], gx[kChunk], gshift[kChunk], gu[kChunk];
      load_chunk(x, &a.x(r, c), a.x.column, n);
      load_chunk(shift, &a.shift(r, c), a.shift.column, n);
      load_chunk(u, &a.scale(r, c), a.scale.column, n);
      load_chunk(gy, &a.grad_y(r, c), a.grad_y.column, n);
      for (int i = 0; i < kChunk; ++i) {
        const AffineGradient<T> g =
            affine_backward<L, F, Inverse>(gy[i], a.grad_logdet[r], x[i], shift[i], u[i], a.law);
        gx[i] = g.x;
        gshift[i] = g.shift;
        gu[i] = g.u;
      }
      store_chunk(&a.grad_x(r, c), a.grad_x.column, gx, n);
      store_chunk(&a.grad_shift(r, c), a.grad_shift.column, gshift, n);
      store_chunk(&a.grad_scale(r, c), a.grad_scale.column, gu, n);
    }
  }
}

template <class T, bool Backward>
void affine_coupling(const AffineArguments<T>& a, int64_t begin, int64_t end) {
  dispatch_affine(a.law_name, a.form, a.inverse, [&]<Law L, Form F, bool Inverse>() {
    if constexpr (Backward)
      affine_backward_rows<L, F, Inverse>(a, begin, end);
    else
      affine_rows<L, F, Inverse>(a, begin, end);
  });
}

}  // namespace fk::FK_ISA
