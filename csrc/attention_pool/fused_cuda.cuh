// Forward of attention_pool for 16-bit tokens on tensor cores: every token is read once.
//
// A block takes a chunk of a tile and up to 16 heads; each of its warps owns a slice of the channels, whatever it does.
// A step of 16 (or 8) tokens: the warps multiply their slices of the queries and tokens, the block adds those partial
// scores up in order, every warp turns them into weights (online softmax, redundantly: cheaper than to share) and adds
// weights times its slice of the tokens to its sums, which stay in registers. Slices travel by cp.async into shared
// memory that only their warp sees, so that steps need no barrier for them. A second kernel adds up a tile's chunks.
//
// Chunks have a fixed size and sums a fixed order: a tile's result depends on nothing but the tile.
#pragma once

#include <limits>

#include "attention_pool/attention_pool.h"
#include "common/mma.cuh"
#include "common/pack.cuh"
#include "common/shared_limit.cuh"

namespace vico {

// The lowest finite number and not -inf: scores of -inf then weigh 0 instead of exp(-inf + inf).
template <class A>
constexpr A kNoScore = std::numeric_limits<A>::lowest();

constexpr int kPoolHeads = static_cast<int>(AttentionPoolShape::kCudaHeads);
constexpr int kPoolChunk = static_cast<int>(AttentionPoolShape::kCudaChunk);

// The geometry of a block whose warps hold kTiles tiles of 8 channels each: 4 kTiles registers of sums per thread.
template <int kTiles>
struct FusedPool {
  static constexpr int kSpan = 8 * kTiles;               // channels per warp
  static constexpr int kTokens = kTiles <= 16 ? 16 : 8;  // per step
  static constexpr int kMostWarps = 8;
  static constexpr int kBlocks = kTiles <= 16 ? 2 : 1;         // per multiprocessor
  static constexpr int kScoreStride = kTokens == 16 ? 24 : 8;  // of a head's scores: no bank conflicts

  static VICO_INLINE int padded(int channels) { return (channels + 15) / 16 * 16; }
  // Elements between rows in shared memory: an odd number of 16-byte units, so that ldmatrix meets no bank twice.
  static VICO_INLINE int row_stride(int channels) { return padded(channels) + 8; }
  static VICO_INLINE int warps(int channels) { return (channels + kSpan - 1) / kSpan; }
  static VICO_INLINE size_t shared_bytes(int channels, int stages) {
    const size_t rows = static_cast<size_t>(kPoolHeads + stages * kTokens) * static_cast<size_t>(row_stride(channels));
    return 2 * rows + static_cast<size_t>((warps(channels) + 1) * kPoolHeads * kScoreStride) * sizeof(float);
  }
};

VICO_DEVICE float exp_of(float x) { return expf(x); }
VICO_DEVICE double exp_of(double x) { return exp(x); }
VICO_DEVICE float log_of(float x) { return logf(x); }
VICO_DEVICE double log_of(double x) { return log(x); }

// By one warp: channels [begin, begin + 8 kTiles) of rows [0, kRows) into shared memory, zeros where there is none.
// `wide`: 16 bytes at a time, asynchronously.
template <int kRows, int kTiles, class T>
VICO_DEVICE void stage_slice(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int channels,
                             int begin, bool wide) {
  constexpr int kAbreast = kTiles < 32 ? kTiles : 32;  // lanes in a row
  const int lane = static_cast<int>(threadIdx.x) % 32, end = FusedPool<kTiles>::padded(channels);
  if (!wide) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = begin + lane; c < begin + 8 * kTiles && c < end; c += 32) {
        to[r * to_stride + c] = r < rows && c < channels ? from[r * from_stride + c] : T{};
      }
    }
    return;
  }
#pragma unroll 1  // addresses worked out ahead would take the registers of the sums
  for (int r = lane / kAbreast; r < kRows; r += 32 / kAbreast) {
#pragma unroll
    for (int i = lane % kAbreast; i < kTiles; i += kAbreast) {
      const int c = begin + i * 8;
      const bool there = r < rows && c < channels;
      if (c < end) ptx::cp_async_16(to + r * to_stride + c, there ? from + r * from_stride + c : from, there ? 16 : 0);
    }
  }
}

