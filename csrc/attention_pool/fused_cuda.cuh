// Forward of attention_pool for 16-bit tokens on tensor cores: every token is read once.
//
// A block takes a chunk of a tile and up to 16 heads; each of its warps owns a slice of the channels, whatever it does.
// A step of 16 (or 8) tokens: the warps multiply their slices of the queries and tokens; a thread per score adds those
// partial scores up in order and turns the score into a weight (online softmax); every warp adds weights times its
// slice of the tokens to its sums, which stay in registers. Slices travel by cp.async into shared memory that only
// their warp sees, so that steps need no barrier for them. A second kernel adds up a tile's chunks (combine_cuda.cuh).
//
// What bounds a step is the length of its chain of instructions, not memory: loops have no bounds in them (slices are
// padded with zeros to their full span) and no warp does what another does as well.
//
// Chunks have a fixed size and sums a fixed order: a tile's result depends on nothing but the tile.
#pragma once

#include "attention_pool/combine_cuda.cuh"
#include "attention_pool/fused_slices_cuda.cuh"
#include "common/shared_limit.cuh"

namespace vico {

// Weights are relative to a maximum that follows the scores only when they exceed it by this much: below e^4 they lose
// nothing, and sums have to be rescaled a few times per chunk instead of at nearly every step.
constexpr float kPoolSlack = 4;

struct FusedPoolOptions {
  int stages;  // steps in shared memory at a time
  bool wide_tokens, wide_query;
};

// Block (tile, chunk; head group) leaves in `partial` what combine_pool_kernel reads.
template <class T, int kTiles, class F = FusedPool<kTiles>>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    fused_pool_kernel(const __grid_constant__ AttentionPoolParams p, const FusedPoolOptions options) {
  constexpr int kTokens = F::kTokens, kHalves = kTokens / 8, kItems = F::kItems;
  VICO_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionPoolShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;  // of matrix fragments, see common/ptx.cuh
  const int channels = static_cast<int>(s.channels), stride = F::row_stride(channels), begin = warp * F::kSpan;
  const bool has_channels = begin < channels;
  T* query = reinterpret_cast<T*>(shared);                                              // [kPoolHeads, stride]
  T* staged = query + kPoolHeads * stride;                                              // [stages, kTokens, stride]
  float* parts = reinterpret_cast<float*>(staged + options.stages * kTokens * stride);  // of scores: [kMostWarps,
  float* scales = parts + F::kMostWarps * kPoolHeads * F::kScoreStride;                 //   kPoolHeads, kScoreStride]
  T* weights = reinterpret_cast<T*>(scales + kPoolHeads);                               // [kPoolHeads, kScoreStride]

  const int64_t chunks = s.cuda_chunks(), tile = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t first = chunk * s.cuda_chunk, left = s.count - first;
  const int64_t first_head = int64_t{blockIdx.y} * kPoolHeads, heads_left = s.heads - first_head;
  const int count = static_cast<int>(left < s.cuda_chunk ? left : s.cuda_chunk),
            steps = (count + kTokens - 1) / kTokens;
  const int heads = static_cast<int>(heads_left < kPoolHeads ? heads_left : kPoolHeads);
  const T* tokens = static_cast<const T*>(p.in.tokens) + tile * p.in.tile_stride + first * p.in.token_stride;
  const T* queries = static_cast<const T*>(p.in.query) + tile * p.in.query_stride + first_head * p.in.query_head_stride;

  const auto stage = [&](int step, int slot) {
    if (has_channels && step < steps) {
      stage_slice<kTokens, kTiles>(staged + slot * kTokens * stride, stride,
                                   tokens + step * kTokens * p.in.token_stride, p.in.token_stride,
                                   count - step * kTokens, channels, begin, options.wide_tokens);
    }
    ptx::cp_async_commit();
  };
  ptx::let_next_kernel_begin();
  if (!has_channels) {
    for (int i = lane; i < kPoolHeads * F::kScoreStride; i += 32) parts[warp * kPoolHeads * F::kScoreStride + i] = 0;
  }
#pragma unroll 1
  for (int step = 0; step < options.stages; ++step) stage(step, step);
  ptx::wait_for_earlier_kernels();
  if (has_channels) {
    stage_slice<kPoolHeads, kTiles>(query, stride, queries, p.in.query_head_stride, heads, channels, begin,
                                    options.wide_query);
  }
  ptx::cp_async_commit();

  float sums[kTiles][4] = {};
  // Of the softmax: this thread's head and the first of its tokens, and its share of the totals. `rounded` sums the
  // weights as the tensor cores see them: sums divided by it are means, whatever the rounding.
  const int head = thread / F::kLanes, token = thread % F::kLanes * kItems;
  float maximum = kNoScore<float>, total = 0, rounded = 0;
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (options.stages == F::kStages && step > 0) {
      ptx::cp_async_wait<F::kStages - 1>();
    } else {
      ptx::cp_async_wait<0>();  // at first for the queries, which come last
    }
    __syncwarp();
    const T* x = staged + slot * kTokens * stride + begin;
    if (has_channels) {
      float part[kHalves][4];
      score_slice<T, F>(part, query + begin, x, stride, lane);
#pragma unroll
      for (int n = 0; n < kHalves; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* to = parts + (warp * kPoolHeads + g + 8 * r) * F::kScoreStride + n * 8 + t * 2;
          *reinterpret_cast<float2*>(to) = make_float2(part[n][2 * r], part[n][2 * r + 1]);
        }
      }
    }
    __syncthreads();
    if (thread < kPoolHeads * F::kLanes) {
      const float* from = parts + head * F::kScoreStride + token;
      float score[kItems], highest = kNoScore<float>, scale = 1;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        score[i] = from[i];
#pragma unroll
        for (int w = 1; w < F::kMostWarps; ++w) score[i] += from[w * kPoolHeads * F::kScoreStride + i];
        if (step * kTokens + token + i < count) highest = fmaxf(highest, score[i]);
      }
#pragma unroll
      for (int delta = 1; delta < F::kLanes; delta *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, delta));
      if (highest > maximum + kPoolSlack) {
        scale = exp_of(maximum - highest);
        maximum = highest;
        total *= scale;
        rounded *= scale;
      }
      if (token == 0) scales[head] = scale;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float weight = step * kTokens + token + i < count ? exp_of(score[i] - maximum) : 0.0f;
        const T seen = pack_of<T, 1>({weight}).at[0];
        weights[head * F::kScoreStride + token + i] = seen;
        total += weight;
        rounded += value_of(seen);
      }
    }
    __syncthreads();
    if (has_channels) {
      const float scale[2] = {scales[g], scales[g + 8]};
      if (__any_sync(~0u, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j][i] *= scale[i / 2];
        }
      }
      add_slice<T, F>(sums, weights, x, stride, lane);
    }
    __syncwarp();
    stage(step + options.stages, slot);
    slot = slot + 1 == options.stages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();

  // Nobody reads parts of scores any more.
  const PoolPartial<T> partial(s, p.partial, blockIdx.y, blockIdx.x);
  if (thread < kPoolHeads * F::kLanes) {
#pragma unroll
    for (int delta = 1; delta < F::kLanes; delta *= 2) {
      total += __shfl_xor_sync(~0u, total, delta);
      rounded += __shfl_xor_sync(~0u, rounded, delta);
    }
    if (token == 0) {
      parts[head] = rounded == 0 ? 0.0f : 1 / rounded;  // 0: all scores are -inf
      partial.statistics[head] = maximum;
      partial.statistics[kPoolHeads + head] = total;
      partial.statistics[2 * kPoolHeads + head] = rounded;
    }
  }
  __syncthreads();
  if (!has_channels) return;
  const int padded = static_cast<int>(s.cuda_padded_channels());
  const float factors[2] = {parts[g], parts[g + 8]};
  store_slice<T, kTiles>(partial.means + begin, padded, padded - begin < F::kSpan ? padded - begin : F::kSpan, sums,
                         factors, query + begin, stride, lane);
}

