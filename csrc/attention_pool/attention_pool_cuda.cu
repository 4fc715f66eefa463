// CUDA kernels of attention_pool. 16-bit tokens of up to 3200 channels: fused_cuda.cuh. This file has the rest, simple
// kernels for any type, width and alignment that leave the weights of all tokens in memory,
//
//   scores -> softmax -> mean                                  forward
//   scores of query and grad_context -> slopes -> mean, tokens  backward (slopes: ds and p of attention_pool.h)
//
// Weights are [tiles, head groups, count, 16]: the heads of a token are next to each other, heads beyond the last are
// 0.
#include <stdexcept>
#include <string>

#include "attention_pool/attention_pool.h"
#include "attention_pool/fused_cuda.cuh"
#include "common/block_reduce.cuh"

namespace vico {
namespace {

constexpr unsigned kPoolThreads = 256;
constexpr int kScoreTokens = 4;  // per warp

// The rows of one head group of a tile, and how many there are.
template <class T>
struct HeadRows {
  const T* rows;
  int64_t stride;
  int heads;

  VICO_DEVICE HeadRows(const AttentionPoolShape& s, const void* all, int64_t tile_stride, int64_t head_stride,
                       int64_t tile, int64_t group)
      : rows(static_cast<const T*>(all) + tile * tile_stride + group * kPoolHeads * head_stride), stride(head_stride) {
    const int64_t left = s.heads - group * kPoolHeads;
    heads = static_cast<int>(left < kPoolHeads ? left : kPoolHeads);
  }
};

// The weights of one head group of a tile.
template <class A>
VICO_DEVICE A* group_weights(const AttentionPoolShape& s, void* weights, int64_t tile, int64_t group) {
  return static_cast<A*>(weights) + (tile * s.cuda_head_groups() + group) * s.count * kPoolHeads;
}

// scores[h, t] = query[h, :] . tokens[t, :]. A warp takes kScoreTokens tokens, its lanes the channels.
template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_scores_kernel(const __grid_constant__ AttentionPoolShape s, const __grid_constant__ AttentionPoolInputs in,
                       void* scores) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t items = (s.count + kScoreTokens - 1) / kScoreTokens;
  const int64_t item = int64_t{blockIdx.x} * (kPoolThreads / 32) + threadIdx.x / 32;
  if (item >= s.tiles * items) return;
  const int64_t tile = item / items, first = item % items * kScoreTokens;
  const HeadRows<T> query(s, in.query, in.query_stride, in.query_head_stride, tile, blockIdx.y);
  const T* tokens = static_cast<const T*>(in.tokens) + tile * in.tile_stride + first * in.token_stride;
  const int count = static_cast<int>(s.count - first < kScoreTokens ? s.count - first : kScoreTokens);

  A sums[kScoreTokens * kPoolHeads] = {};
  for (int64_t c = lane; c < s.channels; c += 32) {
    A x[kScoreTokens];
#pragma unroll
    for (int t = 0; t < kScoreTokens; ++t) x[t] = t < count ? value_of(tokens[t * in.token_stride + c]) : A{};
#pragma unroll
    for (int h = 0; h < kPoolHeads; ++h) {
      if (h >= query.heads) break;
      const A q = value_of(query.rows[h * query.stride + c]);
#pragma unroll
      for (int t = 0; t < kScoreTokens; ++t) sums[t * kPoolHeads + h] += q * x[t];
    }
  }
  warp_sum_spread(sums);
  constexpr int kShare = kScoreTokens * kPoolHeads / 32;
  A* to = group_weights<A>(s, scores, tile, blockIdx.y) + first * kPoolHeads;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (kShare * lane + i < count * kPoolHeads) to[kShare * lane + i] = sums[i];
  }
}

constexpr unsigned kSoftmaxThreads = 512;
constexpr int kSoftmaxLanes = static_cast<int>(kSoftmaxThreads) / kPoolHeads;  // threads of a head

