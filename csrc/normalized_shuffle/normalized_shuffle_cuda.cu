// CUDA forward kernels of normalized_shuffle.
//
// Resident kernel: a block takes a few output tokens; thread t holds packs t, t + threads, ... of each row in
// registers, so that a row is read once, for mean, centred squares and result alike. Weight and bias are loaded once
// for all rows of the block. Streaming kernel: any row length, alignment and type; a row is read three times, twice
// from the caches.
#include "common/block_reduce.cuh"
#include "common/shuffle_row.cuh"
#include "normalized_shuffle/backward_cuda.cuh"
#include "normalized_shuffle/normalized_shuffle.h"

namespace vico {

// Packs per thread and row, rows per block, threads: 32 registers of row data in the largest case.
template <int kUnits>
constexpr int kResidentRows = kUnits <= 2 ? 4 : 8 / kUnits;
template <int kUnits>
constexpr unsigned kResidentThreads = kUnits <= 2   ? 256
                                      : kUnits == 4 ? 512
                                                    : 1024;

// mean = sum(x) / C,  rstd = 1 / sqrt(sum((x - mean)^2) / C + eps),  out = (x - mean) * rstd * weight + bias
template <class T, int kUnits>
__global__ void __launch_bounds__(kResidentThreads<kUnits>)
    normalized_shuffle_resident_kernel(const __grid_constant__ NormalizedShuffleParams p, int rows_per_block) {
  using A = accumulate_t<T>;
  constexpr int kN = kPackWidth<T>, kRows = kResidentRows<kUnits>;
  VICO_SHARED(A, scratch, [2][kRows * kMaxWarps]);
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const int64_t first = int64_t{blockIdx.x} * rows_per_block, all_rows = s.selected * s.out_tokens();
  const int rows = static_cast<int>(all_rows - first < rows_per_block ? all_rows - first : rows_per_block);
  const auto pack_index = [&](int u) { return threadIdx.x + static_cast<unsigned>(u) * blockDim.x; };

  Pack<T, kN> x[kRows][kUnits];
  A sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const int64_t m = first + r;
    const T* block = static_cast<const T*>(p.tokens) + checked_source_tile(s, m / s.out_tokens()) * s.tile_stride +
                     s.block_offset(m % s.out_tokens());
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (pack_index(u) < row.packs) x[r][u] = load_pack_streaming<T, kN>(block + row.source(s, pack_index(u), kN));
    }
  }
  const auto holds = [&](int r, int u) { return r < rows && pack_index(u) < row.packs; };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!holds(r, u)) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[r] += value_of(x[r][u].at[i]);
    }
  }
  block_sum(sum, scratch[0]);
  const A channels = static_cast<A>(s.out_channels());
  A squares[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!holds(r, u)) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const A centred = value_of(x[r][u].at[i]) - sum[r] / channels;
        squares[r] += centred * centred;
      }
    }
  }
  block_sum(squares, scratch[1]);
  A mean[kRows], rstd[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mean[r] = sum[r] / channels;
    rstd[r] = A(1) / sqrt(squares[r] / channels + static_cast<A>(p.eps));
    if (threadIdx.x == 0 && r < rows) {
      static_cast<A*>(p.mean)[first + r] = mean[r];
      static_cast<A*>(p.rstd)[first + r] = rstd[r];
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (pack_index(u) >= row.packs) continue;
    const int64_t c = int64_t{pack_index(u)} * kN;
    A weight[kN], bias[kN], y[kN];
    load_values(weight, static_cast<const A*>(p.weight) + c);
    load_values(bias, static_cast<const A*>(p.bias) + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int i = 0; i < kN; ++i) y[i] = (value_of(x[r][u].at[i]) - mean[r]) * rstd[r] * weight[i] + bias[i];
      store_pack(static_cast<T*>(p.out) + (first + r) * s.out_channels() + c, pack_of<T, kN>(y));
    }
  }
}

constexpr unsigned kStreamThreads = 256;

