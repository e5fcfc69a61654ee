// What a barrier, a shuffle and a shared-memory access cost on this GPU, in cycles: the terms of the sampling chain's
// floor. A program of its own; `python -m benchmarks.gpu` compiles and runs it. Prints "name value" lines.
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <cstdio>

namespace cg = cooperative_groups;

constexpr int kRepeat = 1000;

__global__ void block_barrier(long long* out) {
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < kRepeat; ++i) __syncthreads();
  if (threadIdx.x == 0) *out = (clock64() - begin) / kRepeat;
}

__global__ void shuffle(long long* out, float* sink, float v) {
  const long long begin = clock64();
  for (int i = 0; i < kRepeat; ++i) v = __shfl_sync(0xffffffffu, v, (threadIdx.x + 1) & 31);
  if (threadIdx.x == 0) *out = (clock64() - begin) / kRepeat;
  sink[threadIdx.x] = v;
}

__global__ void shared_load(long long* out, int* sink) {
  __shared__ int next[256];
  for (int i = threadIdx.x; i < 256; i += 32) next[i] = (i + 33) & 255;
  __syncthreads();
  int at = threadIdx.x;
  const long long begin = clock64();
  for (int i = 0; i < kRepeat; ++i) at = next[at];
  if (threadIdx.x == 0) *out = (clock64() - begin) / kRepeat;
  sink[threadIdx.x] = at;
}

__global__ void multiply_add(long long* out, float* sink, float a, float b) {
  float v = a;
  const long long begin = clock64();
#pragma unroll 8
  for (int i = 0; i < kRepeat; ++i) v = v * a + b;
  if (threadIdx.x == 0) *out = (clock64() - begin) / kRepeat;
  sink[threadIdx.x] = v;
}

__global__ void grid_barrier() {
  for (int i = 0; i < kRepeat; ++i) cg::this_grid().sync();
}

__global__ void nothing() {}

template <class Launch>
long long cycles(long long* out, Launch&& launch) {
  long long result = -1;
  for (int i = 0; i < 3; ++i) launch();
  if (cudaDeviceSynchronize() == cudaSuccess) cudaMemcpy(&result, out, sizeof(result), cudaMemcpyDeviceToHost);
  return result;
}

int main() {
  long long* out;
  void* sink;
  if (cudaMalloc(&out, 8) != cudaSuccess || cudaMalloc(&sink, 4096) != cudaSuccess) return 1;
  std::printf("syncthreads_256_cycles %lld\n", cycles(out, [&] { block_barrier<<<1, 256>>>(out); }));
  std::printf("syncthreads_512_cycles %lld\n", cycles(out, [&] { block_barrier<<<1, 512>>>(out); }));
  std::printf("shuffle_cycles %lld\n", cycles(out, [&] { shuffle<<<1, 32>>>(out, static_cast<float*>(sink), 1.0f); }));
  std::printf("shared_load_cycles %lld\n", cycles(out, [&] { shared_load<<<1, 32>>>(out, static_cast<int*>(sink)); }));
  std::printf("multiply_add_cycles %lld\n",
              cycles(out, [&] { multiply_add<<<1, 32>>>(out, static_cast<float*>(sink), 0.5f, 0.5f); }));
  int multiprocessors = 0, clock = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0);
  std::printf("multiprocessors %d\nclock_mhz %d\n", multiprocessors, clock / 1000);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float ms = 0;
  void** none = nullptr;
  for (int i = 0; i < 2; ++i) {
    cudaEventRecord(begin);
    if (cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barrier), dim3(multiprocessors), dim3(256), none, 0,
                                    0) != cudaSuccess)
      break;
    cudaEventRecord(end);
    if (cudaEventSynchronize(end) != cudaSuccess) break;
    cudaEventElapsedTime(&ms, begin, end);
  }
  std::printf("grid_barrier_us %.3f\n", ms * 1000 / kRepeat);
  // A graph of empty kernels, one after the other.
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  for (int i = 0; i < 200; ++i) nothing<<<1, 32, 0, stream>>>();
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&ready, graph, 0);
  for (int i = 0; i < 3; ++i) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(ready, stream);
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&ms, begin, end);
  }
  std::printf("graph_kernel_us %.3f\n", ms * 1000 / 200);
  return cudaGetLastError() == cudaSuccess ? 0 : 1;
}
