// CUDA's launch model on the host, enough to run this library's kernels: blocks one after the other, threads as fibers
// that switch only where the kernel synchronises. A barrier that not every thread reaches is an error here, not a hang,
// and threads can be run in reverse order, so that a result which depends on a missing barrier shows.
#pragma once
// Fibers switch by longjmp: half the price of swapcontext, which asks the kernel for the signal mask each time.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(8) float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace host_shim {

inline constexpr int kWarp = 32;
inline constexpr size_t kStack = 128 * 1024;

struct Barrier {
  int waiting = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::vector<char> stack;
  bool done = false, started = false;
  // Two, used in turn: a lane may be one exchange ahead of another that has not read yet.
  alignas(16) unsigned char slot[2][32];
  unsigned turn = 0;
  // Asynchronous copies, which arrive when they are waited for and not before.
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> copies;
};

struct State {
  jmp_buf back;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier block;
  int current = 0, threads = 0;
  bool progress = false;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
};

inline State& state() {
  static State s;
  return s;
}

inline int shared_limit() {
  const char* text = std::getenv("FK_SHIM_SHARED_MEMORY");
  return text ? std::atoi(text) : 232448;
}

inline void* shared() {
  return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(state().shared.data()) + 127) / 128 * 128);
}

inline void yield() {
  State& s = state();
  if (_setjmp(s.fibers[static_cast<size_t>(s.current)].here) == 0) _longjmp(s.back, 1);
}

inline void resume(Fiber& f) {
  State& s = state();
  if (_setjmp(s.back) != 0) return;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  setcontext(&f.context);
}

inline void wait(Barrier& b, int count) {
  State& s = state();
  const long generation = b.generation;
  if (++b.waiting == count) {
    b.waiting = 0;
    ++b.generation;
    s.progress = true;
    return;
  }
  while (b.generation == generation) yield();
  s.progress = true;
}

inline int lanes_of(int warp) {
  const int rest = state().threads - warp * kWarp;
  return rest < kWarp ? rest : kWarp;
}

inline void warp_barrier() {
  const int warp = state().current / kWarp;
  wait(state().warps[static_cast<size_t>(warp)], lanes_of(warp));
}

inline void entry() {
  State& s = state();
  (*s.body)();
  s.fibers[static_cast<size_t>(s.current)].done = true;
  s.progress = true;
  _longjmp(s.back, 1);
}

inline void run(const char* name, int64_t blocks, int threads, int64_t shared_bytes,
                const std::function<void()>& body) {
  State& s = state();
  if (threads % kWarp || threads > 1024 || threads < 1)
    throw std::runtime_error(std::string(name) + ": a block must be whole warps, at most 1024 threads");
  if (shared_bytes > shared_limit()) throw std::runtime_error(std::string(name) + ": too much shared memory");
  s.threads = threads;
  s.body = &body;
  if (s.fibers.size() < static_cast<size_t>(threads)) s.fibers.resize(static_cast<size_t>(threads));
  const bool reverse = std::getenv("FK_SHIM_REVERSE") != nullptr;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t b = 0; b < blocks; ++b) {
    // Shared memory begins as rubbish, as on the device: all ones is NaN.
    s.shared.assign(static_cast<size_t>(shared_bytes) + 128, 0xff);
    s.warps.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), Barrier{});
    s.block = Barrier{};
    for (int t = 0; t < threads; ++t) {
      Fiber& f = s.fibers[static_cast<size_t>(t)];
      f.done = f.started = false;
      f.turn = 0;
      f.copies.clear();
      if (f.stack.empty()) f.stack.resize(kStack);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    for (int left = threads; left > 0;) {
      s.progress = false;
      for (int i = 0; i < threads; ++i) {
        const int t = reverse ? threads - 1 - i : i;
        Fiber& f = s.fibers[static_cast<size_t>(t)];
        if (f.done) continue;
        s.current = t;
        threadIdx = {static_cast<unsigned>(t), 0, 0};
        blockIdx = {static_cast<unsigned>(b), 0, 0};
        resume(f);
        if (f.done) --left;
      }
      if (left > 0 && !s.progress) {
        std::fprintf(stderr, "%s: a barrier or shuffle that not every thread reaches (block %lld)\n", name,
                     static_cast<long long>(b));
        std::abort();
      }
    }
  }
}

// What every lane of the warp has shown, to be read before the next but one.
template <class T>
class Shown {
 public:
  explicit Shown(const T& mine) : first_(state().current / kWarp * kWarp) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Fiber::slot[0]));
    Fiber& f = state().fibers[static_cast<size_t>(state().current)];
    turn_ = f.turn++ % 2;
    std::memcpy(f.slot[turn_], &mine, sizeof(T));
    warp_barrier();
  }
  T of(int lane) const {
    T value;
    std::memcpy(&value, state().fibers[static_cast<size_t>(first_ + lane % kWarp)].slot[turn_], sizeof(T));
    return value;
  }

 private:
  int first_;
  unsigned turn_;
};

