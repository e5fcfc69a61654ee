// Kernels of affine_coupling for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

// Adjacent numbers of the type that is calculated in go straight through; everything else (strides, half
// precision, the end of a row) is left to a few functions of its own, which are compiled once and not into
// every law.

template <class S, class T>
void load_as(T* to, const char* from, int64_t stride, int n) {
  if (stride == static_cast<int64_t>(sizeof(S)) && n == kChunk) {
    const S* adjacent = reinterpret_cast<const S*>(from);
    for (int i = 0; i < kChunk; ++i) to[i] = to_compute(adjacent[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = to_compute(*reinterpret_cast<const S*>(from + i * stride));
    for (int i = n; i < kChunk; ++i) to[i] = T(0);
  }
}

template <class S, class T>
void store_as(char* to, int64_t stride, const T* from, int n) {
  if (stride == static_cast<int64_t>(sizeof(S)) && n == kChunk) {
    S* adjacent = reinterpret_cast<S*>(to);
    for (int i = 0; i < kChunk; ++i) adjacent[i] = from_compute<S>(from[i]);
  } else {
    for (int i = 0; i < n; ++i) *reinterpret_cast<S*>(to + i * stride) = from_compute<S>(from[i]);
  }
}

template <class S, class T>
void gather_as(T* to, const char* row, int64_t stride, const int32_t* lane) {
  for (int i = 0; i < kChunk; ++i)
    to[i] = lane[i] < 0 ? T(0) : to_compute(*reinterpret_cast<const S*>(row + lane[i] * stride));
}

template <class S, class T>
void scatter_as(char* row, int64_t stride, const int32_t* lane, const T* from) {
  for (int i = 0; i < kChunk; ++i)
    if (lane[i] >= 0) *reinterpret_cast<S*>(row + lane[i] * stride) = from_compute<S>(from[i]);
}

// f<S>(args...) with the type S that the numbers are stored in. No lambda: one inside a template is compiled
// for the instruction set that is in force where the template is instantiated, which is the wrong one.
#define FK_WITH_STORAGE(storage, f, ...)                               \
  if constexpr (std::is_same_v<T, float>) {                            \
    if (storage == Storage::bfloat16) return f<bfloat16>(__VA_ARGS__); \
    if (storage == Storage::float16) return f<float16>(__VA_ARGS__);   \
  }                                                                    \
  return f<T>(__VA_ARGS__)

// A vector of T, and of integers of the same size that name its lanes.
template <class T>
struct Shuffled {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(FK_VECTOR_BYTES), aligned(sizeof(T))));
  typedef Integer Index __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr int kLanes = FK_VECTOR_BYTES / sizeof(T);
};

// Every second number, as in parameters[..., 0::2]: a vector of them, and nothing past the last one is read.
template <class T>
FK_INLINE void load_every_second(T* to, const T* from) {
  using S = Shuffled<T>;
  using Unaligned = typename S::Unaligned;
  constexpr int V = S::kLanes;
  const typename S::Vector a = *reinterpret_cast<const Unaligned*>(from);
  const typename S::Vector b = *reinterpret_cast<const Unaligned*>(from + V - 1);
  typename S::Vector taken;
#if defined(__clang__)
  for (int i = 0; i < V; ++i) taken[i] = 2 * i < V ? a[2 * i] : b[2 * i - V + 1];
#else
  typename S::Index index;
  for (int i = 0; i < V; ++i) index[i] = 2 * i < V ? 2 * i : 2 * i + 1;
  taken = __builtin_shuffle(a, b, index);
#endif
  *reinterpret_cast<Unaligned*>(to) = taken;
}

template <class T>
FK_INLINE bool every_second(const Rows& rows) {
  return rows.column == 2 * static_cast<int64_t>(sizeof(T)) && rows.storage == Storage::same;
}

template <class T>
__attribute__((noinline)) void load_any(T* to, const Rows& rows, int64_t r, int64_t c, int n) {
  if (every_second<T>(rows) && n == kChunk) {
    for (int i = 0; i < kChunk; i += Shuffled<T>::kLanes)
      load_every_second(to + i, reinterpret_cast<const T*>(rows.at(r, c + i)));
    return;
  }
  FK_WITH_STORAGE(rows.storage, load_as, to, rows.at(r, c), rows.column, n);
}

