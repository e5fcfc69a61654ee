// The kernel of fingerprint for one instruction set; included by foreach_isa.h, includes nothing.
namespace fk::FK_ISA {

// Many independent chains, so that the multiplications wait for memory and not for each other.
inline constexpr int kChains = 32;

// h <- (h ^ word) * odd: for every word a bijection of h, so a change of any one word changes the result for certain,
// and changes of several cancel with probability 2^-64.
inline uint64_t fingerprint_chunk(const unsigned char* bytes, int64_t size) {
  constexpr uint64_t odd = 0x9E3779B97F4A7C15u;
  uint64_t chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = odd * (2 * i + 1);
  int64_t at = 0;
  for (; at + int64_t{8 * kChains} <= size; at += 8 * kChains) {
    uint64_t word[kChains];
    std::memcpy(word, bytes + at, sizeof(word));
    for (int i = 0; i < kChains; ++i) chain[i] = (chain[i] ^ word[i]) * odd;
  }
  uint64_t word[kChains] = {};
  std::memcpy(word, bytes + at, static_cast<size_t>(size - at));
  uint64_t total = static_cast<uint64_t>(size);
  for (int i = 0; i < kChains; ++i) {
    const uint64_t last = (chain[i] ^ word[i]) * odd;
    total = ((total ^ last ^ (last >> 29)) * odd) + i;
  }
  return total;
}

}  // namespace fk::FK_ISA
