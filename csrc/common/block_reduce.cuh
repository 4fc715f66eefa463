// Sums over the threads of a block or a warp, in an order that depends on nothing but the block's size.
#pragma once

#include "common/device.cuh"

namespace vico {

constexpr int kMaxWarps = 32;

// Replaces each of the kCount values by its sum over all threads. `scratch` [kCount][kMaxWarps] is shared memory that
// the block touches in no other way until its next barrier; whole warps only.
template <int kCount, class A>
VICO_DEVICE void block_sum(A (&values)[kCount], A* scratch) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) values[i] += __shfl_xor_sync(~0u, values[i], delta);
    if (threadIdx.x % 32 == 0) scratch[i * kMaxWarps + threadIdx.x / 32] = values[i];
  }
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = scratch[i * kMaxWarps];
    for (int w = 1; w < warps; ++w) values[i] += scratch[i * kMaxWarps + w];
  }
}

// Sums of kCount values over the lanes of a warp, spread over it: lane l gets those of values [l * kCount / 32, (l + 1)
// * kCount / 32) in values[0 .. kCount / 32). In halves: a lane keeps half of what it has and gives the other half
// away.
template <int kDelta = 16, int kCount, class A>
VICO_DEVICE void warp_sum_spread(A (&values)[kCount]) {
  constexpr int kKept = kCount * kDelta / 32;
  static_assert(kKept >= 1 && kCount % 32 == 0, "every lane gets as many sums");
  const bool upper = threadIdx.x & kDelta;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const A low = values[i], high = values[i + kKept];
    values[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kDelta);
  }
  if constexpr (kDelta > 1) warp_sum_spread<kDelta / 2>(values);
}

}  // namespace vico
