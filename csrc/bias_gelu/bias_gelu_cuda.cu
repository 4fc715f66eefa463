// CUDA kernels of bias_gelu. A thread keeps the bias of its pack of columns and runs down a chunk of rows
// (common/row_chunks.cuh), some of them always on their way to it: one read and one write per element forward, two
// reads and one write backward, where each chunk of rows leaves its sums in `partials` for combine_chunks_cuda.
#include "bias_gelu/bias_gelu.h"
#include "common/dropout.cuh"
#include "common/normal.cuh"
#include "common/row_chunks.cuh"

namespace vico {
namespace {

// Rows that a thread loads ahead, while it works on as many.
constexpr int kForwardRows = 4, kBackwardRows = 2;

// Whether the dropout of packs can be drawn by fours (common/dropout.cuh).
VICO_INLINE bool has_aligned_rows(int64_t columns) { return columns % kPhiloxBlock == 0; }

// The packs of up to kRows rows of a column, `stride` apart.
template <int kRows, class Bits, class T, class Load>
VICO_DEVICE void load_rows(Bits (&to)[kRows], const T* from, int64_t stride, int64_t rows, const Load& load) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) to[r] = detail::bit_cast<Bits>(load(from + r * stride));
  }
}

// out = z * Phi(z) * keep,  z = x + bias
template <class T, int kN, bool kDropout>
__global__ void __launch_bounds__(kSlabThreads)
    bias_gelu_kernel(const __grid_constant__ BiasGeluParams p, const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  const int64_t pack = at.pack(), stride = p.columns, first = at.first_row() * stride + pack * kN;
  const bool inside = pack < at.packs, aligned = has_aligned_rows(stride);
  const uint64_t seed = kDropout ? p.mask.current_seed() : 0;
  const A scale = static_cast<A>(p.mask.scale);
  A bias[kN] = {};
  if (inside && p.bias) load_parameter<T>(bias, p.bias, pack * kN, p.element_bias);
  const T* x = static_cast<const T*>(p.x) + first;
  T* out = static_cast<T*>(p.out) + first;
  int64_t rows = at.last_row() - at.first_row(), element = first;
  // Not a streaming load: `out` may be `x`.
  const auto load = [](const T* from) { return load_pack<T, kN>(from); };
  PackBits<T, kN> next[kForwardRows] = {};
  load_rows(next, x, stride, inside ? rows : 0, load);
  for (; rows > 0; rows -= kForwardRows) {
    PackBits<T, kN> now[kForwardRows];
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) now[r] = next[r];
    x += kForwardRows * stride;
    load_rows(next, x, stride, inside ? rows - kForwardRows : 0, load);
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r, out += stride, element += stride) {
      if (r >= rows) break;
      const uint32_t kept = kDropout ? kept_bits<kN>(p.mask, seed, element, aligned) : 0;
      if (!inside) continue;
      A y[kN];
      values_of(y, detail::bit_cast<Pack<T, kN>>(now[r]));
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        y[i] = gelu_for<T>(y[i] + bias[i]);
        if (kDropout) y[i] *= kept >> i & 1 ? scale : A(0);
      }
      store_pack(out, pack_of<T, kN>(y));
    }
  }
}

