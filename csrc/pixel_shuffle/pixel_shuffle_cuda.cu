// CUDA kernels of pixel_shuffle. One block moves one output token (rate^2 ViT tokens), each byte read once and written
// once, in packs of 16 bytes where all addresses allow it and of one element where not. A thread has four packs in
// flight.
#include "common/shuffle_row.cuh"
#include "pixel_shuffle/pixel_shuffle.h"

namespace vico {

constexpr unsigned kShufflePacks = 4;  // in flight per thread
constexpr unsigned kShuffleThreads = 256;

inline unsigned shuffle_threads(unsigned packs) {
  const unsigned wanted = round_up((packs + kShufflePacks - 1) / kShufflePacks, 32);
  return wanted < kShuffleThreads ? wanted : kShuffleThreads;
}

// store(u, load(u)) for the packs u of a row that fall to this thread.
template <class P, class Load, class Store>
VICO_DEVICE void move_row(unsigned packs, const Load& load, const Store& store) {
  for (unsigned base = threadIdx.x; base < packs; base += kShufflePacks * blockDim.x) {
    P in_flight[kShufflePacks];
#pragma unroll
    for (unsigned i = 0; i < kShufflePacks; ++i) {
      if (base + i * blockDim.x < packs) in_flight[i] = load(base + i * blockDim.x);
    }
#pragma unroll
    for (unsigned i = 0; i < kShufflePacks; ++i) {
      if (base + i * blockDim.x < packs) store(base + i * blockDim.x, in_flight[i]);
    }
  }
}

// out[m] = the ViT tokens of output token m = blockIdx.x, row-major over (i, j).
template <class T, int kN>
__global__ void __launch_bounds__(kShuffleThreads) pixel_shuffle_kernel(const __grid_constant__ PixelShuffleParams p) {
  const ShuffleShape& s = p.shape;
  const ShuffleRow row(s, kN);
  const int64_t m = blockIdx.x;
  const T* block = reinterpret_cast<const T*>(p.tokens) + checked_source_tile(s, m / s.out_tokens()) * s.tile_stride +
                   s.block_offset(m % s.out_tokens());
  T* out = reinterpret_cast<T*>(p.out) + m * s.out_channels();
  move_row<Pack<T, kN>>(
      row.packs, [&](unsigned u) { return load_pack_streaming<T, kN>(block + row.source(s, u, kN)); },
      [&](unsigned u, const Pack<T, kN>& v) { store_pack(out + int64_t{u} * kN, v); });
}

void pixel_shuffle_cuda(const PixelShuffleParams& p, cudaStream_t stream) {
  const ShuffleShape& s = p.shape;
  const int64_t rows = s.selected * s.out_tokens();
  if (rows == 0 || s.channels == 0) return;
  check_shuffle_launch(s, rows);
  const bool wide = has_aligned_tokens(s, p.element_size, p.tokens) && is_aligned16(p.out);
  // Elements stand for their bytes: the pack of 16 bytes is the same for all.
  const auto run = [&](auto element) {
    using T = decltype(element);
    const unsigned packs = static_cast<unsigned>(s.out_channels()) / (wide ? kPackWidth<T> : 1);
    const auto kernel = wide ? pixel_shuffle_kernel<T, kPackWidth<T>> : pixel_shuffle_kernel<T, 1>;
    launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(shuffle_threads(packs)), 0, stream, p);
  };
  if (p.element_size == 2) {
    run(uint16_t{});
  } else if (p.element_size == 4) {
    run(uint32_t{});
  } else {
    run(uint64_t{});
  }
}

// grad_tokens[t, token] = sum over the output tiles made of tile t of their token's slice; zero for skipped tokens and
// for tiles without output. Block (t, 1 + output token), or (t, 0) for the skipped tokens.
template <class T, int kN>
__global__ void __launch_bounds__(kShuffleThreads)
    pixel_shuffle_backward_kernel(const __grid_constant__ PixelShuffleBackwardParams p) {
  using A = accumulate_t<T>;
  const ShuffleShape s = contiguous(p.shape);
  const int64_t tile = blockIdx.x / (s.out_tokens() + 1), token = blockIdx.x % (s.out_tokens() + 1) - 1;
  T* grad_tile = static_cast<T*>(p.grad_tokens) + tile * s.tile_stride;
  const Pack<T, kN> zero{};
  if (token < 0) {
    const int64_t packs = s.skip * s.channels / kN;
    for (int64_t u = threadIdx.x; u < packs; u += blockDim.x) store_pack(grad_tile + u * kN, zero);
    return;
  }
  const ShuffleRow row(s, kN);
  const Selection from(tile, p.tile_offsets, p.selected_tiles);
  T* grad = grad_tile + s.block_offset(token);
  const auto slice = [&](int64_t k, unsigned u) {
    const T* grad_out = static_cast<const T*>(p.grad_out);
    return load_pack_streaming<T, kN>(grad_out + (from.tile(k) * s.out_tokens() + token) * s.out_channels() +
                                      int64_t{u} * kN);
  };
  const auto load = [&](unsigned u) {
    if (from.first == from.last) return zero;
    const Pack<T, kN> only = slice(from.first, u);
    if (from.last - from.first == 1) return only;
    A total[kN];
    for (int i = 0; i < kN; ++i) total[i] = value_of(only.at[i]);
    for (int64_t k = from.first + 1; k < from.last; ++k) {
      const Pack<T, kN> next = slice(k, u);
      for (int i = 0; i < kN; ++i) total[i] += value_of(next.at[i]);
    }
    return pack_of<T, kN>(total);
  };
  move_row<Pack<T, kN>>(row.packs, load,
                        [&](unsigned u, const Pack<T, kN>& v) { store_pack(grad + row.source(s, u, kN), v); });
}

void pixel_shuffle_backward_cuda(const PixelShuffleBackwardParams& p, cudaStream_t stream) {
  const ShuffleShape s = contiguous(p.shape);
  const int64_t blocks = s.tiles * (s.out_tokens() + 1);
  if (blocks == 0 || s.channels == 0) return;
  check_shuffle_launch(s, blocks);
  const bool wide = has_aligned_tokens(s, element_size(p.dtype), p.grad_tokens) && is_aligned16(p.grad_out);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const unsigned packs = static_cast<unsigned>(s.out_channels()) / (wide ? kPackWidth<T> : 1);
    const auto kernel = wide ? pixel_shuffle_backward_kernel<T, kPackWidth<T>> : pixel_shuffle_backward_kernel<T, 1>;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(shuffle_threads(packs)), 0, stream, p);
  });
}

}  // namespace vico
