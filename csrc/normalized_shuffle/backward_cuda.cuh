// CUDA backward kernels of normalized_shuffle.
//
// Work is ordered by block b = (tile of the buffer, output token), cut into chunks of a size that depends on the
// problem alone; each chunk leaves its sums of grad_weight and grad_bias in `partials`, which combine_chunks_cuda adds
// in order: two runs are bit-equal. Resident: one thread block per chunk, its columns' sums in registers; tokens and
// grad_out are read once, grad_tokens written once, a row ahead. Streaming, for any row length, alignment and type: a
// first kernel leaves each row's two means in `row_means`, a second reads everything again and needs no barrier.
#pragma once

#include "common/block_reduce.cuh"
#include "common/shared_limit.cuh"
#include "common/shuffle_row.cuh"
#include "normalized_shuffle/backward_plan.h"

namespace vico {

// Zeros for the skipped tokens of a tile.
template <class T>
VICO_DEVICE void zero_skipped(const NormalizedShuffleBackwardParams& p, const ShuffleShape& dense, int64_t tile) {
  T* grad = static_cast<T*>(p.grad_tokens) + tile * dense.tile_stride;
  const T zero{};
  for (int64_t i = threadIdx.x; i < dense.skip * dense.channels; i += blockDim.x) grad[i] = zero;
}

// Threads of a block at most, and threads of a multiprocessor.
template <int kUnits>
constexpr unsigned kResidentBackwardThreads = 512 * kUnits;

// A row of the work: a block, for output tile number k of those that its tile was made into, [first, last).
struct BackwardRow {
  uint32_t block, k, first, last;

  VICO_DEVICE void select(const NormalizedShuffleBackwardParams& p, const TokenBlocks& blocks) {
    const Selection from(blocks.tile(block), p.tile_offsets, p.selected_tiles);
    k = first = static_cast<uint32_t>(from.first);
    last = static_cast<uint32_t>(from.last);
  }
  // Goes on, from where it is or from one past its block's last output tile, to a block that has one, or to `end`.
  VICO_DEVICE void settle(const NormalizedShuffleBackwardParams& p, const TokenBlocks& blocks, uint32_t end) {
    while (k == last && ++block < end) select(p, blocks);
  }
};

// Zeros where no gradient arrives, among blocks [begin, end): in skipped tokens, and in tiles without an output tile.
template <class T>
VICO_DEVICE void zero_rest(const NormalizedShuffleBackwardParams& p, const TokenBlocks& dense_blocks, uint32_t begin,
                           uint32_t end, uint32_t per_tile) {
  constexpr int kN = kPackWidth<T>;
  const ShuffleShape dense = contiguous(p.shape);
  const ShuffleRow row(dense, kN);
  for (uint32_t tile = dense_blocks.tile(begin); tile * per_tile < end; ++tile) {
    const uint32_t first = tile * per_tile;
    if (first >= begin) zero_skipped<T>(p, dense, tile);
    const Selection from(tile, p.tile_offsets, p.selected_tiles);
    if (from.first < from.last) continue;
    for (uint32_t b = max(first, begin); b < min(first + per_tile, end); ++b) {
      T* to = static_cast<T*>(p.grad_tokens) + tile * dense.tile_stride + dense_blocks.offset(b - first);
      for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
        store_pack(to + row.source(dense, u, kN), Pack<T, kN>{});
      }
    }
  }
}

// Both sums over the threads of the block, in an order that depends on its size alone. One barrier; `scratch` is used
// again only after another.
template <class A>
VICO_DEVICE void block_sum_two(A (&sums)[2], A (&scratch)[2][kMaxWarps]) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32,
                 half = lane / 16;  // a half of the lanes for each sum
  A own = (half ? sums[1] : sums[0]) + __shfl_xor_sync(~0u, half ? sums[0] : sums[1], 16);
#pragma unroll
  for (int delta = 8; delta > 0; delta /= 2) own += __shfl_xor_sync(~0u, own, delta);
  if (lane % 16 == 0) scratch[half][warp] = own;
  __syncthreads();
  const unsigned warps = blockDim.x / 32, w = lane % 16;
  A total = w < warps ? scratch[half][w] : A(0);
  if (w + 16 < warps) total += scratch[half][w + 16];
#pragma unroll
  for (int delta = 8; delta > 0; delta /= 2) total += __shfl_xor_sync(~0u, total, delta);
  sums[0] = __shfl_sync(~0u, total, 0);
  sums[1] = __shfl_sync(~0u, total, 16);
}

// What the host works out for the kernel. A run of `rate` tokens lies together in grad_tokens, the next so many packs
// after it.
struct BackwardLayout {
  Divisor run_packs;
  uint32_t gap, rows_per_chunk, blocks;
  bool two_rows;
};

