// CUDA backward kernels of normalized_shuffle.
//
// Work is ordered by block b = (tile of the buffer, output token), cut into chunks of a size that depends on the
// problem alone; each chunk leaves its sums of grad_weight and grad_bias in `partials`, which combine_chunks_cuda adds
// in order: two runs are bit-equal. Resident: one thread block per chunk, its columns' sums in registers; tokens and
// grad_out are read once, grad_tokens written once. Streaming, for any row length, alignment and type: a first kernel
// leaves each row's two means in `row_means`, a second reads everything again and needs no barrier.
#pragma once

#include "common/block_reduce.cuh"
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

// With h = (x - mean) * rstd and g = grad_out * weight:  grad_x = rstd * (g - sum(g) / C - h * sum(g h) / C),
// grad_weight = sum over rows of grad_out * h,  grad_bias = sum over rows of grad_out.
template <class T, int kUnits>
__global__ void __launch_bounds__(kBackwardThreads)
    normalized_shuffle_backward_kernel(const __grid_constant__ NormalizedShuffleBackwardParams p,
                                       int64_t rows_per_chunk) {
  using A = accumulate_t<T>;
  constexpr int kN = kPackWidth<T>;
  VICO_SHARED(A, scratch, [2][2 * kMaxWarps]);  // two in turn, so that one barrier a row is enough
  const ShuffleShape &s = p.shape, dense = contiguous(p.shape);
  const ShuffleRow row(s, kN);
  const int64_t channels = s.out_channels(), blocks = s.tiles * s.out_tokens();
  const int64_t begin = blockIdx.x * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < blocks ? begin + rows_per_chunk : blocks;
  const auto pack_index = [&](int u) { return threadIdx.x + static_cast<unsigned>(u) * blockDim.x; };

  A grad_weight[kUnits][kN] = {}, grad_bias[kUnits][kN] = {};
  int turn = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t tile = b / s.out_tokens(), token = b % s.out_tokens();
    const Selection from(tile, p.tile_offsets, p.selected_tiles);
    T* grad_x = nullptr;
    if (p.grad_tokens) {
      if (token == 0) zero_skipped<T>(p, dense, tile);
      grad_x = static_cast<T*>(p.grad_tokens) + tile * dense.tile_stride + dense.block_offset(token);
      if (from.first == from.last) {
        for (int u = 0; u < kUnits; ++u) {
          if (pack_index(u) < row.packs) store_pack(grad_x + row.source(dense, pack_index(u), kN), Pack<T, kN>{});
        }
      }
    }
    if (from.first == from.last) continue;
    const T* block = static_cast<const T*>(p.tokens) + tile * s.tile_stride + s.block_offset(token);
    Pack<T, kN> x[kUnits], dy[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (pack_index(u) < row.packs) x[u] = load_pack_streaming<T, kN>(block + row.source(s, pack_index(u), kN));
    }
    for (int64_t k = from.first; k < from.last; ++k) {
      const int64_t m = from.tile(k) * s.out_tokens() + token;
      const A mean = static_cast<const A*>(p.mean)[m], rstd = static_cast<const A*>(p.rstd)[m];
      A sums[2] = {};  // of g and g * h
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) >= row.packs) continue;
        const int64_t c = int64_t{pack_index(u)} * kN;
        dy[u] = load_pack_streaming<T, kN>(static_cast<const T*>(p.grad_out) + m * channels + c);
        A w[kN];
        load_parameter<T>(w, p.weight, c, p.element_parameters);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const A d = value_of(dy[u].at[i]), h = (value_of(x[u].at[i]) - mean) * rstd;
          grad_weight[u][i] += d * h;
          grad_bias[u][i] += d;
          sums[0] += d * w[i];
          sums[1] += d * w[i] * h;
        }
      }
      if (!p.grad_tokens) continue;
      block_sum(sums, scratch[turn]);
      turn ^= 1;
      const A mean_g = sums[0] / static_cast<A>(channels), mean_gh = sums[1] / static_cast<A>(channels);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) >= row.packs) continue;
        const int64_t c = int64_t{pack_index(u)} * kN;
        A dx[kN], w[kN];
        load_parameter<T>(w, p.weight, c, p.element_parameters);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const A h = (value_of(x[u].at[i]) - mean) * rstd;
          dx[i] = rstd * (value_of(dy[u].at[i]) * w[i] - mean_g - h * mean_gh);
        }
        if (from.last - from.first > 1) {  // each thread meets only its own columns of `repeated`
          VICO_DYNAMIC_SHARED(A, repeated);
          if (k > from.first) {
            A earlier[kN];
            load_values(earlier, repeated + c);
#pragma unroll
            for (int i = 0; i < kN; ++i) dx[i] += earlier[i];
          }
          if (k + 1 < from.last) store_values(repeated + c, dx);
        }
        if (k + 1 == from.last) store_pack(grad_x + row.source(dense, pack_index(u), kN), pack_of<T, kN>(dx));
      }
    }
  }
  A* partials = static_cast<A*>(p.partials) + int64_t{blockIdx.x} * 2 * channels;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (pack_index(u) >= row.packs) continue;
    store_values(partials + int64_t{pack_index(u)} * kN, grad_weight[u]);
    store_values(partials + channels + int64_t{pack_index(u)} * kN, grad_bias[u]);
  }
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
      if (plan.units) {
        const unsigned units = static_cast<unsigned>(plan.units);
        const auto kernel = plan.units == 1   ? normalized_shuffle_backward_kernel<T, 1>
                            : plan.units == 2 ? normalized_shuffle_backward_kernel<T, 2>
                                              : normalized_shuffle_backward_kernel<T, 4>;
        return launch(kernel, dim3(chunks), dim3(round_up((packs + units - 1) / units, 32)), plan.shared_bytes, stream,
                      p, plan.rows_per_chunk);
      }
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
