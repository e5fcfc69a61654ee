// Operators whose elements have a row of parameters each: a thread calculates an element, a warp moves the parameters
// of its 32 elements, its tile. In device memory the rows of a tile lie one after the other, so they come and go as one
// stretch, sixteen bytes at a time, by way of shared memory, where each lane finds its own row: every number is moved
// once, with no stretch of memory left half used. Nothing of that needs more than the warp, whose waiting other warps
// fill.
//
// There the same parameter of 32 elements lies in 32 banks where rows have an odd number of parameters, and in 16 where
// that is twice an odd one. A multiple of four would leave 8 banks or fewer: such rows get a number more, and are moved
// number by number, as are those of a strided view.
//
// A block takes whole rows of elements and adds their log-dets up at its end: a thread its terms one after the other,
// then threads among each other, in an order that depends on the number of features alone.
#pragma once
#if !defined(FK_HOST_SHIM)
#include <cuda_pipeline.h>
#endif

#include "common/lanes.h"
#include "cpu/elements.h"
#include "cuda/launch.h"

namespace fk {

inline constexpr int kElementWarps = 4;
inline constexpr int kElementThreads = kElementWarps * kWarp;
inline constexpr int kTerms = 1024;  // of log-dets, that a block keeps until it adds them up
// Blocks that fit a multiprocessor's registers: 64 registers in float32, 128 in float64.
template <class T>
inline constexpr int kResident = sizeof(T) == 4 ? 8 : 4;

template <class T>
struct ElementCall {
  ElementView<const T> x, parameters, grad_y;
  const T* logdet_in;
  const T* grad_logdet;
  // Outputs are contiguous.
  T* out;  // y, or the gradient of x
  T* logdet;
  T* grad_parameters;
  int64_t rows;
  int features, count;  // count: parameters per element
  int rows_per_block;
  int stride;  // of the rows in a tile
  int tile;    // numbers of shared memory for each warp: a tile, and its elements' scratch
  bool dense;  // parameters are contiguous
};

template <class T>
__device__ inline int place_in_pack(const T* p) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) % 16 / sizeof(T));
}

// Calls move.operator()<Unit>(i) for n neighbours, the first of which lies at `place`: whole packs, and single numbers
// before and after them.
template <class T, class Move>
__device__ inline void move_packs(const T* place, int n, int lane, Move&& move) {
  constexpr int kPer = Pack16<T>::kCount;
  const int to_border = (kPer - place_in_pack(place)) % kPer, before = to_border < n ? to_border : n;
  const int packs = (n - before) / kPer, after = before + packs * kPer;
  if (lane < before) move.template operator()<T>(lane);
  for (int i = lane; i < packs; i += kWarp) move.template operator()<Pack16<T>>(before + i * kPer);
  if (after + lane < n) move.template operator()<T>(after + lane);
}

// The elements of a warp, one per lane.
template <class T>
struct WarpElements {
  const ElementCall<T>& a;
  int64_t first, row, column;  // the warp's first element, and where this lane's is
  int count, lane;
  T* tile;

  // From element e of the block on, which begins at row `row0` and has `elements`.
  __device__ WarpElements(const ElementCall<T>& call, T* room, int64_t row0, int e, int elements, int lane)
      : a(call), first(row0 * call.features + e), lane(lane), tile(room) {
    count = elements - e < kWarp ? elements - e : kWarp;
    const auto mine = static_cast<unsigned>(e + (lane < count ? lane : count - 1));
    const auto features = static_cast<unsigned>(a.features);
    row = row0 + mine / features;
    column = mine % features;
    load();
  }

  __device__ bool is_element() const { return lane < count; }
  __device__ T* parameters() const { return tile + lane * a.stride; }
  __device__ Strided<T> scratch(T* room) const { return {room + kWarp * a.stride + Pack16<T>::kCount + lane, kWarp}; }

  // Calls move(i, element, p) for number i of the tile: parameter p of an element. All lanes take part in each step.
  template <class Move>
  __device__ void move_numbers(Move&& move) const {
    const int elements = kWarp / a.count, parameters = kWarp % a.count;
    int element = lane / a.count, p = lane % a.count;
    for (int i = lane; i - lane < count * a.count; i += kWarp) {
      move(i, element, p);
      element += elements;
      p += parameters;
      if (p >= a.count) {
        p -= a.count;
        ++element;
      }
    }
  }