// With h = (x - mean) * rstd and g = grad_out * weight:  grad_x = rstd * (g - sum(g) / C - h * sum(g h) / C),
// grad_weight = sum over rows of grad_out * h,  grad_bias = sum over rows of grad_out.
//
// A row's tokens and grad_out are in shared memory, each thread's packs where that thread copied them, and those of the
// next row, if `two_rows`, on their way there. After them sums of grad_tokens where a tile was selected several times.
template <class T, int kUnits>
__global__ void __launch_bounds__(kResidentBackwardThreads<kUnits>, 1024 / kResidentBackwardThreads<kUnits>)
    normalized_shuffle_backward_kernel(const __grid_constant__ NormalizedShuffleBackwardParams p,
                                       const __grid_constant__ TokenBlocks blocks,
                                       const __grid_constant__ TokenBlocks dense_blocks,
                                       const __grid_constant__ BackwardLayout layout) {
  using A = accumulate_t<T>;
  constexpr int kN = kPackWidth<T>;
  VICO_SHARED(A, scratch, [2][2][kMaxWarps]);  // two in turn, so that one barrier a row is enough
  VICO_DYNAMIC_SHARED(T, shared_rows);
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const unsigned per_tile = static_cast<unsigned>(s.out_tokens()), channels = row.packs * kN;
  const uint32_t begin = blockIdx.x * layout.rows_per_chunk;
  const uint32_t end = min(begin + layout.rows_per_chunk, layout.blocks);
  const auto pack_index = [&](int u) { return threadIdx.x + static_cast<unsigned>(u) * blockDim.x; };
  unsigned source[kUnits];  // in packs
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    source[u] = static_cast<unsigned>(row.source(s, pack_index(u), kN) / kN);
  }

  const int64_t dense_tile = contiguous(s).tile_stride;
  const bool two_rows = layout.two_rows;

  A next_mean = 0, next_rstd = 0;
  const auto fetch = [&](const BackwardRow& at, unsigned to) {
    if (at.block < end) {
      const uint32_t tile = blocks.tile(at.block), token = blocks.token(at.block, tile);
      const int64_t m = (p.selected_tiles ? p.selected_tiles[at.k] : int64_t{at.k}) * per_tile + token;
      const T* x = static_cast<const T*>(p.tokens) + tile * s.tile_stride + blocks.offset(token);
      const T* dy = static_cast<const T*>(p.grad_out) + m * channels;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) >= row.packs) continue;
        ptx::cp_async_16(shared_rows + to + pack_index(u) * kN, x + int64_t{source[u]} * kN);
        ptx::cp_async_16(shared_rows + to + channels + pack_index(u) * kN, dy + pack_index(u) * kN);
      }
      next_mean = static_cast<const A*>(p.mean)[m];
      next_rstd = static_cast<const A*>(p.rstd)[m];
    }
    ptx::cp_async_commit();
  };
  unsigned here = 0;  // in elements of shared_rows
  BackwardRow next{begin, 0, 0, 0};
  next.select(p, blocks);
  next.settle(p, blocks, end);
  fetch(next, here);
  if (p.grad_tokens) zero_rest<T>(p, dense_blocks, begin, end, per_tile);

  A grad_weight[kUnits][kN] = {}, grad_bias[kUnits][kN] = {};
  const A part = A(1) / static_cast<A>(channels);
  int turn = 0;
  while (next.block < end) {
    const bool is_first = next.k == next.first, is_last = next.k + 1 == next.last;
    const A mean = next_mean, rstd = next_rstd;
    const uint32_t block = next.block;
    ++next.k;
    next.settle(p, blocks, end);
    const unsigned there = two_rows ? 2 * channels - here : here;
    if (two_rows) {
      fetch(next, there);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    const auto load = [&](A(&h)[kN], A(&d)[kN], A(&w)[kN], int u) {
      values_of(h, load_pack<T, kN>(shared_rows + here + pack_index(u) * kN));
      values_of(d, load_pack<T, kN>(shared_rows + here + channels + pack_index(u) * kN));
      load_parameter<T>(w, p.weight, pack_index(u) * kN, p.element_parameters);
#pragma unroll
      for (int i = 0; i < kN; ++i) h[i] = (h[i] - mean) * rstd;
    };
    A sums[2] = {};  // of g and g * h
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (pack_index(u) >= row.packs) continue;
      A h[kN], d[kN], w[kN];
      load(h, d, w, u);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        grad_weight[u][i] += d[i] * h[i];
        grad_bias[u][i] += d[i];
        const A g = d[i] * w[i];
        sums[0] += g;
        sums[1] += g * h[i];
      }
    }
    if (p.grad_tokens) {
      block_sum_two(sums, scratch[turn]);
      turn ^= 1;
      const uint32_t tile = blocks.tile(block);
      T* const grad_x =
          static_cast<T*>(p.grad_tokens) + tile * dense_tile + dense_blocks.offset(blocks.token(block, tile));
      const A mean_g = sums[0] * part * rstd, mean_gh = sums[1] * part * rstd;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) >= row.packs) continue;
        A h[kN], d[kN], w[kN];
        load(h, d, w, u);