struct FusedPoolOptions {
  int stages;  // steps in shared memory at a time
  bool wide_tokens, wide_query;
};

// Block (tile, chunk; head group) leaves in `partial` what combine_pool_kernel reads.
template <class T, int kTiles>
__global__ void __launch_bounds__(32 * FusedPool<kTiles>::kMostWarps, FusedPool<kTiles>::kBlocks)
    fused_pool_kernel(const __grid_constant__ AttentionPoolParams p, const FusedPoolOptions options) {
  using F = FusedPool<kTiles>;
  constexpr int kTokens = F::kTokens, kHalves = kTokens / 8;
  VICO_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionPoolShape& s = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;  // of matrix fragments, see common/ptx.cuh
  const int channels = static_cast<int>(s.channels), stride = F::row_stride(channels), end = F::padded(channels);
  const int begin = warp * F::kSpan;
  T* query = reinterpret_cast<T*>(shared);  // [kPoolHeads, stride]
  T* staged = query + kPoolHeads * stride;  // [stages, kTokens, stride]
  float* parts =
      reinterpret_cast<float*>(staged + options.stages * kTokens * stride);   // [warps, kPoolHeads, kScoreStride]
  float* scores = parts + F::warps(channels) * kPoolHeads * F::kScoreStride;  // [kPoolHeads, kScoreStride]

  const int64_t chunks = s.cuda_chunks(), tile = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t first = chunk * kPoolChunk, left = s.count - first;
  const int64_t first_head = int64_t{blockIdx.y} * kPoolHeads, heads_left = s.heads - first_head;
  const int count = static_cast<int>(left < kPoolChunk ? left : kPoolChunk), steps = (count + kTokens - 1) / kTokens;
  const int heads = static_cast<int>(heads_left < kPoolHeads ? heads_left : kPoolHeads);
  const T* tokens = static_cast<const T*>(p.in.tokens) + tile * p.in.tile_stride + first * p.in.token_stride;
  const T* queries = static_cast<const T*>(p.in.query) + tile * p.in.query_stride + first_head * p.in.query_head_stride;

  const auto slot = [&](int step) { return staged + step % options.stages * kTokens * stride; };
  const auto stage = [&](int step) {
    if (step < steps) {
      stage_slice<kTokens, kTiles>(slot(step), stride, tokens + step * kTokens * p.in.token_stride, p.in.token_stride,
                                   count - step * kTokens, channels, begin, options.wide_tokens);
    }
    ptx::cp_async_commit();
  };
  stage_slice<kPoolHeads, kTiles>(query, stride, queries, p.in.query_head_stride, heads, channels, begin,
                                  options.wide_query);
  for (int step = 0; step < options.stages; ++step) stage(step);

  float sums[kTiles][4] = {};
  float maximum[2] = {kNoScore<float>, kNoScore<float>};  // of heads g and g + 8
  // Of the lane's share of the tokens. `rounded` sums the weights as the tensor cores see them: sums divided by it are
  // means, whatever the rounding.
  float total[2] = {}, rounded[2] = {};
  for (int step = 0; step < steps; ++step) {
    if (options.stages == 2) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncwarp();
    const T* x = slot(step);

    float part[kHalves][4] = {};  // scores of this warp's channels
#pragma unroll
    for (int k = begin; k < begin + F::kSpan; k += 16) {
      if (k >= end) break;
      uint32_t a[4], b[2 * kHalves];
      ptx::ldmatrix(a, query + (lane & 15) * stride + k + (lane >> 4) * 8);
      const int token = kHalves == 2 ? (lane & 7) + (lane >> 4) * 8 : lane & 7;
      ptx::ldmatrix(b, x + token * stride + k + (lane >> 3 & 1) * 8);
#pragma unroll
      for (int n = 0; n < kHalves; ++n) mma<T>(part[n], a, {b[2 * n], b[2 * n + 1]});
    }
#pragma unroll
    for (int n = 0; n < kHalves; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* to = parts + (warp * kPoolHeads + g + 8 * r) * F::kScoreStride + n * 8 + t * 2;
        to[0] = part[n][2 * r];
        to[1] = part[n][2 * r + 1];
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kPoolHeads * kTokens; i += static_cast<int>(blockDim.x)) {
      const int at = i / kTokens * F::kScoreStride + i % kTokens;
      float sum = parts[at];
#pragma unroll
      for (int w = 1; w < F::kMostWarps; ++w) {
        sum += w < F::warps(channels) ? parts[w * kPoolHeads * F::kScoreStride + at] : 0.0f;
      }
      scores[at] = sum;
    }
    __syncthreads();

    uint32_t weights[4] = {};  // fragment [heads, tokens]
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float score[kHalves][2], highest = maximum[r];
      const auto is_token = [&](int n, int i) { return step * kTokens + n * 8 + t * 2 + i < count; };
#pragma unroll
      for (int n = 0; n < kHalves; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          score[n][i] = scores[(g + 8 * r) * F::kScoreStride + n * 8 + t * 2 + i];
          if (is_token(n, i)) highest = fmaxf(highest, score[n][i]);
        }
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      scale[r] = exp_of(maximum[r] - highest);
      maximum[r] = highest;
      total[r] *= scale[r];
      rounded[r] *= scale[r];
#pragma unroll
      for (int n = 0; n < kHalves; ++n) {
        float weight[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          weight[i] = is_token(n, i) ? exp_of(score[n][i] - highest) : 0.0f;
          total[r] += weight[i];
        }
        const auto low = pack_of<T, 1>({weight[0]}).at[0], high = pack_of<T, 1>({weight[1]}).at[0];
        rounded[r] += value_of(low) + value_of(high);
        weights[2 * n + r] = low.bits | uint32_t{high.bits} << 16;
      }
    }
    if (__any_sync(~0u, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] *= scale[i / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const int c = begin + j * 8;
      if (c >= end) break;
      if constexpr (kHalves == 2) {
        uint32_t b[4];
        ptx::ldmatrix_transposed(b, x + (lane & 15) * stride + c + (lane >> 4) * 8);
        mma<T>(sums[j], weights, {b[0], b[1]});
        mma<T>(sums[j + 1], weights, {b[2], b[3]});
      } else {
        uint32_t b[2];
        ptx::ldmatrix_transposed(b, x + (lane & 7) * stride + c + (lane >> 3 & 1) * 8);
        mma<T>(sums[j], weights, {b[0], 0u});
        mma<T>(sums[j + 1], weights, {b[1], 0u});
      }
    }
    __syncwarp();
    stage(step + options.stages);
  }
  ptx::cp_async_wait<0>();

  float* partial = static_cast<float*>(p.partial) +
                   ((tile * s.cuda_head_groups() + blockIdx.y) * chunks + chunk) * s.cuda_partial_size();
  const int padded = static_cast<int>(s.cuda_padded_channels());
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int c = begin + j * 8 + t * 2;
    if (c >= padded) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<float2*>(partial + (g + 8 * r) * padded + c) = make_float2(sums[j][2 * r], sums[j][2 * r + 1]);
    }
  }
  if (warp != 0) return;
  float* statistics = partial + kPoolHeads * padded;  // [3, kPoolHeads]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int delta = 1; delta <= 2; delta *= 2) {
      total[r] += __shfl_xor_sync(~0u, total[r], delta);
      rounded[r] += __shfl_xor_sync(~0u, rounded[r], delta);
    }
    if (t != 0) continue;
    statistics[g + 8 * r] = maximum[r];
    statistics[kPoolHeads + g + 8 * r] = total[r];
    statistics[2 * kPoolHeads + g + 8 * r] = rounded[r];
  }
}

