// What every CUDA launch needs: the current stream, the device guard, checked launches. The same kernels are compiled
// as host C++ for the tests (FK_HOST_SHIM, tests/cuda/host_shim.h), where a launch is a loop over blocks and a thread
// is a fiber.
#pragma once
#if defined(FK_HOST_SHIM)
#include "host_shim.h"
#else
#include <cuda_runtime.h>
#endif

#include <torch/csrc/stable/accelerator.h>

#include <mutex>

#include "cpu/tensor.h"

#if defined(FK_HOST_SHIM)
#define FK_DEVICE_KEY CPU
#else
#define FK_DEVICE_KEY CUDA
#endif

namespace fk {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The device and the stream that a call on tensor t has to use.
class OnDevice {
 public:
#if defined(FK_HOST_SHIM)
  explicit OnDevice(const Tensor&) {}
  int multiprocessors() const { return 4; }
  int shared_memory() const { return host_shim::shared_limit(); }
#else
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // The most that one block can ask for.
  int shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  cudaStream_t stream() const { return stream_; }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_TORCH_CHECK(cudaDeviceGetAttribute(&value, which, device_) == cudaSuccess, "cannot ask the CUDA device");
    return value;
  }
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

// kernel<<<blocks, threads, shared>>>(arguments...) on the device's stream. Too much shared memory, no kernel image for
// this architecture and the like are errors here, not later.
template <class... Parameters, class... Arguments>
void launch(const OnDevice& device, const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared, const Arguments&... arguments) {
  if (blocks == 0) return;
#if defined(FK_HOST_SHIM)
  (void)device;
  host_shim::run(name, blocks, threads, shared, [&] { kernel(arguments...); });
#else
  // The limit is the kernel's, not the launch's: another thread must not change it in between.
  static std::mutex limits;
  std::unique_lock<std::mutex> lock(limits, std::defer_lock);
  if (shared > 48 * 1024) {
    lock.lock();
    const cudaError_t set =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    STD_TORCH_CHECK(set == cudaSuccess, name, ": ", shared, " bytes of shared memory: ", cudaGetErrorString(set));
  }
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared),
           device.stream()>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(
      error == cudaSuccess, name, ": ", cudaGetErrorString(error),
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion
          ? " (flowkernels was not built for this GPU: rebuild with its architecture in TORCH_CUDA_ARCH_LIST)"
          : "");
#endif
}

// The largest grid in x.
inline constexpr int64_t kMaxBlocks = 2147483647;

inline int64_t blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "too many rows for one launch: ", items);
  return blocks;
}

#if defined(__CUDACC__)
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}
#elif defined(FK_HOST_SHIM)
template <class T>
T* shared_memory() {
  return static_cast<T*>(host_shim::shared());
}
#endif

// Shared memory that is only read while this lives, in loops where every cycle counts. It keeps the address as loads
// take it: left to itself the compiler works that out again for each load, and on sm_90 the block's rank in its
// cluster, which is part of it, takes longer to ask for than the load.
template <class T>
class SharedReader {
 public:
  SharedReader() = default;
#if defined(__CUDA_ARCH__)
  __device__ explicit SharedReader(const T* begin) : begin_(static_cast<unsigned>(__cvta_generic_to_shared(begin))) {
    asm volatile("" : "+r"(begin_));
  }
  __device__ T operator[](int i) const {
    const unsigned at = begin_ + static_cast<unsigned>(i) * sizeof(T);
    T v;
    if constexpr (std::is_same_v<T, float>)
      asm("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
    else
      asm("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(at));
    return v;
  }

 private:
  unsigned begin_;
#else
  explicit SharedReader(const T* begin) : begin_(begin) {}
  T operator[](int i) const { return begin_[i]; }

 private:
  const T* begin_;
#endif
};

// Sixteen bytes, one memory access.
template <class T>
struct alignas(16) Pack16 {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];
};

// The sum of v over a warp, in every lane, always in the same order.
template <class T>
__device__ inline T warp_sum(T v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// Calls f.template operator()<Storage, Compute>() for the tensor's type.
template <class F>
void dispatch_storage(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f.template operator()<double, double>();
    case ScalarType::Float:
      return f.template operator()<float, float>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half, float>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16, float>();
    default:
      STD_TORCH_CHECK(false, "expected a floating-point tensor");
  }
}

}  // namespace fk