  __device__ void load() {
    const int n = count * a.count;
    if (a.dense && a.stride == a.count) {
      const T* from = a.parameters.data + first * a.count;
      tile += place_in_pack(from);
      T* to = tile;
      move_packs(from, n, lane, [&]<class Unit>(int i) { __pipeline_memcpy_async(to + i, from + i, sizeof(Unit)); });
    } else if (a.dense) {
      const T* from = a.parameters.data + first * a.count;
      move_numbers([&](int i, int element, int p) {
        if (i < n) __pipeline_memcpy_async(tile + element * a.stride + p, from + i, sizeof(T));
      });
    } else {
      const int64_t mine = row * a.parameters.row + column * a.parameters.column;
      move_numbers([&](int i, int element, int p) {
        const T* from = a.parameters.data + __shfl_sync(kAllLanes, mine, element);
        if (i < n) __pipeline_memcpy_async(tile + element * a.stride + p, from + p * a.parameters.parameter, sizeof(T));
      });
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncwarp();
  }

  // What stands in the tile now becomes the gradient of the parameters.
  __device__ void store() const {
    __syncwarp();
    T* const to = a.grad_parameters + first * a.count;
    const T* const from = tile;
    const int n = count * a.count;
    if (a.stride == a.count && place_in_pack(to) == place_in_pack(from)) {
      move_packs(to, n, lane, [&]<class Unit>(int i) {
        *reinterpret_cast<Unit*>(to + i) = *reinterpret_cast<const Unit*>(from + i);
      });
    } else {
      move_numbers([&](int i, int element, int p) {
        if (i < n) to[i] = from[element * a.stride + p];
      });
    }
  }
};

// f(elements of the warp, number of this lane's element in the block, its scratch) for all tiles of the block.
template <class T, class F>
__device__ inline void for_elements(const ElementCall<T>& a, T* room, int64_t row0, int rows, F&& f) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int elements = rows * a.features;
  room += warp * a.tile;
  for (int e = warp * kWarp; e < elements; e += static_cast<int>(blockDim.x)) {
    const WarpElements<T> tile(a, room, row0, e, elements, lane);
    f(tile, e + lane, tile.scratch(room));
    __syncwarp();  // the next tile comes to the same place
  }
}

// Adds the terms of each row up, [row][term]; as many lanes as a row has terms, up to a warp, take one row.
template <class T>
__device__ inline void add_terms(const ElementCall<T>& a, const T* terms, int64_t row0, int rows) {
  const int thread = static_cast<int>(threadIdx.x), count = a.features < kTerms ? a.features : kTerms;
  int lanes = 1;
  while (lanes < count && lanes < kWarp) lanes *= 2;
  const int per_pass = static_cast<int>(blockDim.x) / lanes, part = thread % lanes;
  for (int r0 = 0; r0 < rows; r0 += per_pass) {
    const int r = r0 + thread / lanes;
    T sum = T(0);
    if (r < rows)
      for (int i = part; i < count; i += lanes) sum += terms[r * count + i];
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (r < rows && part == 0) a.logdet[row0 + r] = sum + (a.logdet_in ? a.logdet_in[row0 + r] : T(0));
  }
}

template <class T>
__device__ inline int rows_of_block(const ElementCall<T>& a, int64_t row0) {
  return a.rows - row0 < a.rows_per_block ? static_cast<int>(a.rows - row0) : a.rows_per_block;
}

// op(x, parameters, scratch, y, logdet) on every element; it may write over the parameters.
template <class T, class Op>
__global__ void __launch_bounds__(kElementThreads, kResident<T>) element_kernel(const ElementCall<T> a, const Op op) {
  T* const room = shared_memory<T>();
  T* const terms = room + static_cast<int>(blockDim.x) / kWarp * a.tile;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int rows = rows_of_block(a, row0);
  for_elements(a, room, row0, rows, [&](const WarpElements<T>& tile, int e, Strided<T> scratch) {
    if (!tile.is_element()) return;
    T y, logdet;
    op(*a.x.at(tile.row, tile.column), tile.parameters(), scratch, y, logdet);
    a.out[tile.first + tile.lane] = y;
    // Features that share a term meet the same thread: kTerms is a multiple of the block.
    terms[e % kTerms] = e < kTerms ? logdet : terms[e % kTerms] + logdet;
  });
  __syncthreads();
  add_terms(a, terms, row0, rows);
}