// Whether the kernel has run: not on a device whose shared memory is too small for a step.
template <class T, int kTiles, class F = FusedPool<kTiles>>
bool pool_chunks_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  const int channels = static_cast<int>(s.channels);
  const size_t limit = shared_memory_limit();
  FusedPoolOptions options;
  options.stages = F::shared_bytes(channels, F::kStages) <= limit ? F::kStages : 1;
  if (F::shared_bytes(channels, options.stages) > limit) return false;
  const bool wide = channels % 8 == 0;
  options.wide_tokens = wide && is_aligned16(p.in.tokens) && p.in.tile_stride % 8 == 0 && p.in.token_stride % 8 == 0;
  options.wide_query =
      wide && is_aligned16(p.in.query) && p.in.query_stride % 8 == 0 && p.in.query_head_stride % 8 == 0;
  launch_early(p.chained, fused_pool_kernel<T, kTiles, F>,
               dim3(static_cast<unsigned>(s.tiles * s.cuda_chunks()), static_cast<unsigned>(s.cuda_head_groups())),
               dim3(F::kThreads), F::shared_bytes(channels, options.stages), stream, p, options);
  return true;
}

template <class T>
bool fused_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  static_assert(AttentionPoolShape::kFusedChannels == FusedPool<50>::kSpan * FusedPool<50>::kMostWarps,
                "the largest block and the contract disagree");
  if (!p.shape.may_fuse()) return false;
  const auto fits = [&](auto geometry) { return p.shape.channels <= geometry.kSpan * geometry.kMostWarps; };
  const bool done = fits(FusedPool<4>{})    ? pool_chunks_cuda<T, 4>(p, stream)
                    : fits(FusedPool<16>{}) ? pool_chunks_cuda<T, 16>(p, stream)
                                            : pool_chunks_cuda<T, 50>(p, stream);
  if (done) combine_pool_cuda<T>(p, stream);
  return done;
}

}  // namespace vico
