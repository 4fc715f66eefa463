// Forward of attention_pool for 16-bit tokens on tensor cores: every token is read once.
//
// A block takes a chunk of a tile and up to 16 heads; each of its warps owns a slice of the channels, whatever it does.
// A step of 16 (or 8) tokens: the warps multiply their slices of the queries and tokens; a thread per score adds those
// partial scores up in order and turns the score into a weight (online softmax); every warp adds weights times its
// slice of the tokens to its sums, which stay in registers. Slices travel by cp.async into shared memory that only
// their warp sees, so that steps need no barrier for them. A second kernel adds up a tile's chunks.
//
// What bounds a step is the length of its chain of instructions, not memory: loops have no bounds in them (slices are
// padded with zeros to their full span) and no warp does what another does as well.
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

// The geometry of a block whose warps hold kTiles tiles of 8 channels each: 4 kTiles registers of sums per thread.
template <int kTiles, int kStepTokens = kTiles <= 16 ? 16 : 8, int kBlocksPerMultiprocessor = kTiles <= 16 ? 2 : 1,
          int kStepsAhead = 2>
struct FusedPool {
  static constexpr int kSpan = 8 * kTiles;  // channels per warp
  static constexpr int kTokens = kStepTokens;
  static constexpr int kMostWarps = 8, kThreads = 32 * kMostWarps;  // those without channels help with the softmax
  static constexpr int kBlocks = kBlocksPerMultiprocessor;
  static constexpr int kStages = kStepsAhead;                          // steps in shared memory at a time, or 1
  static constexpr int kScoreStride = kTokens == 8 ? 8 : kTokens + 8;  // of a head's scores and weights: no conflicts
  // A thread of the softmax has kItems scores of a head, which kLanes of them share.
  static constexpr int kItems = kPoolHeads * kTokens > kThreads ? kPoolHeads* kTokens / kThreads : 1;
  static constexpr int kLanes = kTokens / kItems;

  static VICO_INLINE int warps(int channels) { return (channels + kSpan - 1) / kSpan; }
  // Elements between rows in shared memory: an odd number of 16-byte units, so that ldmatrix meets no bank twice.
  static VICO_INLINE int row_stride(int channels) { return warps(channels) * kSpan + 8; }
  static VICO_INLINE size_t shared_bytes(int channels, int stages) {
    const size_t rows = static_cast<size_t>(kPoolHeads + stages * kTokens) * static_cast<size_t>(row_stride(channels));
    return 2 * rows + kPoolHeads * (kMostWarps * kScoreStride * sizeof(float) + kScoreStride * 2 + sizeof(float));
  }
};

// Weights are relative to a maximum that follows the scores only when they exceed it by this much: below e^4 they lose
// nothing, and sums have to be rescaled a few times per chunk instead of at nearly every step.
constexpr float kPoolSlack = 4;

VICO_DEVICE float exp_of(float x) { return expf(x); }
VICO_DEVICE double exp_of(double x) { return exp(x); }
VICO_DEVICE float log_of(float x) { return logf(x); }
VICO_DEVICE double log_of(double x) { return log(x); }

// By one warp: channels [begin, begin + 8 kTiles) of rows [0, kRows) into shared memory, zeros where there is none.
// `wide`: 16 bytes at a time, asynchronously.
template <int kRows, int kTiles, class T>
VICO_DEVICE void stage_slice(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int channels,
                             int begin, bool wide) {
  constexpr int kAbreast = kTiles < 32 ? kTiles : 32, kRowsAbreast = 32 / kAbreast;  // lanes in a row, rows
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / kAbreast, c = begin + lane % kAbreast * 8;
  if (wide && rows >= kRows && begin + 8 * kTiles <= channels) {
    to += r * to_stride + c;
    from += r * from_stride + c;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAbreast) {
#pragma unroll
      for (int j = 0; j < kTiles; j += kAbreast) {
        if (j + kAbreast <= kTiles || j + lane % kAbreast < kTiles) ptx::cp_async_16(to + j * 8, from + j * 8);
      }
      to += kRowsAbreast * to_stride;
      from += kRowsAbreast * from_stride;
    }
  } else if (wide) {
#pragma unroll 1
    for (int i = r; i < kRows; i += kRowsAbreast) {
#pragma unroll 1
      for (int j = c; j < begin + 8 * kTiles; j += kAbreast * 8) {
        const bool there = i < rows && j < channels;
        ptx::cp_async_16(to + i * to_stride + j, there ? from + i * from_stride + j : from, there ? 16 : 0);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
#pragma unroll 1
      for (int j = begin + lane; j < begin + 8 * kTiles; j += 32) {
        to[i * to_stride + j] = i < rows && j < channels ? from[i * from_stride + j] : T{};
      }
    }
  }
}