// scores -> weights, in place, and lse. Block (tile, head group).
template <class A>
__global__ void __launch_bounds__(kSoftmaxThreads)
    pool_softmax_kernel(const __grid_constant__ AttentionPoolShape s, void* scores, void* lse) {
  VICO_SHARED(A, maxima, [kSoftmaxLanes][kPoolHeads]);
  VICO_SHARED(A, totals, [kSoftmaxLanes][kPoolHeads]);
  const int h = static_cast<int>(threadIdx.x) % kPoolHeads, lane = static_cast<int>(threadIdx.x) / kPoolHeads;
  const int64_t tile = blockIdx.x, head = int64_t{blockIdx.y} * kPoolHeads + h;
  A* weights = group_weights<A>(s, scores, tile, blockIdx.y) + h;
  A maximum = kNoScore<A>;
#pragma unroll 4
  for (int64_t t = lane; t < s.count; t += kSoftmaxLanes) {
    const A score = weights[t * kPoolHeads];
    maximum = score > maximum ? score : maximum;
  }
  maxima[lane][h] = maximum;
  __syncthreads();
  for (int i = 0; i < kSoftmaxLanes; ++i) maximum = maxima[i][h] > maximum ? maxima[i][h] : maximum;
  A total = 0;
#pragma unroll 4
  for (int64_t t = lane; t < s.count; t += kSoftmaxLanes) total += exp_of(weights[t * kPoolHeads] - maximum);
  totals[lane][h] = total;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kSoftmaxLanes; ++i) total += totals[i][h];
#pragma unroll 4
  for (int64_t t = lane; t < s.count; t += kSoftmaxLanes) {
    weights[t * kPoolHeads] = exp_of(weights[t * kPoolHeads] - maximum) / total;
  }
  if (lane == 0 && head < s.heads) static_cast<A*>(lse)[tile * s.heads + head] = maximum + log_of(total);
}

// out[h, c] = sum_t weights[h, t] tokens[t, c]. Block (tile, 32 channels; head group): a lane a channel, the warps
// share the tokens.
template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_mean_kernel(const __grid_constant__ AttentionPoolShape s, const __grid_constant__ AttentionPoolInputs in,
                     void* all_weights, void* out) {
  using A = accumulate_t<T>;
  constexpr int kWarps = static_cast<int>(kPoolThreads) / 32;
  VICO_SHARED(A, parts, [kWarps][kPoolHeads][32]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t blocks = (s.channels + 31) / 32, tile = blockIdx.x / blocks, c = blockIdx.x % blocks * 32 + lane;
  const A* weights = group_weights<A>(s, all_weights, tile, blockIdx.y);
  const T* tokens = static_cast<const T*>(in.tokens) + tile * in.tile_stride + c;
  A sums[kPoolHeads] = {};
  if (c < s.channels) {
#pragma unroll 4
    for (int64_t t = warp; t < s.count; t += kWarps) {
      const A x = value_of(tokens[t * in.token_stride]);
      A w[kPoolHeads];
      load_values(w, weights + t * kPoolHeads);
#pragma unroll
      for (int h = 0; h < kPoolHeads; ++h) sums[h] += w[h] * x;
    }
  }
#pragma unroll
  for (int h = 0; h < kPoolHeads; ++h) parts[warp][h][lane] = sums[h];
  __syncthreads();
  if (c >= s.channels) return;
  for (int h = warp; h < kPoolHeads; h += kWarps) {
    const int64_t head = int64_t{blockIdx.y} * kPoolHeads + h;
    if (head >= s.heads) break;
    A sum[1] = {parts[0][h][lane]};
    for (int w = 1; w < kWarps; ++w) sum[0] += parts[w][h][lane];
    store_pack(static_cast<T*>(out) + (tile * s.heads + head) * s.channels + c, pack_of<T, 1>(sum));
  }
}

// scores and products (grad_context[h, :] . tokens[t, :]) -> weights and slopes, in place. Block (tile, head group).
template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_slopes_kernel(const __grid_constant__ AttentionPoolBackwardParams p, void* all_scores, void* all_products) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, dots, [kPoolHeads]);
  const AttentionPoolShape& s = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t tile = blockIdx.x, first_head = int64_t{blockIdx.y} * kPoolHeads;
  for (int h = warp; h < kPoolHeads; h += static_cast<int>(kPoolThreads) / 32) {
    A dot = 0;
    if (first_head + h < s.heads) {
      const int64_t row = (tile * s.heads + first_head + h) * s.channels;
      const T *grad = static_cast<const T*>(p.grad_context) + row, *context = static_cast<const T*>(p.context) + row;
      for (int64_t c = lane; c < s.channels; c += 32) dot += value_of(grad[c]) * value_of(context[c]);
    }
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) dot += __shfl_xor_sync(~0u, dot, delta);
    if (lane == 0) dots[h] = dot;
  }
  __syncthreads();
  const int h = static_cast<int>(threadIdx.x) % kPoolHeads;
  const bool is_head = first_head + h < s.heads;
  const A lse = is_head ? static_cast<const A*>(p.lse)[tile * s.heads + first_head + h] : A{};
  A* scores = group_weights<A>(s, all_scores, tile, blockIdx.y);
  A* products = group_weights<A>(s, all_products, tile, blockIdx.y);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < s.count * kPoolHeads; i += kPoolThreads) {
    const A weight = is_head ? exp_of(scores[i] - lse) : A{};
    scores[i] = weight;
    products[i] = is_head ? weight * (products[i] - dots[h]) : A{};
  }
}