template <class T, int kN>
__global__ void __launch_bounds__(kStreamThreads)
    normalized_shuffle_streaming_kernel(const __grid_constant__ NormalizedShuffleParams p) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, scratch, [2][kMaxWarps]);
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const int64_t m = blockIdx.x;
  const T* block = static_cast<const T*>(p.tokens) + checked_source_tile(s, m / s.out_tokens()) * s.tile_stride +
                   s.block_offset(m % s.out_tokens());
  const auto load = [&](unsigned u) { return load_pack<T, kN>(block + row.source(s, u, kN)); };
  const A channels = static_cast<A>(s.out_channels());
  A sum[1] = {}, squares[1] = {};
  for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
    const auto x = load(u);
    for (int i = 0; i < kN; ++i) sum[0] += value_of(x.at[i]);
  }
  block_sum(sum, scratch[0]);
  const A mean = sum[0] / channels;
  for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
    const auto x = load(u);
    for (int i = 0; i < kN; ++i) squares[0] += (value_of(x.at[i]) - mean) * (value_of(x.at[i]) - mean);
  }
  block_sum(squares, scratch[1]);
  const A rstd = A(1) / sqrt(squares[0] / channels + static_cast<A>(p.eps));
  if (threadIdx.x == 0) {
    static_cast<A*>(p.mean)[m] = mean;
    static_cast<A*>(p.rstd)[m] = rstd;
  }
  for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
    const auto x = load(u);
    A weight[kN], bias[kN], y[kN];
    load_values(weight, static_cast<const A*>(p.weight) + int64_t{u} * kN);
    load_values(bias, static_cast<const A*>(p.bias) + int64_t{u} * kN);
    for (int i = 0; i < kN; ++i) y[i] = (value_of(x.at[i]) - mean) * rstd * weight[i] + bias[i];
    store_pack(static_cast<T*>(p.out) + m * s.out_channels() + int64_t{u} * kN, pack_of<T, kN>(y));
  }
}

template <class T, int kUnits>
void launch_normalized_shuffle_resident(const NormalizedShuffleParams& p, unsigned packs, cudaStream_t stream) {
  constexpr int64_t kEnoughBlocks = 2 * 132;  // two for each multiprocessor of an H100; results do not depend on it
  const int64_t rows = p.shape.selected * p.shape.out_tokens();
  int64_t per_block = rows / kEnoughBlocks;
  per_block = per_block < 1 ? 1 : per_block > kResidentRows<kUnits> ? kResidentRows<kUnits> : per_block;
  const unsigned threads = round_up((packs + kUnits - 1) / kUnits, 32);
  launch(normalized_shuffle_resident_kernel<T, kUnits>, dim3(static_cast<unsigned>((rows + per_block - 1) / per_block)),
         dim3(threads), 0, stream, p, static_cast<int>(per_block));
}

void normalized_shuffle_cuda(const NormalizedShuffleParams& p, cudaStream_t stream) {
  const ShuffleShape& s = p.shape;
  const int64_t rows = s.selected * s.out_tokens();
  if (rows == 0 || s.channels == 0) return;
  check_shuffle_launch(s, rows);
  const bool wide = has_aligned_tokens(s, element_size(p.dtype), p.tokens) && is_aligned16(p.out) &&
                    is_aligned16(p.weight) && is_aligned16(p.bias);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = kPackWidth<T>;
    const unsigned packs = static_cast<unsigned>(s.out_channels() / kN);
    if constexpr (!std::is_same_v<T, double>) {  // double is for checks, not for speed
      if (wide && packs <= kResidentThreads<1>) return launch_normalized_shuffle_resident<T, 1>(p, packs, stream);
      if (wide && packs <= 2 * kResidentThreads<2>) return launch_normalized_shuffle_resident<T, 2>(p, packs, stream);
      if (wide && packs <= 4 * kResidentThreads<4>) return launch_normalized_shuffle_resident<T, 4>(p, packs, stream);
      if (wide && packs <= 8 * kResidentThreads<8>) return launch_normalized_shuffle_resident<T, 8>(p, packs, stream);
    }
    const auto kernel = wide ? normalized_shuffle_streaming_kernel<T, kN> : normalized_shuffle_streaming_kernel<T, 1>;
    launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(kStreamThreads), 0, stream, p);
  });
}

}  // namespace vico