constexpr unsigned kCombineThreads = 128;

// Thread: 8 channels of one head. With m = max over chunks k of maximum[k] and w[k] = exp(maximum[k] - m):
// context = sum_k w[k] sums[k] / sum_k w[k] rounded[k],  lse = m + log sum_k w[k] total[k]
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_pool_kernel(const __grid_constant__ AttentionPoolParams p, bool wide) {
  const AttentionPoolShape& s = p.shape;
  const int64_t packs = s.cuda_padded_channels() / 8, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= s.tiles * s.heads * packs) return;
  const int64_t row = i / packs, c = i % packs * 8;  // row of [tiles, heads]
  const int64_t tile = row / s.heads, head = row % s.heads, chunks = s.cuda_chunks();
  const float* partial = static_cast<const float*>(p.partial) +
                         (tile * s.cuda_head_groups() + head / kPoolHeads) * chunks * s.cuda_partial_size();
  const float* sums = partial + head % kPoolHeads * s.cuda_padded_channels() + c;
  const float* statistics = partial + kPoolHeads * s.cuda_padded_channels() + head % kPoolHeads;
  float maximum = statistics[0];
  for (int64_t k = 1; k < chunks; ++k) maximum = fmaxf(maximum, statistics[k * s.cuda_partial_size()]);
  float total = 0, rounded = 0, y[8] = {};