template <class T>
__attribute__((noinline)) void store_any(const Rows& rows, int64_t r, int64_t c, const T* from, int n) {
  FK_WITH_STORAGE(rows.storage, store_as, rows.at(r, c), rows.column, from, n);
}

template <class T>
__attribute__((noinline)) void gather_chunk(T* to, const Rows& rows, int64_t r, const int32_t* lane) {
  FK_WITH_STORAGE(rows.storage, gather_as, to, rows.at(r, 0), rows.column, lane);
}

template <class T>
__attribute__((noinline)) void scatter_chunk(const Rows& rows, int64_t r, const int32_t* lane, const T* from) {
  FK_WITH_STORAGE(rows.storage, scatter_as, rows.at(r, 0), rows.column, lane, from);
}

#undef FK_WITH_STORAGE

template <class T>
FK_INLINE bool straight(const Rows& rows, int n) {
  return rows.column == static_cast<int64_t>(sizeof(T)) && rows.storage == Storage::same && n == kChunk;
}

template <class T>
FK_INLINE void load_chunk(T (&to)[kChunk], const Rows& rows, int64_t r, int64_t c, int n) {
  if (straight<T>(rows, n))
    std::memcpy(to, rows.at(r, c), sizeof(to));
  else
    load_any(to, rows, r, c, n);
}

template <class T>
FK_INLINE void store_chunk(const Rows& rows, int64_t r, int64_t c, const T (&from)[kChunk], int n) {
  if (straight<T>(rows, n))
    std::memcpy(rows.at(r, c), from, sizeof(from));
  else
    store_any(rows, r, c, from, n);
}

template <class T>
FK_INLINE void keep_transformed(T (&values)[kChunk], const int32_t* lane, const T (&otherwise)[kChunk]) {
  _Pragma("omp simd") for (int i = 0; i < kChunk; ++i) values[i] = lane[i] < 0 ? otherwise[i] : values[i];
}

// to[i] = from[lane[i] - first], where that is a lane of one vector; something of from elsewhere.
template <class T>
FK_INLINE void shuffle(T* to, const T* from, const int32_t* lane, int64_t first) {
  using S = Shuffled<T>;
  typename S::Index index;
  for (int i = 0; i < S::kLanes; ++i) index[i] = static_cast<typename S::Integer>(lane[i] - first) & (S::kLanes - 1);
  const typename S::Vector given = *reinterpret_cast<const typename S::Unaligned*>(from);
#if defined(__clang__)
  typename S::Vector taken;
  for (int i = 0; i < S::kLanes; ++i) taken[i] = given[index[i]];
#else
  const typename S::Vector taken = __builtin_shuffle(given, index);
#endif
  *reinterpret_cast<typename S::Unaligned*>(to) = taken;
}

// Parameters that lie side by side, each to its feature: a vector of features needs no more than a vector of them. What
// the other features get is not looked at.
template <class T>
__attribute__((noinline)) void expand_chunk(T (&to)[kChunk], const Rows& rows, int64_t r, const Chunk& chunk,
                                            int64_t width) {
  constexpr int V = Shuffled<T>::kLanes;
  const bool adjacent = straight<T>(rows, kChunk);
  if ((adjacent || every_second<T>(rows)) && width >= V) {
    for (int i = 0; i < kChunk; i += V) {
      const int64_t first = std::min<int64_t>(chunk.parameter + chunk.before[i / 2], width - V);
      const T* from = reinterpret_cast<const T*>(rows.at(r, first));
      if (!adjacent) {
        load_every_second(to + i, from);
        from = to + i;
      }
      shuffle(to + i, from, chunk.lane + i, first);
    }
  } else {
    T side_by_side[2 * kChunk];
    load_any(side_by_side, rows, r, chunk.parameter, chunk.count);
    for (int i = 0; i < kChunk; i += V)
      shuffle(to + i, side_by_side + chunk.before[i / 2], chunk.lane + i, chunk.parameter + chunk.before[i / 2]);
  }
}