// op(grad_y, grad_logdet, x, parameters, scratch, grad_x): it leaves the parameters' gradients in their place.
template <class T, class Op>
__global__ void __launch_bounds__(kElementThreads, kResident<T>)
    element_backward_kernel(const ElementCall<T> a, const Op op) {
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int rows = rows_of_block(a, row0);
  for_elements(a, shared_memory<T>(), row0, rows, [&](const WarpElements<T>& tile, int, Strided<T> scratch) {
    if (tile.is_element()) {
      T grad_x;
      op(*a.grad_y.at(tile.row, tile.column), a.grad_logdet[tile.row], *a.x.at(tile.row, tile.column),
         tile.parameters(), scratch, grad_x);
      a.out[tile.first + tile.lane] = grad_x;
    }
    tile.store();
  });
}

template <class T>
ElementCall<T> element_call(const Tensor& x, const Tensor& parameters) {
  constexpr int64_t kMost = int64_t{1} << 30;  // elements are counted by an int inside a block
  STD_TORCH_CHECK(x.size(1) <= kMost, "at most ", kMost, " features, got ", x.size(1));
  ElementCall<T> a{};
  a.x = element_view<T>(x);
  a.parameters = element_view<T>(parameters);
  a.rows = x.size(0);
  a.features = static_cast<int>(x.size(1));
  a.count = static_cast<int>(parameters.size(2));
  a.dense = parameters.is_contiguous();
  return a;
}

// `scratch`: numbers that an element needs beside its parameters.
template <class T, class Op>
void launch_elements(const OnDevice& device, const char* name, void (*kernel)(ElementCall<T>, Op), ElementCall<T> a,
                     const Op& op, int scratch = 0) {
  constexpr int kPer = Pack16<T>::kCount;
  const int64_t features = a.features > 0 ? a.features : 1;
  // Whole tiles, and then rather many blocks than large ones.
  const int64_t least = features < kElementThreads ? kElementThreads / features : 1;
  const int64_t most = features < kTerms ? kTerms / features : 1;
  const int64_t wanted = a.rows / (16 * static_cast<int64_t>(device.multiprocessors()));
  a.rows_per_block = static_cast<int>(wanted < least ? least : (wanted > most ? most : wanted));
  a.stride = a.count % 4 ? a.count : a.count + 1;
  a.tile = kWarp * (a.stride + scratch) + kPer;
  const int64_t terms = a.logdet ? a.rows_per_block * (features < kTerms ? features : kTerms) : 0;
  const auto shared = [&](int warps) { return (warps * a.tile + terms) * static_cast<int64_t>(sizeof(T)); };
  int warps = kElementWarps;
  while (warps > 1 && shared(warps) > device.shared_memory()) warps /= 2;
  launch(device, name, kernel, blocks_for(a.rows, a.rows_per_block), warps * kWarp, shared(warps), a, op);
}

// y and the log-det of an operator: start.operator()<T>(device, call) launches its kernel.
template <class Start>
std::tuple<Tensor, Tensor> run_elements(const Tensor& x, const Tensor& parameters, const std::optional<Tensor>& logdet,
                                        Start&& start) {
  const OnDevice device(x);
  Tensor y = new_empty(x, {x.size(0), x.size(1)}), total = new_empty(x, {x.size(0)});
  std::optional<Tensor> running;
  if (logdet) running = as_contiguous(*logdet);
  dispatch_float(x, [&]<class T>() {
    ElementCall<T> call = element_call<T>(x, parameters);
    call.logdet_in = data_or_null<T>(running);
    call.out = static_cast<T*>(y.mutable_data_ptr());
    call.logdet = static_cast<T*>(total.mutable_data_ptr());
    start.template operator()<T>(device, call);
  });
  return {y, total};
}

// The gradients of x and of the parameters; x is the input of the direction that was run.
template <class Start>
std::tuple<Tensor, Tensor> run_elements_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                                                 const Tensor& parameters, Start&& start) {
  const OnDevice device(x);
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)}),
         grad_parameters = new_empty(x, {x.size(0), x.size(1), parameters.size(2)});
  const Tensor grad_rows = as_contiguous(grad_logdet);
  dispatch_float(x, [&]<class T>() {
    ElementCall<T> call = element_call<T>(x, parameters);
    call.grad_y = element_view<T>(grad_y);
    call.grad_logdet = static_cast<const T*>(grad_rows.const_data_ptr());
    call.out = static_cast<T*>(grad_x.mutable_data_ptr());
    call.grad_parameters = static_cast<T*>(grad_parameters.mutable_data_ptr());
    start.template operator()<T>(device, call);
  });
  return {grad_x, grad_parameters};
}

}  // namespace fk