#pragma unroll 4
  for (int64_t k = 0; k < chunks; ++k) {
    const float* of_chunk = statistics + k * s.cuda_partial_size();
    const float weight = exp_of(of_chunk[0] - maximum);
    float x[8];
    load_values(x, sums + k * s.cuda_partial_size());
    total += weight * of_chunk[kPoolHeads];
    rounded += weight * of_chunk[2 * kPoolHeads];
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] += weight * x[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) y[j] /= rounded;
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

// Whether the kernels have run: not on a device whose shared memory is too small for a step.
template <class T, int kTiles>
bool fused_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  using F = FusedPool<kTiles>;
  const AttentionPoolShape& s = p.shape;
  const int channels = static_cast<int>(s.channels);
  FusedPoolOptions options;
  options.stages = 2;
  while (options.stages > 0 && F::shared_bytes(channels, options.stages) > shared_memory_limit()) --options.stages;
  if (options.stages == 0) return false;
  const bool wide = channels % 8 == 0;
  options.wide_tokens = wide && is_aligned16(p.in.tokens) && p.in.tile_stride % 8 == 0 && p.in.token_stride % 8 == 0;
  options.wide_query =
      wide && is_aligned16(p.in.query) && p.in.query_stride % 8 == 0 && p.in.query_head_stride % 8 == 0;
  launch(fused_pool_kernel<T, kTiles>,
         dim3(static_cast<unsigned>(s.tiles * s.cuda_chunks()), static_cast<unsigned>(s.cuda_head_groups())),
         dim3(static_cast<unsigned>(32 * F::warps(channels))), F::shared_bytes(channels, options.stages), stream, p,
         options);
  const int64_t threads = s.tiles * s.heads * (s.cuda_padded_channels() / 8);
  launch(combine_pool_kernel<T>, dim3(static_cast<unsigned>((threads + kCombineThreads - 1) / kCombineThreads)),
         dim3(kCombineThreads), 0, stream, p, wide && is_aligned16(p.context));
  return true;
}

template <class T>
bool fused_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  static_assert(AttentionPoolShape::kFusedChannels == FusedPool<50>::kSpan * FusedPool<50>::kMostWarps,
                "the largest block and the contract disagree");
  if (!p.shape.may_fuse()) return false;
  if (p.shape.channels <= FusedPool<4>::kSpan * FusedPool<4>::kMostWarps) return fused_pool_cuda<T, 4>(p, stream);
  if (p.shape.channels <= FusedPool<16>::kSpan * FusedPool<16>::kMostWarps) return fused_pool_cuda<T, 16>(p, stream);
  return fused_pool_cuda<T, 50>(p, stream);
}

}  // namespace vico