// grad_x = grad_out * keep * (Phi(z) + z * phi(z)),  partials[chunk] = its sum over the chunk's rows
template <class T, int kN, bool kDropout>
__global__ void __launch_bounds__(kSlabThreads)
    bias_gelu_backward_kernel(const __grid_constant__ BiasGeluBackwardParams p, const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  constexpr A kDensity = A(0.39894228040143267794);  // 1 / sqrt(2 pi)
  const int64_t pack = at.pack(), stride = p.columns, first = at.first_row() * stride + pack * kN;
  const bool inside = pack < at.packs, aligned = has_aligned_rows(stride);
  const uint64_t seed = kDropout ? p.mask.current_seed() : 0;
  const A scale = static_cast<A>(p.mask.scale);
  A bias[kN] = {}, total[kN] = {};
  if (inside && p.bias) load_parameter<T>(bias, p.bias, pack * kN, p.element_bias);
  const T *x = static_cast<const T*>(p.x) + first, *grad_out = static_cast<const T*>(p.grad_out) + first;
  T* grad_x = static_cast<T*>(p.grad_x) + first;
  int64_t rows = at.last_row() - at.first_row(), element = first;
  const auto load = [](const T* from) { return load_pack_streaming<T, kN>(from); };
  PackBits<T, kN> next_x[kBackwardRows] = {}, next_dy[kBackwardRows] = {};
  load_rows(next_x, x, stride, inside ? rows : 0, load);
  load_rows(next_dy, grad_out, stride, inside ? rows : 0, load);
  for (; rows > 0; rows -= kBackwardRows) {
    PackBits<T, kN> now_x[kBackwardRows], now_dy[kBackwardRows];
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      now_x[r] = next_x[r];
      now_dy[r] = next_dy[r];
    }
    x += kBackwardRows * stride;
    grad_out += kBackwardRows * stride;
    load_rows(next_x, x, stride, inside ? rows - kBackwardRows : 0, load);
    load_rows(next_dy, grad_out, stride, inside ? rows - kBackwardRows : 0, load);
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r, grad_x += stride, element += stride) {
      if (r >= rows) break;
      const uint32_t kept = kDropout ? kept_bits<kN>(p.mask, seed, element, aligned) : 0;
      if (!inside) continue;
      A z[kN], g[kN];
      values_of(z, detail::bit_cast<Pack<T, kN>>(now_x[r]));
      values_of(g, detail::bit_cast<Pack<T, kN>>(now_dy[r]));
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        z[i] += bias[i];
        const NormalAt<A> at_z = normal_for<T>(z[i]);
        if (kDropout) g[i] *= kept >> i & 1 ? scale : A(0);
        g[i] *= at_z.cdf + z[i] * at_z.gauss * kDensity;
        total[i] += g[i];
      }
      store_pack(grad_x, pack_of<T, kN>(g));
    }
  }
  if (inside && p.partials) {
    store_values(static_cast<A*>(p.partials) + at.first_row() / at.chunk_rows * p.columns + pack * kN, total);
  }
}

template <class Params>
bool is_wide(const Params& p, const void* a, const void* b) {
  return p.columns * element_size(p.dtype) % 16 == 0 && is_aligned16(a) && is_aligned16(b) && is_aligned16(p.x) &&
         is_aligned16(p.bias);
}

}  // namespace

void bias_gelu_cuda(const BiasGeluParams& params, cudaStream_t stream) {
  BiasGeluParams p = params;
  if (p.elements == 0) return;
  if (!p.bias) p.columns = p.elements;  // one long row
  const bool wide = is_wide(p, p.out, p.out);
  const int64_t rows = p.elements / p.columns;
  const int64_t chunk_rows = cuda_chunk_rows(rows, p.columns, p.dtype, kCudaForwardRows);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = kPackWidth<T>;
    const auto kernel = p.mask.active ? (wide ? bias_gelu_kernel<T, kN, true> : bias_gelu_kernel<T, 1, true>)
                                      : (wide ? bias_gelu_kernel<T, kN, false> : bias_gelu_kernel<T, 1, false>);
    launch_row_chunks(kernel, row_chunks(rows, p.columns, wide ? kPackWidth<T> : 1, chunk_rows), stream, p);
  });
}

void bias_gelu_backward_cuda(const BiasGeluBackwardParams& params, cudaStream_t stream) {
  BiasGeluBackwardParams p = params;
  if (p.elements == 0) return;
  if (!p.bias) p.columns = p.elements;
  const bool wide = is_wide(p, p.grad_out, p.grad_x) && is_aligned16(p.partials);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = kPackWidth<T>;
    const auto kernel = p.mask.active
                            ? (wide ? bias_gelu_backward_kernel<T, kN, true> : bias_gelu_backward_kernel<T, 1, true>)
                            : (wide ? bias_gelu_backward_kernel<T, kN, false> : bias_gelu_backward_kernel<T, 1, false>);
    launch_row_chunks(kernel, row_chunks(p.elements / p.columns, p.columns, wide ? kPackWidth<T> : 1, p.chunk_rows),
                      stream, p);
  });
}

}  // namespace vico
