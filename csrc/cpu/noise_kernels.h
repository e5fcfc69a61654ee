// Noise in tiles that stay in the first-level cache, for one instruction set. Included by the kernels files
// that draw.
namespace fk::FK_ISA {

// Numbers are drawn in runs of this many words (16 blocks), whatever the width of the vectors.
inline constexpr int kNoiseRun = 64;

// The words of consecutive blocks. On x86 each block stays in its 128 bits, so the words come out in the
// order of the elements: the two 32 x 32 -> 64 bit products of a round are one vector multiplication of the
// even words, and the permutation of the words is one shuffle.
class PhiloxRuns {
 public:
#if defined(__x86_64__)
  explicit PhiloxRuns(RandomStream s) : stream_(s) {
    std::uint32_t k0 = static_cast<std::uint32_t>(s.seed), k1 = static_cast<std::uint32_t>(s.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kBlocks; ++i) {
        key_[round][2 * i] = k0;
        key_[round][2 * i + 1] = k1;
      }
      k0 += philox::kWeyl0;
      k1 += philox::kWeyl1;
    }
  }

  // words[i] = the word of element 4 first + i.
  void operator()(std::uint64_t first, std::uint32_t (&words)[kNoiseRun]) const {
    Vector multiplier = {}, state[kVectors] = {};
    for (int i = 0; i < kBlocks; ++i) {
      multiplier[2 * i] = philox::kMultiply0;
      multiplier[2 * i + 1] = philox::kMultiply1;
    }
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kBlocks; ++i) {
        state[v][2 * i] = first + static_cast<std::uint64_t>(v * kBlocks + i);
        state[v][2 * i + 1] = stream_.stream;
      }
    for (int round = 0; round < 10; ++round)
      for (int v = 0; v < kVectors; ++v)
        state[v] = reversed(multiply_even(state[v], multiplier)) ^ (state[v] >> 32) ^ key_[round];
    std::memcpy(words, state, sizeof(words));
  }

 private:
  typedef std::uint64_t Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr int kBlocks = FK_VECTOR_BYTES / 16, kVectors = kNoiseRun / 4 / kBlocks;
#if FK_VECTOR_BYTES == 64
  static Vector multiply_even(Vector a, Vector b) { return (Vector)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
  static Vector reversed(Vector a) {
    return (Vector)_mm512_shuffle_epi32((__m512i)a, static_cast<_MM_PERM_ENUM>(0x1b));
  }
#elif FK_VECTOR_BYTES == 32
  static Vector multiply_even(Vector a, Vector b) { return (Vector)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
  static Vector reversed(Vector a) { return (Vector)_mm256_shuffle_epi32((__m256i)a, 0x1b); }
#else
  static Vector multiply_even(Vector a, Vector b) { return (Vector)_mm_mul_epu32((__m128i)a, (__m128i)b); }
  static Vector reversed(Vector a) { return (Vector)_mm_shuffle_epi32((__m128i)a, 0x1b); }
#endif
  Vector key_[10] = {};
#else
  explicit PhiloxRuns(RandomStream s) : stream_(s) {}
  void operator()(std::uint64_t first, std::uint32_t (&words)[kNoiseRun]) const {
    for (int b = 0; b < kNoiseRun / 4; ++b) {
      std::uint32_t block[4];
      philox::block(stream_, first + static_cast<std::uint64_t>(b), block);
      for (int i = 0; i < 4; ++i) words[4 * b + i] = block[i];
    }
  }

 private:
#endif
  RandomStream stream_;
};

// out[i] = the noise of element 4 first + i for i < count, a multiple of kNoiseRun.
template <Noise N, class T>
inline void fill_noise(const PhiloxRuns& runs, std::uint64_t first, T* out, std::int64_t count) {
  for (std::int64_t begin = 0; begin < count; begin += kNoiseRun) {
    std::uint32_t words[kNoiseRun];
    runs(first + static_cast<std::uint64_t>(begin / 4), words);
    T* to = out + begin;
    if constexpr (N == Noise::bits)
      for (int i = 0; i < kNoiseRun; ++i) to[i] = static_cast<T>(words[i]);
    if constexpr (N == Noise::uniform)
      for (int i = 0; i < kNoiseRun; ++i) to[i] = uniform_of_word(words[i], T(0));
    if constexpr (N == Noise::gumbel)
      for (int i = 0; i < kNoiseRun; ++i) to[i] = gumbel_of_word(words[i], T(0));
    if constexpr (N == Noise::normal)
      for (int i = 0; i < kNoiseRun / 2; ++i) {
        const NormalPair<T> pair = normals_of_words(words[2 * i], words[2 * i + 1], T(0));
        to[2 * i] = pair.first;
        to[2 * i + 1] = pair.second;
      }
  }
}

// The noise of consecutive elements, drawn a tile at a time: at(e, n) points to the noise of elements e .. e
// + n - 1.
template <Noise N, class T>
class NoiseTile {
 public:
  static constexpr std::int64_t kElements = 4096;
  explicit NoiseTile(RandomStream s) : runs_(s) {}
  // n <= kElements. The memory may be written to: it is drawn afresh by each call.
  T* at(std::int64_t element, std::int64_t n) {
    const std::int64_t skip = element & 3;
    fill_noise<N>(runs_, static_cast<std::uint64_t>(element >> 2), noise_,
                  (skip + n + kNoiseRun - 1) / kNoiseRun * kNoiseRun);
    return noise_ + skip;
  }

 private:
  PhiloxRuns runs_;
  alignas(64) T noise_[kElements + 2 * kNoiseRun];
};

}  // namespace fk::FK_ISA