// The way back. A whole vector is stored for some features of it: what is too much belongs to features that follow.
template <class T>
__attribute__((noinline)) void compress_chunk(const Rows& rows, int64_t r, const Chunk& chunk, const T (&from)[kChunk],
                                              int64_t width) {
  constexpr int V = Shuffled<T>::kLanes;
  const bool adjacent = straight<T>(rows, kChunk) && chunk.parameter + kChunk + V <= width;
  T side_by_side[2 * kChunk];
  T* to = adjacent ? reinterpret_cast<T*>(rows.at(r, chunk.parameter)) : side_by_side;
  for (int i = 0; i < kChunk; i += V)
    shuffle(to + chunk.before[i / 2], from + i, chunk.transformed + chunk.before[i / 2], i);
  if (!adjacent) store_any(rows, r, chunk.parameter, side_by_side, chunk.count);
}

// Sums lanes in two levels, so that the rounding errors of a long row do not pile up in one number.
template <class T>
struct LaneSum {
  static constexpr int kBlock = 8;
  T block[kChunk] = {}, total[kChunk] = {};
  int filled = 0;

  FK_INLINE void add(const T (&values)[kChunk]) {
    for (int i = 0; i < kChunk; ++i) block[i] += values[i];
    if (++filled == kBlock) flush();
  }
  FK_INLINE void flush() {
    for (int i = 0; i < kChunk; ++i) {
      total[i] += block[i];
      block[i] = T(0);
    }
    filled = 0;
  }
  FK_INLINE T sum() {
    flush();
    // Unrolled, because with a count that is no constant GCC adds the small halves one number at a time.
#if !defined(__clang__)
#pragma GCC unroll 8
#endif
    for (int half = kChunk / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) total[i] += total[i + half];
    return total[0];
  }
};

// Whole chunks whose numbers, parameters too, all lie as the arithmetic wants them are taken straight from memory and
// back, in a loop that does nothing else: the most common case, and 1.6 times as fast as chunk by chunk.

template <class T>
FK_INLINE bool adjacent(const Rows& rows) {
  return rows.data == nullptr || straight<T>(rows, kChunk);
}

// Where such a run from feature c on ends; c itself, if there is none.
FK_INLINE int64_t run_end(const AffineArguments& a, int64_t c) {
  if (!a.chunks) return a.features - (a.features - c) % kChunk;
  const int64_t offset = a.chunks[c / kChunk].parameter - c;
  for (; c + kChunk <= a.features; c += kChunk) {
    const Chunk& chunk = a.chunks[c / kChunk];
    if (chunk.part != Part::dense || chunk.parameter != c + offset) break;
  }
  return c;
}

FK_INLINE int64_t first_parameter(const AffineArguments& a, int64_t c) {
  return a.chunks ? a.chunks[c / kChunk].parameter : c;
}

// A row of results, or one chunk that takes them all where nobody wants them.
template <class T>
struct Results {
  T* at;
  int64_t step;
  FK_INLINE Results(const Rows& rows, int64_t r, int64_t c, T* nowhere)
      : at(rows.data ? reinterpret_cast<T*>(rows.at(r, c)) : nowhere), step(rows.data ? kChunk : 0) {}
};

template <Law L, Form F, bool Inverse, class T>
FK_INLINE void affine_run(const AffineArguments& a, const LawParameters<T>& law, int64_t r, int64_t c, int64_t end,
                          LaneSum<T>& sum) {
  const int64_t p = first_parameter(a, c);
  const T* x = reinterpret_cast<const T*>(a.x.at(r, c));
  const T* shift = reinterpret_cast<const T*>(a.shift.at(r, p));
  const T* u = reinterpret_cast<const T*>(a.scale.at(r, p));
  T* y = reinterpret_cast<T*>(a.y.at(r, c));
  for (int64_t k = 0; k < end - c; k += kChunk) {
    T log_sigma[kChunk];
    _Pragma("omp simd") for (int i = 0; i < kChunk; ++i) {
      const Transformed<T> out = affine<L, F, Inverse>(x[k + i], shift[k + i], u[k + i], law);
      y[k + i] = out.y;
      log_sigma[i] = out.logdet;
    }
    sum.add(log_sigma);
  }
}