#pragma unroll
        for (int i = 0; i < kN; ++i) d[i] = d[i] * w[i] * rstd - mean_g - h[i] * mean_gh;
        if (!is_first || !is_last) {  // each thread meets only its own columns of `repeated`
          A* repeated = reinterpret_cast<A*>(shared_rows + (two_rows ? 4 : 2) * channels) + pack_index(u) * kN;
          if (!is_first) {
            load_values(h, repeated);
#pragma unroll
            for (int i = 0; i < kN; ++i) d[i] += h[i];
          }
          if (!is_last) store_values(repeated, d);
        }
        if (is_last)
          store_pack(grad_x + int64_t{pack_index(u) + layout.run_packs.quotient(pack_index(u)) * layout.gap} * kN,
                     pack_of<T, kN>(d));
      }
    }
    if (!two_rows) fetch(next, here);
    here = there;
  }
  A* partials = static_cast<A*>(p.partials) + int64_t{blockIdx.x} * 2 * channels;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (pack_index(u) >= row.packs) continue;
    store_values(partials + pack_index(u) * kN, grad_weight[u]);
    store_values(partials + channels + pack_index(u) * kN, grad_bias[u]);
  }
}

// As plan_normalized_shuffle_backward has it, if this device has the shared memory.
template <class T, int kUnits>
bool launch_normalized_shuffle_backward(const NormalizedShuffleBackwardParams& p,
                                        const NormalizedShuffleBackwardPlan& plan, cudaStream_t stream) {
  const ShuffleShape& s = p.shape;
  const unsigned packs = static_cast<unsigned>(s.out_channels() / kPackWidth<T>);
  const size_t row_bytes = size_t{packs} * 32;  // tokens and grad_out
  const size_t limit = shared_memory_limit() - 1024;
  const bool two_rows = 2 * row_bytes + plan.repeated_bytes <= limit;
  if (row_bytes + plan.repeated_bytes > limit) return false;
  const BackwardLayout layout{
      Divisor(packs / s.rate), static_cast<uint32_t>((s.grid_w - s.rate) * packs / (s.rate * s.rate)),
      static_cast<uint32_t>(plan.rows_per_chunk), static_cast<uint32_t>(s.tiles * s.out_tokens()), two_rows};
  launch(normalized_shuffle_backward_kernel<T, kUnits>, dim3(static_cast<unsigned>(plan.chunks)),
         dim3(round_up((packs + kUnits - 1) / kUnits, 32)), (two_rows ? 2 : 1) * row_bytes + plan.repeated_bytes,
         stream, p, TokenBlocks(s), TokenBlocks(contiguous(s)), layout);
  return true;
}

// row_means[m] = (sum(g) / C, sum(g h) / C) of output token m = blockIdx.x
template <class T, int kN>
__global__ void __launch_bounds__(kBackwardThreads)
    normalized_shuffle_row_means_kernel(const __grid_constant__ NormalizedShuffleBackwardParams p) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, scratch, [2 * kMaxWarps]);
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const int64_t m = blockIdx.x;
  const T* block = static_cast<const T*>(p.tokens) + checked_source_tile(s, m / s.out_tokens()) * s.tile_stride +
                   s.block_offset(m % s.out_tokens());
  const T* grad_out = static_cast<const T*>(p.grad_out) + m * s.out_channels();
  const A mean = static_cast<const A*>(p.mean)[m], rstd = static_cast<const A*>(p.rstd)[m];
  A sums[2] = {};
  for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
    const auto x = load_pack<T, kN>(block + row.source(s, u, kN));
    const auto dy = load_pack<T, kN>(grad_out + int64_t{u} * kN);
    A w[kN];
    load_parameter<T>(w, p.weight, int64_t{u} * kN, p.element_parameters);
    for (int i = 0; i < kN; ++i) {
      const A g = value_of(dy.at[i]) * w[i];
      sums[0] += g;
      sums[1] += g * ((value_of(x.at[i]) - mean) * rstd);
    }
  }
  block_sum(sums, scratch);
  if (threadIdx.x == 0) {
    static_cast<A*>(p.row_means)[2 * m] = sums[0] / static_cast<A>(s.out_channels());
    static_cast<A*>(p.row_means)[2 * m + 1] = sums[1] / static_cast<A>(s.out_channels());
  }
}