constexpr int kGradTokens = 8;  // per block
constexpr unsigned kGradThreads = 128;

// grad_tokens[t, c] = sum_h weights[h, t] grad_context[h, c] + slopes[h, t] query[h, c]. A thread has one channel of
// kGradTokens tokens, and the heads' values of that channel in registers.
template <class T>
__global__ void __launch_bounds__(kGradThreads)
    pool_grad_tokens_kernel(const __grid_constant__ AttentionPoolBackwardParams p, void* all_weights,
                            void* all_slopes) {
  using A = accumulate_t<T>;
  const AttentionPoolShape& s = p.shape;
  const int64_t items = (s.count + kGradTokens - 1) / kGradTokens, tile = blockIdx.x / items;
  const int64_t first = blockIdx.x % items * kGradTokens;
  const int count = static_cast<int>(s.count - first < kGradTokens ? s.count - first : kGradTokens);
  for (int64_t c = int64_t{blockIdx.y} * kGradThreads + threadIdx.x; c < s.channels;
       c += int64_t{gridDim.y} * kGradThreads) {
    A sums[kGradTokens] = {};
    for (int64_t group = 0; group < s.cuda_head_groups(); ++group) {
      const HeadRows<T> query(s, p.in.query, p.in.query_stride, p.in.query_head_stride, tile, group);
      const HeadRows<T> grad(s, p.grad_context, s.heads * s.channels, s.channels, tile, group);
      A q[kPoolHeads], d[kPoolHeads];
#pragma unroll
      for (int h = 0; h < kPoolHeads; ++h) {
        q[h] = h < query.heads ? value_of(query.rows[h * query.stride + c]) : A{};
        d[h] = h < grad.heads ? value_of(grad.rows[h * grad.stride + c]) : A{};
      }
      const A* weights = group_weights<A>(s, all_weights, tile, group) + first * kPoolHeads;
      const A* slopes = group_weights<A>(s, all_slopes, tile, group) + first * kPoolHeads;
#pragma unroll
      for (int t = 0; t < kGradTokens; ++t) {
        if (t >= count) break;
        A w[kPoolHeads], slope[kPoolHeads];
        load_values(w, weights + t * kPoolHeads);
        load_values(slope, slopes + t * kPoolHeads);
#pragma unroll
        for (int h = 0; h < kPoolHeads; ++h) sums[t] += w[h] * d[h] + slope[h] * q[h];
      }
    }
    T* out = static_cast<T*>(p.grad_tokens) + tile * (p.skip + s.count) * s.channels + c;
    for (int64_t t = 0; first == 0 && t < p.skip; ++t) out[t * s.channels] = T{};
    out += (p.skip + first) * s.channels;
#pragma unroll
    for (int t = 0; t < kGradTokens; ++t) {
      if (t >= count) break;
      const A sum[1] = {sums[t]};
      store_pack(out + t * s.channels, pack_of<T, 1>(sum));
    }
  }
}