// scores[heads, tokens] of a warp's slice. `query` and `x` are its first elements in shared memory.
template <class T, class F>
VICO_DEVICE void score_slice(float (&scores)[F::kTokens / 8][4], const T* query, const T* x, int stride, int lane) {
  constexpr int kHalves = F::kTokens / 8, kSteps = F::kSpan / 16;
  constexpr int kChains = kHalves >= 4 ? 1 : 4 / kHalves;  // sums that do not wait for each other
  const T* a_row = query + (lane & 15) * stride + (lane >> 4) * 8;
  float part[kChains][kHalves][4] = {};
  if constexpr (kHalves == 1) {
    const T* row = x + (lane & 7) * stride + (lane >> 3) * 8;
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      uint32_t b[4];
      if (k + 1 < kSteps) {
        ptx::ldmatrix(b, row + 16 * k);
      } else {
        uint32_t last[2];
        ptx::ldmatrix(last, x + (lane & 7) * stride + (lane >> 3 & 1) * 8 + 16 * k);
        b[0] = last[0];
        b[1] = last[1];
      }
#pragma unroll
      for (int i = 0; i < 2 && k + i < kSteps; ++i) {
        uint32_t a[4];
        ptx::ldmatrix(a, a_row + 16 * (k + i));
        mma<T>(part[(k + i) % kChains][0], a, {b[2 * i], b[2 * i + 1]});
      }
    }
  } else {
    const T* row = x + ((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      ptx::ldmatrix(a, a_row + 16 * k);
#pragma unroll
      for (int n = 0; n < kHalves; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix(b, row + n * 8 * stride + 16 * k);
        mma<T>(part[k % kChains][n], a, {b[0], b[1]});
        mma<T>(part[k % kChains][n + 1], a, {b[2], b[3]});
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kHalves; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = part[0][n][i];
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) scores[n][i] += part[chain][n][i];
    }
  }
}

// sums[heads, channels] += weights[heads, tokens] x of a warp's slice.
template <class T, class F, int kTiles>
VICO_DEVICE void add_slice(float (&sums)[kTiles][4], const T* weights, const T* x, int stride, int lane) {
  static_assert(kTiles % 2 == 0, "a matrix load has two tiles or four");
  const T* row_weights = weights + (lane & 15) * F::kScoreStride;
  if constexpr (F::kTokens == 8) {
    uint32_t a[2];
    ptx::ldmatrix(a, row_weights);
    const T* row = x + (lane & 7) * stride;
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t b[4] = {};
      if (j + 2 < kTiles) {
        ptx::ldmatrix_transposed(b, row + (lane >> 3) * 8 + j * 8);
      } else {
        uint32_t last[2];
        ptx::ldmatrix_transposed(last, row + (lane >> 3 & 1) * 8 + j * 8);
        b[0] = last[0];
        b[1] = last[1];
      }
#pragma unroll
      for (int i = 0; i < 4 && j + i < kTiles; ++i) mma<T>(sums[j + i], {a[0], a[1], 0u, 0u}, {b[i], 0u});
    }
  } else {
#pragma unroll
    for (int token = 0; token < F::kTokens; token += 16) {
      uint32_t a[4];
      ptx::ldmatrix(a, row_weights + (lane >> 4) * 8 + token);
      const T* row = x + (token + (lane & 15)) * stride + (lane >> 4) * 8;
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_transposed(b, row + j * 8);
        mma<T>(sums[j], a, {b[0], b[1]});
        mma<T>(sums[j + 1], a, {b[2], b[3]});
      }
    }
  }
}

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
  if (thread >= kPoolHeads * F::kLanes) return;
  float* statistics = partial + kPoolHeads * padded + head;  // [3, kPoolHeads]