// Thread block (chunk, slab): thread t has pack slab * threads + t of every row of the chunk.
template <class T, int kN>
__global__ void __launch_bounds__(kBackwardThreads)
    normalized_shuffle_columns_kernel(const __grid_constant__ NormalizedShuffleBackwardParams p,
                                      int64_t rows_per_chunk) {
  using A = accumulate_t<T>;
  const ShuffleShape &s = p.shape, dense = contiguous(p.shape);
  const ShuffleRow row(s, kN);
  const int64_t channels = s.out_channels(), blocks = s.tiles * s.out_tokens();
  const int64_t begin = blockIdx.x * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < blocks ? begin + rows_per_chunk : blocks;
  if (p.grad_tokens && blockIdx.y == 0) {
    for (int64_t b = begin; b < end; ++b) {
      if (b % s.out_tokens() == 0) zero_skipped<T>(p, dense, b / s.out_tokens());
    }
  }
  for (unsigned pack = blockIdx.y * blockDim.x + threadIdx.x; pack < row.packs; pack += gridDim.y * blockDim.x) {
    const int64_t c = int64_t{pack} * kN;
    A w[kN], grad_weight[kN] = {}, grad_bias[kN] = {};
    load_parameter<T>(w, p.weight, c, p.element_parameters);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t tile = b / s.out_tokens(), token = b % s.out_tokens();
      const Selection from(tile, p.tile_offsets, p.selected_tiles);
      A dx[kN] = {};
      for (int64_t k = from.first; k < from.last; ++k) {
        const int64_t m = from.tile(k) * s.out_tokens() + token;
        const A mean = static_cast<const A*>(p.mean)[m], rstd = static_cast<const A*>(p.rstd)[m];
        const auto x = load_pack<T, kN>(static_cast<const T*>(p.tokens) + tile * s.tile_stride + s.block_offset(token) +
                                        row.source(s, pack, kN));
        const auto dy = load_pack<T, kN>(static_cast<const T*>(p.grad_out) + m * channels + c);
        for (int i = 0; i < kN; ++i) {
          const A d = value_of(dy.at[i]), h = (value_of(x.at[i]) - mean) * rstd;
          grad_weight[i] += d * h;
          grad_bias[i] += d;
          if (!p.grad_tokens) continue;
          const A* means = static_cast<const A*>(p.row_means) + 2 * m;
          dx[i] += rstd * (d * w[i] - means[0] - h * means[1]);
        }
      }
      if (!p.grad_tokens) continue;
      T* grad_x = static_cast<T*>(p.grad_tokens) + tile * dense.tile_stride + dense.block_offset(token);
      store_pack(grad_x + row.source(dense, pack, kN), pack_of<T, kN>(dx));
    }
    A* partials = static_cast<A*>(p.partials) + int64_t{blockIdx.x} * 2 * channels;
    store_values(partials + c, grad_weight);
    store_values(partials + channels + c, grad_bias);
  }
}

void normalized_shuffle_backward_cuda(const NormalizedShuffleBackwardParams& p, cudaStream_t stream) {
  const NormalizedShuffleBackwardPlan plan = plan_normalized_shuffle_backward(p);
  if (plan.chunks == 0) return;
  const ShuffleShape& s = p.shape;
  const int64_t blocks = s.tiles * s.out_tokens(), output_rows = s.selected * s.out_tokens();
  check_shuffle_launch(s, blocks > output_rows ? blocks : output_rows);
  const unsigned chunks = static_cast<unsigned>(plan.chunks);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = kPackWidth<T>;
    const unsigned packs = static_cast<unsigned>(s.out_channels() / (plan.wide ? kN : 1));
    if constexpr (!std::is_same_v<T, double>) {
      const bool launched = plan.units == 1   ? launch_normalized_shuffle_backward<T, 1>(p, plan, stream)
                            : plan.units == 2 ? launch_normalized_shuffle_backward<T, 2>(p, plan, stream)
                                              : false;
      if (launched) return;
    }
    const auto means =
        plan.wide ? normalized_shuffle_row_means_kernel<T, kN> : normalized_shuffle_row_means_kernel<T, 1>;
    const auto columns = plan.wide ? normalized_shuffle_columns_kernel<T, kN> : normalized_shuffle_columns_kernel<T, 1>;
    const unsigned rows = static_cast<unsigned>(output_rows);
    const unsigned threads = packs < kBackwardThreads ? round_up(packs, 32) : kBackwardThreads;
    const unsigned slabs = (packs + threads - 1) / threads;
    if (p.grad_tokens && rows) launch(means, dim3(rows), dim3(threads), 0, stream, p);
    launch(columns, dim3(chunks, slabs < 65535 ? slabs : 65535), dim3(threads), 0, stream, p, plan.rows_per_chunk);
  });
}

}  // namespace vico