void check_pool_launch(const AttentionPoolShape& s) {
  constexpr int64_t kMost = INT32_MAX, kMostGroups = 65535;
  const int64_t tokens = s.tiles * s.count, rows = s.tiles * s.heads;
  if (tokens > kMost || s.channels > kMost || s.tiles * ((s.channels + 31) / 32) > kMost || rows > kMost ||
      rows * combine_parts(s) > kMost || s.cuda_head_groups() > kMostGroups) {
    throw std::runtime_error("attention_pool of " + std::to_string(s.tiles) + " tiles of " + std::to_string(s.count) +
                             " tokens, " + std::to_string(s.channels) + " channels and " + std::to_string(s.heads) +
                             " heads: its CUDA kernels take up to 2^31 - 1 tokens and channels and 65535 * 16 heads");
  }
}

template <class T>
void pool_scores_cuda(const AttentionPoolShape& s, const AttentionPoolInputs& in, void* scores, cudaStream_t stream) {
  constexpr int64_t kWarps = kPoolThreads / 32;
  const int64_t items = s.tiles * ((s.count + kScoreTokens - 1) / kScoreTokens);
  launch(pool_scores_kernel<T>,
         dim3(static_cast<unsigned>((items + kWarps - 1) / kWarps), static_cast<unsigned>(s.cuda_head_groups())),
         dim3(kPoolThreads), 0, stream, s, in, scores);
}

template <class T>
void pool_mean_cuda(const AttentionPoolShape& s, const AttentionPoolInputs& in, void* weights, void* out,
                    cudaStream_t stream) {
  launch(pool_mean_kernel<T>,
         dim3(static_cast<unsigned>(s.tiles * ((s.channels + 31) / 32)), static_cast<unsigned>(s.cuda_head_groups())),
         dim3(kPoolThreads), 0, stream, s, in, weights, out);
}

}  // namespace

void attention_pool_cuda(const AttentionPoolParams& p, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  if (s.tiles == 0 || s.heads == 0) return;
  check_pool_launch(s);
  const dim3 groups(static_cast<unsigned>(s.tiles), static_cast<unsigned>(s.cuda_head_groups()));
  dispatch(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (fused_pool_cuda<T>(p, stream)) return;
    }
    pool_scores_cuda<T>(s, p.in, p.partial, stream);
    launch(pool_softmax_kernel<accumulate_t<T>>, groups, dim3(kSoftmaxThreads), 0, stream, s, p.partial, p.lse);
    pool_mean_cuda<T>(s, p.in, p.partial, p.context, stream);
  });
}

void attention_pool_backward_cuda(const AttentionPoolBackwardParams& p, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  if (s.tiles == 0 || s.heads == 0) return;
  check_pool_launch(s);
  const dim3 groups(static_cast<unsigned>(s.tiles), static_cast<unsigned>(s.cuda_head_groups()));
  AttentionPoolInputs grad = p.in;
  grad.query = p.grad_context;
  grad.query_stride = s.heads * s.channels;
  grad.query_head_stride = s.channels;
  dispatch(s.dtype, [&](auto element) {
    using T = decltype(element);
    void* weights = p.partial;
    void* slopes = static_cast<accumulate_t<T>*>(p.partial) + s.cuda_weights_size();
    pool_scores_cuda<T>(s, p.in, weights, stream);
    pool_scores_cuda<T>(s, grad, slopes, stream);
    launch(pool_slopes_kernel<T>, groups, dim3(kPoolThreads), 0, stream, p, weights, slopes);
    pool_mean_cuda<T>(s, p.in, slopes, p.grad_query, stream);
    if (!p.grad_tokens) return;
    const int64_t items = s.tiles * ((s.count + kGradTokens - 1) / kGradTokens);
    const int64_t columns = (s.channels + kGradThreads - 1) / kGradThreads;
    launch(pool_grad_tokens_kernel<T>,
           dim3(static_cast<unsigned>(items), static_cast<unsigned>(columns < 65535 ? columns : 65535)),
           dim3(kGradThreads), 0, stream, p, weights, slopes);
  });
}

}  // namespace vico
