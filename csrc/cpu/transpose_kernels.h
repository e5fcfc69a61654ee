// Blocks of numbers turned around in registers, for one instruction set. Part of kernels files: included inside
// foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

template <int W, int N, class V, int... J>
FK_INLINE void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  const V low = __builtin_shufflevector(a, b, (J & W ? N + J - W : J)...);
  b = __builtin_shufflevector(a, b, (J & W ? N + J : J + W)...);
  a = low;
}

// One step of a transpose: swaps the off-diagonal blocks of width W, then goes on with 2 W.
template <int W, int N, class V>
FK_INLINE void exchange_halves(V (&v)[N]) {
  for (int i = 0; i < N; ++i)
    if (!(i & W)) exchange<W, N>(v[i], v[i + W], std::make_integer_sequence<int, N>{});
  if constexpr (2 * W < N) exchange_halves<2 * W>(v);
}

// Row i of an N x N block lies at from(i); row i of its transpose comes to to(i). N is at most the lanes of a vector.
template <int N, class T, class From, class To>
FK_INLINE void transpose_square(const From& from, const To& to) {
  typedef T Vector __attribute__((vector_size(N * sizeof(T))));
  Vector v[N];
  for (int i = 0; i < N; ++i) std::memcpy(&v[i], from(i), sizeof(Vector));
  exchange_halves<1>(v);
  for (int i = 0; i < N; ++i) std::memcpy(to(i), &v[i], sizeof(Vector));
}

}  // namespace fk::FK_ISA
