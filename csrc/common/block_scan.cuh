// Prefix sums, and other scans, over the threads of a block: what the kernels of decisions and positions are made of.
#pragma once

#include "common/block_reduce.cuh"

namespace vico {

// Rows are scanned by one block each, kScanChunk elements at a time: thread t has the kScanItems from t * kScanItems
// on.
constexpr int kScanThreads = 512;
constexpr int kScanItems = 8;
constexpr int kScanChunk = kScanThreads * kScanItems;

// combine over the values of all warps before this one, `identity` for the first; `total` becomes that of all warps.
// `value` is the same in all lanes. `combine` is associative. `scratch` [kMaxWarps] is shared memory; whole warps only.
// Ends with a barrier.
template <class T, class Combine>
VICO_DEVICE T scan_of_warps(T value, T identity, const Combine& combine, T* scratch, T& total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  T upto = lane < static_cast<int>(blockDim.x / 32) ? scratch[lane] : identity;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const T before = __shfl_up_sync(~0u, upto, delta);
    if (lane >= delta) upto = combine(before, upto);
  }
  total = __shfl_sync(~0u, upto, 31);
  const T before = __shfl_sync(~0u, upto, warp > 0 ? warp - 1 : 0);
  __syncthreads();
  return warp > 0 ? before : identity;
}

// The same over threads, each with a value of its own.
template <class T, class Combine>
VICO_DEVICE T block_scan(T value, T identity, const Combine& combine, T* scratch, T& total) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const T before = __shfl_up_sync(~0u, value, delta);
    if (lane >= delta) value = combine(before, value);
  }
  const T before = __shfl_up_sync(~0u, value, 1), of_warp = __shfl_sync(~0u, value, 31);
  const T of_warps = scan_of_warps(of_warp, identity, combine, scratch, total);
  return lane == 0 ? of_warps : combine(of_warps, before);
}

// The sum over all threads before this one; `total` becomes that of all threads.
template <class T>
VICO_DEVICE T block_prefix_sum(T value, T* scratch, T& total) {
  return block_scan(value, T{0}, [](T a, T b) { return a + b; }, scratch, total);
}

// sum(i) over i in [0, n), over all threads of the block.
template <class Fn>
VICO_DEVICE int64_t block_sum_over(int64_t n, int64_t* scratch, const Fn& fn) {
  int64_t sum = 0, total;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += fn(i);
  block_prefix_sum(sum, scratch, total);
  return total;
}

}  // namespace vico
