// The second kernel of attention_pool's fused forward: it weighs and adds up what a tile's chunks left.
#pragma once

#include "attention_pool/partial_cuda.cuh"

namespace vico {

constexpr int kCombineWarps = 4, kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineChunks = 8;  // requested at once

// Warps of a row of [tiles, heads].
VICO_INLINE int64_t combine_parts(const AttentionPoolShape& s) { return (s.channels + 255) / 256; }

// Warp: 256 channels of one head, 8 per lane. With m = max over chunks k of maximum[k] and w[k] = exp(maximum[k] - m):
// context = sum_k w[k] rounded[k] means[k] / sum_k w[k] rounded[k],  lse = m + log sum_k w[k] total[k]
// Lane 8 i + k of the first three eights reads statistic i of chunk k, and every eight has all weights.
template <class T>
__global__ void __launch_bounds__(kCombineThreads, 8)
    combine_pool_kernel(const __grid_constant__ AttentionPoolParams p, bool wide) {
  static_assert(kCombineChunks == 8, "an eight of the lanes");
  ptx::let_next_kernel_begin();
  const AttentionPoolShape& s = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, k_lane = lane % kCombineChunks;
  const unsigned parts = static_cast<unsigned>(combine_parts(s)), heads = static_cast<unsigned>(s.heads);
  const unsigned item = blockIdx.x * kCombineWarps + threadIdx.x / 32;
  const unsigned row = item / parts, tile = row / heads, head = row % heads;
  const int c = static_cast<int>(item % parts) * 256 + lane * 8, padded = static_cast<int>(s.cuda_padded_channels());
  const int chunks = static_cast<int>(s.cuda_chunks());
  const bool is_row = row < s.tiles * s.heads, has_channels = is_row && c < padded;
  const PoolPartial<const T> partial(s, p.partial, head / kPoolHeads, int64_t{tile} * chunks);
  const int64_t size = s.cuda_partial_size();
  const T* means = partial.means + head % kPoolHeads * padded + c;
  const float* statistics = partial.statistics + lane / kCombineChunks * kPoolHeads + head % kPoolHeads;
  ptx::wait_for_earlier_kernels();
  if (!is_row) return;  // whole warps

  float maximum = kNoScore<float>, total = 0, rounded = 0, y[8] = {};
#pragma unroll 1
  for (int first = 0; first < chunks; first += kCombineChunks) {
    float mine = lane < kCombineChunks ? kNoScore<float> : 0.0f;
    if (lane < 3 * kCombineChunks && first + k_lane < chunks) mine = statistics[(first + k_lane) * size];
    uint4 x[kCombineChunks];
#pragma unroll
    for (int k = 0; k < kCombineChunks; ++k) {
      x[k] = has_channels && first + k < chunks ? ptx::load16(means + (first + k) * 2 * size) : make_uint4(0, 0, 0, 0);
    }
    const float top = __shfl_sync(~0u, mine, k_lane);
    float highest = fmaxf(maximum, top);
#pragma unroll
    for (int delta = 1; delta < kCombineChunks; delta *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, delta));
    }
    const float scale = exp_of(maximum - highest), weight = exp_of(top - highest);
    maximum = highest;
    float totals = weight * __shfl_sync(~0u, mine, kCombineChunks + k_lane);
    const float share = weight * __shfl_sync(~0u, mine, 2 * kCombineChunks + k_lane);
    float shares = share;
#pragma unroll
    for (int delta = 1; delta < kCombineChunks; delta *= 2) {
      totals += __shfl_xor_sync(~0u, totals, delta);
      shares += __shfl_xor_sync(~0u, shares, delta);
    }
    total = total * scale + totals;
    rounded = rounded * scale + shares;
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] *= scale;
#pragma unroll
    for (int k = 0; k < kCombineChunks; ++k) {
      const float of_chunk = __shfl_sync(~0u, share, k);
      float mean[8];
      values_of(mean, detail::bit_cast<Pack<T, 8>>(x[k]));
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] += of_chunk * mean[j];
    }
  }
  if (!has_channels) return;
  const float factor = 1 / rounded;
#pragma unroll
  for (int j = 0; j < 8; ++j) y[j] *= factor;
  T* context = static_cast<T*>(p.context) + row * s.channels + c;
  const auto pack = pack_of<T, 8>(y);
  if (wide) {
    store_pack(context, pack);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (c + j < s.channels) context[j] = pack.at[j];
    }
  }
  if (c == 0) static_cast<float*>(p.lse)[row] = maximum + log_of(total);
}

template <class T>
void combine_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  const int64_t warps = s.tiles * s.heads * combine_parts(s);
  launch_early(true, combine_pool_kernel<T>, dim3(static_cast<unsigned>((warps + kCombineWarps - 1) / kCombineWarps)),
               dim3(kCombineThreads), 0, stream, p, s.channels % 8 == 0 && is_aligned16(p.context));
}

}  // namespace vico