#pragma unroll
  for (int delta = 1; delta < F::kLanes; delta *= 2) {
    total += __shfl_xor_sync(~0u, total, delta);
    rounded += __shfl_xor_sync(~0u, rounded, delta);
  }
  if (token != 0) return;
  statistics[0] = maximum;
  statistics[kPoolHeads] = total;
  statistics[2 * kPoolHeads] = rounded;
}

constexpr unsigned kCombineThreads = 128;

// Thread: 8 channels of one head. With m = max over chunks k of maximum[k] and w[k] = exp(maximum[k] - m):
// context = sum_k w[k] sums[k] / sum_k w[k] rounded[k],  lse = m + log sum_k w[k] total[k]
// kCombineChunks of them at a time: all they left is requested at once, and m follows.
constexpr int kCombineChunks = 8;

template <class T>
__global__ void __launch_bounds__(kCombineThreads, 4)
    combine_pool_kernel(const __grid_constant__ AttentionPoolParams p, bool wide) {
  ptx::let_next_kernel_begin();
  ptx::wait_for_earlier_kernels();
  const AttentionPoolShape& s = p.shape;
  const int64_t packs = s.cuda_padded_channels() / 8, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= s.tiles * s.heads * packs) return;
  const int64_t row = i / packs, c = i % packs * 8;  // row of [tiles, heads]
  const int64_t tile = row / s.heads, head = row % s.heads, chunks = s.cuda_chunks(), size = s.cuda_partial_size();
  const float* partial =
      static_cast<const float*>(p.partial) + (tile * s.cuda_head_groups() + head / kPoolHeads) * chunks * size;
  const float* sums = partial + head % kPoolHeads * s.cuda_padded_channels() + c;
  const float* statistics = partial + kPoolHeads * s.cuda_padded_channels() + head % kPoolHeads;
  float maximum = kNoScore<float>, total = 0, rounded = 0, y[8] = {};
#pragma unroll 1
  for (int64_t first = 0; first < chunks; first += kCombineChunks) {
    float maxima[kCombineChunks], totals[kCombineChunks] = {}, seen[kCombineChunks] = {}, x[kCombineChunks][8] = {};
#pragma unroll
    for (int k = 0; k < kCombineChunks; ++k) {
      maxima[k] = kNoScore<float>;
      if (first + k >= chunks) continue;
      maxima[k] = statistics[(first + k) * size];
      totals[k] = statistics[(first + k) * size + kPoolHeads];
      seen[k] = statistics[(first + k) * size + 2 * kPoolHeads];
      load_values(x[k], sums + (first + k) * size);
    }
    float highest = maximum;
#pragma unroll
    for (int k = 0; k < kCombineChunks; ++k) highest = fmaxf(highest, maxima[k]);
    const float scale = exp_of(maximum - highest);
    maximum = highest;
    total *= scale;
    rounded *= scale;
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] *= scale;
#pragma unroll
    for (int k = 0; k < kCombineChunks; ++k) {
      const float weight = exp_of(maxima[k] - maximum);
      total += weight * totals[k];
      rounded += weight * seen[k];
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] += weight * x[k][j];
    }
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
void combine_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  const int64_t threads = s.tiles * s.heads * (s.cuda_padded_channels() / 8);
  launch_early(true, combine_pool_kernel<T>,
               dim3(static_cast<unsigned>((threads + kCombineThreads - 1) / kCombineThreads)), dim3(kCombineThreads), 0,
               stream, p, s.channels % 8 == 0 && is_aligned16(p.context));
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
