// CUDA forward kernels of normalized_shuffle.
//
// Resident kernel: a block goes from output token to output token; thread t has packs t, t + threads, ... of each row
// in shared memory, so that a row is read once, for mean, centred squares and result alike. Streaming kernel: any row
// length, alignment and type; a row is read three times, twice from the caches. Both leave the result out where the
// statistics alone are wanted.
#include <algorithm>

#include "common/block_reduce.cuh"
#include "common/device_facts.cuh"
#include "common/shared_limit.cuh"
#include "common/shuffle_row.cuh"
#include "normalized_shuffle/backward_cuda.cuh"
#include "normalized_shuffle/normalized_shuffle.h"

namespace vico {

// A thread's packs of a row at most, and threads at most.
template <int kUnits>
constexpr unsigned kResidentThreads = kUnits == 4 ? 512 : 896;
constexpr unsigned kResidentThreadsPerMultiprocessor = 1024;

// The elements of a row that warp `warp` holds.
template <int kUnits>
VICO_DEVICE unsigned elements_of_warp(unsigned packs, unsigned warp, unsigned pack_width) {
  unsigned held = 0;
#pragma unroll
  for (unsigned u = 0; u < kUnits; ++u) {
    const unsigned first = warp * 32 + u * blockDim.x;
    held += first < packs ? min(packs - first, 32u) : 0;
  }
  return held * pack_width;
}

// mean = sum(x) / C,  rstd = 1 / sqrt(sum((x - mean)^2) / C + eps),  out = (x - mean) * rstd * weight + bias
template <class T, int kUnits>
__global__ void __launch_bounds__(kResidentThreads<kUnits>,
                                  kResidentThreadsPerMultiprocessor / kResidentThreads<kUnits>)
    normalized_shuffle_resident_kernel(const __grid_constant__ NormalizedShuffleParams p,
                                       const __grid_constant__ TokenBlocks blocks, bool two_rows) {
  using A = accumulate_t<T>;
  constexpr int kN = kPackWidth<T>;
  VICO_SHARED(A, scratch, [2][2][kMaxWarps]);  // two in turn, so that one barrier a row is enough
  VICO_DYNAMIC_SHARED(T, shared_rows);
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const unsigned rows = static_cast<unsigned>(s.selected * s.out_tokens());
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto pack_index = [&](int u) { return threadIdx.x + static_cast<unsigned>(u) * blockDim.x; };

  // A row is in shared memory, the next one on its way there, each thread's packs where that thread put them: no
  // barrier.
  unsigned source[kUnits];  // in packs
#pragma unroll
  for (int u = 0; u < kUnits; ++u) source[u] = static_cast<unsigned>(row.source(s, pack_index(u), kN) / kN);
  const auto fetch = [&](unsigned m, T* to) {
    if (m < rows) {
      const unsigned tile = blocks.tile(m);
      const T* from = static_cast<const T*>(p.tokens) + checked_source_tile(s, tile) * s.tile_stride +
                      blocks.offset(blocks.token(m, tile));
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) < row.packs) ptx::cp_async_16(to + pack_index(u) * kN, from + int64_t{source[u]} * kN);
      }
    }
    ptx::cp_async_commit();
  };
  T *here = shared_rows, *there = shared_rows + (two_rows ? row.packs * kN : 0);
  fetch(blockIdx.x, here);

  // Lane l adds up what warp l left, or, where there are fewer warps, warp l modulo the next power of two.
  unsigned lanes = 1;
  while (lanes < warps) lanes *= 2;
  const auto elements = [&](unsigned w) { return static_cast<A>(elements_of_warp<kUnits>(row.packs, w, kN)); };
  const unsigned other = lane % lanes;
  const A other_elements = other < warps ? elements(other) : A(0);
  const A other_part = other_elements > A(0) ? A(1) / other_elements : A(0), own_part = A(1) / elements(warp);
  const A part = A(1) / static_cast<A>(s.out_channels()), eps = static_cast<A>(p.eps);
  const auto sum_over = [](A value, unsigned count) {
    for (unsigned delta = 1; delta < count; delta *= 2) value += __shfl_xor_sync(~0u, value, static_cast<int>(delta));
    return value;
  };

  int turn = 0;
  for (unsigned m = blockIdx.x; m < rows; m += gridDim.x) {
    const auto load = [&](A(&value)[kN], int u) { values_of(value, load_pack<T, kN>(here + pack_index(u) * kN)); };
    if (two_rows) {
      fetch(m + gridDim.x, there);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    A sum = 0, squares = 0;
#pragma unroll 4
    for (int u = 0; u < kUnits; ++u) {
      if (pack_index(u) >= row.packs) continue;
      A value[kN], unit = 0;
      load(value, u);
#pragma unroll
      for (int i = 0; i < kN; ++i) unit += value[i];
      sum += unit;
    }
    sum = sum_over(sum, 32);
    __syncwarp();  // else the compiler would keep all values in registers for the next loop
    // Squares about the warp's own mean, so that one barrier will do: those about the row's mean follow from them
    // without a difference of large numbers (Chan et al., "Updating formulae", 1979).
    const A warp_mean = sum * own_part;
#pragma unroll 4
    for (int u = 0; u < kUnits; ++u) {
      if (pack_index(u) >= row.packs) continue;
      A value[kN], unit = 0;
      load(value, u);
#pragma unroll
      for (int i = 0; i < kN; ++i) unit += (value[i] - warp_mean) * (value[i] - warp_mean);
      squares += unit;
    }
    squares = sum_over(squares, 32);
    if (lane == 0) {
      scratch[turn][0][warp] = sum;
      scratch[turn][1][warp] = squares;
    }
    __syncthreads();
    const A other_sum = other < warps ? scratch[turn][0][other] : A(0);
    const A other_squares = other < warps ? scratch[turn][1][other] : A(0);
    turn ^= 1;
    const A mean = sum_over(other_sum, lanes) * part, off = other_sum * other_part - mean;
    const A variance = sum_over(other_squares + other_elements * off * off, lanes) * part;
    const A rstd = rsqrtf(variance + eps);
    if (threadIdx.x == 0) {
      static_cast<A*>(p.mean)[m] = mean;
      static_cast<A*>(p.rstd)[m] = rstd;
    }
    if (p.out) {
      T* out = static_cast<T*>(p.out) + int64_t{m} * s.out_channels();
#pragma unroll 4
      for (int u = 0; u < kUnits; ++u) {
        if (pack_index(u) >= row.packs) continue;
        A weight[kN], bias[kN], y[kN];
        load_parameter<T>(weight, p.weight, pack_index(u) * kN, p.element_parameters);
        load_parameter<T>(bias, p.bias, pack_index(u) * kN, p.element_parameters);
        load(y, u);
#pragma unroll
        for (int i = 0; i < kN; ++i) y[i] = (y[i] - mean) * rstd * weight[i] + bias[i];
        store_pack(out + pack_index(u) * kN, pack_of<T, kN>(y));
      }
    }
    if (two_rows) {
      T* const next = there;
      there = here;
      here = next;
    } else {
      fetch(m + gridDim.x, here);
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
  if (!p.out) return;
  for (unsigned u = threadIdx.x; u < row.packs; u += blockDim.x) {
    const auto x = load(u);
    A weight[kN], bias[kN], y[kN];
    load_parameter<T>(weight, p.weight, int64_t{u} * kN, p.element_parameters);
    load_parameter<T>(bias, p.bias, int64_t{u} * kN, p.element_parameters);
    for (int i = 0; i < kN; ++i) y[i] = (value_of(x.at[i]) - mean) * rstd * weight[i] + bias[i];
    store_pack(static_cast<T*>(p.out) + m * s.out_channels() + int64_t{u} * kN, pack_of<T, kN>(y));
  }
}

// As many blocks as run at a time, for as long as there are rows; results do not depend on their number.
template <class T, int kUnits>
void launch_normalized_shuffle_resident(const NormalizedShuffleParams& p, unsigned packs, bool two_rows,
                                        cudaStream_t stream) {
  constexpr unsigned kSharedBytes = 160 * 1024;  // of a multiprocessor's; the rest caches weight and bias
  const unsigned rows = static_cast<unsigned>(p.shape.selected * p.shape.out_tokens());
  const unsigned threads = round_up((packs + kUnits - 1) / kUnits, 32), shared_bytes = packs * (two_rows ? 32 : 16);
  const unsigned together =
      std::max(1u, std::min(kResidentThreadsPerMultiprocessor / threads, kSharedBytes / (shared_bytes + 1024)));
  const unsigned most = together * static_cast<unsigned>(multiprocessor_count(current_device()));
  launch(normalized_shuffle_resident_kernel<T, kUnits>, dim3(std::min(rows, most)), dim3(threads), shared_bytes, stream,
         p, TokenBlocks(p.shape), two_rows);
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
    if constexpr (!std::is_same_v<T, double>) {  // double is for checks, not for speed
      const unsigned packs = static_cast<unsigned>(s.out_channels() / kN);
      const size_t row_bytes = packs * size_t{16}, limit = shared_memory_limit() - 1024;
      if (wide && has_near_tokens(s, kN) && packs <= 8 * kResidentThreads<8> && row_bytes <= limit) {
        const auto launcher = packs <= 4 * kResidentThreads<4> ? launch_normalized_shuffle_resident<T, 4>
                                                               : launch_normalized_shuffle_resident<T, 8>;
        return launcher(p, packs, 2 * row_bytes <= limit, stream);
      }
    }
    const auto kernel = wide ? normalized_shuffle_streaming_kernel<T, kN> : normalized_shuffle_streaming_kernel<T, 1>;
    launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(kStreamThreads), 0, stream, p);
  });
}

}  // namespace vico