template <Law L, Form F, bool Inverse, class T>
FK_INLINE void affine_backward_run(const AffineArguments& a, const LawParameters<T>& law, int64_t r, int64_t c,
                                   int64_t end) {
  const int64_t p = first_parameter(a, c);
  const T grad_logdet = static_cast<const T*>(a.grad_logdet)[r];
  const T* gy = reinterpret_cast<const T*>(a.grad_y.at(r, c));
  const T* x = reinterpret_cast<const T*>(a.x.at(r, c));
  const T* shift = reinterpret_cast<const T*>(a.shift.at(r, p));
  const T* u = reinterpret_cast<const T*>(a.scale.at(r, p));
  T nowhere[kChunk];
  Results<T> gx(a.grad_x, r, c, nowhere), gshift(a.grad_shift, r, p, nowhere), gu(a.grad_scale, r, p, nowhere);
  for (int64_t k = 0; k < end - c; k += kChunk) {
    _Pragma("omp simd") for (int i = 0; i < kChunk; ++i) {
      const AffineGradient<T> g =
          affine_backward<L, F, Inverse>(gy[k + i], grad_logdet, x[k + i], shift[k + i], u[k + i], law);
      gx.at[i] = g.x;
      gshift.at[i] = g.shift;
      gu.at[i] = g.u;
    }
    gx.at += gx.step;
    gshift.at += gshift.step;
    gu.at += gu.step;
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_rows(const AffineArguments& a, const LawParameters<T>& law, int64_t begin, int64_t end) {
  const T* running = static_cast<const T*>(a.logdet_in);
  T* logdet = static_cast<T*>(a.logdet);
  const T zero[kChunk] = {};
  const bool all_adjacent = adjacent<T>(a.x) && adjacent<T>(a.shift) && adjacent<T>(a.scale) && adjacent<T>(a.y);
  for (int64_t r = begin; r < end; ++r) {
    LaneSum<T> sum;
    for (int64_t c = 0; c < a.features; c += kChunk) {
      if (const int64_t run = all_adjacent ? run_end(a, c) : c; run > c) {
        affine_run<L, F, Inverse>(a, law, r, c, run, sum);
        c = run - kChunk;
        continue;
      }
      const int n = static_cast<int>(std::min<int64_t>(kChunk, a.features - c));
      const Chunk* chunk = a.chunks ? a.chunks + c / kChunk : nullptr;
      const Part part = chunk ? chunk->part : Part::dense;
      const int64_t p = chunk ? chunk->parameter : c;
      T x[kChunk], shift[kChunk], u[kChunk], y[kChunk], log_sigma[kChunk];
      load_chunk(x, a.x, r, c, n);
      if (part == Part::copy) {
        store_chunk(a.y, r, c, x, n);
        continue;
      }
      if (part == Part::expand) {
        expand_chunk(shift, a.shift, r, *chunk, a.width);
        expand_chunk(u, a.scale, r, *chunk, a.width);
      } else if (part == Part::gather) {
        gather_chunk(shift, a.shift, r, chunk->lane);
        gather_chunk(u, a.scale, r, chunk->lane);
      } else {
        load_chunk(shift, a.shift, r, p, n);
        load_chunk(u, a.scale, r, p, n);
      }
      _Pragma("omp simd") for (int i = 0; i < kChunk; ++i) {
        const Transformed<T> out = affine<L, F, Inverse>(x[i], shift[i], u[i], law);
        y[i] = out.y;
        log_sigma[i] = i < n ? out.logdet : T(0);
      }
      if (part != Part::dense) {
        keep_transformed(y, chunk->lane, x);
        keep_transformed(log_sigma, chunk->lane, zero);
      }
      sum.add(log_sigma);
      store_chunk(a.y, r, c, y, n);
    }
    logdet[r] = running ? running[r] + sum.sum() : sum.sum();
  }
}

template <Law L, Form F, bool Inverse, class T>
void affine_backward_rows(const AffineArguments& a, const LawParameters<T>& law, int64_t begin, int64_t end) {
  const T* grad_logdet = static_cast<const T*>(a.grad_logdet);
  const T zero[kChunk] = {};
  const bool all_adjacent = adjacent<T>(a.grad_y) && adjacent<T>(a.x) && adjacent<T>(a.shift) && adjacent<T>(a.scale) &&
                            adjacent<T>(a.grad_x) && adjacent<T>(a.grad_shift) && adjacent<T>(a.grad_scale);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.features; c += kChunk) {
      if (const int64_t run = all_adjacent ? run_end(a, c) : c; run > c) {
        affine_backward_run<L, F, Inverse>(a, law, r, c, run);
        c = run - kChunk;
        continue;
      }
      const int n = static_cast<int>(std::min<int64_t>(kChunk, a.features - c));
      const Chunk* chunk = a.chunks ? a.chunks + c / kChunk : nullptr;
      const Part part = chunk ? chunk->part : Part::dense;
      const int64_t p = chunk ? chunk->parameter : c;
      T x[kChunk], shift[kChunk], u[kChunk], gy[kChunk], gx[kChunk], gshift[kChunk], gu[kChunk];
      load_chunk(gy, a.grad_y, r, c, n);
      if (part == Part::copy) {
        if (a.grad_x.data) store_chunk(a.grad_x, r, c, gy, n);
        if (a.grad_shift.data && a.full_width) store_chunk(a.grad_shift, r, c, zero, n);
        if (a.grad_scale.data && a.full_width) store_chunk(a.grad_scale, r, c, zero, n);
        continue;
      }
      load_chunk(x, a.x, r, c, n);
      if (part == Part::expand) {
        expand_chunk(shift, a.shift, r, *chunk, a.width);
        expand_chunk(u, a.scale, r, *chunk, a.width);
      } else if (part == Part::gather) {
        gather_chunk(shift, a.shift, r, chunk->lane);
        gather_chunk(u, a.scale, r, chunk->lane);
      } else {
        load_chunk(shift, a.shift, r, p, n);
        load_chunk(u, a.scale, r, p, n);
      }
      _Pragma("omp simd") for (int i = 0; i < kChunk; ++i) {
        const AffineGradient<T> g = affine_backward<L, F, Inverse>(gy[i], grad_logdet[r], x[i], shift[i], u[i], law);
        gx[i] = g.x;
        gshift[i] = g.shift;
        gu[i] = g.u;
      }
      if (part != Part::dense) {
        keep_transformed(gx, chunk->lane, gy);
        keep_transformed(gshift, chunk->lane, zero);
        keep_transformed(gu, chunk->lane, zero);
      }
      if (a.grad_x.data) store_chunk(a.grad_x, r, c, gx, n);
      if (part == Part::expand) {
        if (a.grad_shift.data) compress_chunk(a.grad_shift, r, *chunk, gshift, a.width);
        if (a.grad_scale.data) compress_chunk(a.grad_scale, r, *chunk, gu, a.width);
      } else if (part == Part::gather) {
        if (a.grad_shift.data) scatter_chunk(a.grad_shift, r, chunk->lane, gshift);
        if (a.grad_scale.data) scatter_chunk(a.grad_scale, r, chunk->lane, gu);
      } else {
        if (a.grad_shift.data) store_chunk(a.grad_shift, r, p, gshift, n);
        if (a.grad_scale.data) store_chunk(a.grad_scale, r, p, gu, n);
      }
    }
  }
}

template <class T, bool Backward>
void affine_coupling(const AffineArguments& a, int64_t begin, int64_t end) {
  const LawParameters<T> law = law_parameters_of<T>(a.law);
  dispatch_affine(a.law_name, a.form, a.inverse, [&]<Law L, Form F, bool Inverse>() {
    if constexpr (Backward)
      affine_backward_rows<L, F, Inverse>(a, law, begin, end);
    else
      affine_rows<L, F, Inverse>(a, law, begin, end);
  });
}

}  // namespace fk::FK_ISA