template <class T>
T exchange(T value, int from) {
  return Shown<T>(value).of(from);
}

// What tensor cores read of a tf32 operand: 11 significant bits. The others need not be zero.
inline float read_tf32(std::uint32_t bits) {
  bits &= 0xffffe000u;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// The sum of exact products and a float as tensor cores form it: every term aligned to the largest and cut off below
// its 24 bits, the result cut off too. Some devices keep a bit or two more (Fasi, Higham, Mikaitis and Pranesh 2021,
// "Numerical behavior of NVIDIA tensor cores"); this is the least exact that was found.
template <size_t N>
float cut_off_sum(const double (&terms)[N]) {
  double largest = 0.0, plain = 0.0;
  for (const double t : terms) {
    largest = std::fabs(t) > largest ? std::fabs(t) : largest;
    plain += t;
  }
  if (largest == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const int last_place = std::ilogb(largest) - 23;
  std::int64_t sum = 0;
  for (const double t : terms) sum += static_cast<std::int64_t>(std::ldexp(t, -last_place));
  const double exact = std::ldexp(static_cast<double>(sum), last_place);
  const float rounded = static_cast<float>(exact);
  return std::fabs(rounded) > std::fabs(exact) && std::isfinite(rounded) ? std::nextafterf(rounded, 0.0f) : rounded;
}

// mma.sync.m16n8k8 with tf32 operands; csrc/cuda/tensor_cores.h says which lane holds what.
inline void mma_tf32(float (&sum)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Operands {
    std::uint32_t a[4], b[2];
  };
  const Shown<Operands> all({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = state().current % kWarp, group = lane / 4, in_group = lane % 4;
  Operands rows[4], columns[2][4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = all.of(4 * group + i);
    for (int j = 0; j < 2; ++j) columns[j][i] = all.of(4 * (2 * in_group + j) + i);
  }
  for (int e = 0; e < 4; ++e) {
    double terms[9] = {sum[e]};
    for (int k = 0; k < 8; ++k)
      terms[k + 1] = static_cast<double>(read_tf32(rows[k % 4].a[e / 2 + k / 4 * 2])) *
                     static_cast<double>(read_tf32(columns[e % 2][k % 4].b[k / 4]));
    sum[e] = cut_off_sum(terms);
  }
}

}  // namespace host_shim

inline void __syncthreads() { host_shim::wait(host_shim::state().block, host_shim::state().threads); }
inline void __syncwarp(unsigned = 0xffffffffu) { host_shim::warp_barrier(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host_shim::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_shim::exchange(value, (host_shim::state().current % host_shim::kWarp) ^ mask);
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % bytes != 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned(to) || misaligned(from))
    throw std::runtime_error("an asynchronous copy is not aligned");
  host_shim::State& s = host_shim::state();
  s.fibers[static_cast<size_t>(s.current)].copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {
  host_shim::State& s = host_shim::state();
  auto& copies = s.fibers[static_cast<size_t>(s.current)].copies;
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

// Tensor cores: operands are whole in every lane, of a result each lane has eight elements.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  T x[std::is_same_v<Use, accumulator> ? 8 : 256];
};

template <class F, class T>
void fill_fragment(F& f, T value) {
  for (auto& x : f.x) x = value;
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % 32 || bytes % 16) throw std::runtime_error("a fragment is not aligned");
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned stride) {
  check_aligned(from, stride * sizeof(T));
  host_shim::warp_barrier();
  for (unsigned i = 0; i < 16; ++i)
    for (unsigned j = 0; j < 16; ++j)
      f.x[16 * i + j] = std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i];
}

template <class A, class B, class C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  const int first = host_shim::state().current % host_shim::kWarp * 8;
  for (int e = 0; e < 8; ++e) {
    const int i = (first + e) / 16, j = (first + e) % 16;
    float sum = c.x[e];
    for (int k = 0; k < 16; ++k) sum += static_cast<float>(a.x[16 * i + k]) * static_cast<float>(b.x[16 * k + j]);
    d.x[e] = sum;
  }
}

template <class F, class T>
void store_matrix_sync(T* to, const F& f, unsigned stride, layout_t) {
  check_aligned(to, stride * sizeof(T));
  const unsigned first = static_cast<unsigned>(host_shim::state().current % host_shim::kWarp) * 8;
  for (unsigned e = 0; e < 8; ++e) to[(first + e) / 16 * stride + (first + e) % 16] = f.x[e];
  host_shim::warp_barrier();
}

}  // namespace nvcuda::wmma
