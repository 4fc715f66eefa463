// CUDA kernels of bias_gelu. A thread keeps the bias of its pack of columns and runs down a chunk of rows
// (common/row_chunks.cuh), kRowsInFlight of them at a time: one read and one write per element forward, two reads and
// one write backward, where each chunk of rows leaves its sums in `partials` for combine_chunks_cuda.
#include "bias_gelu/bias_gelu.h"
#include "common/dropout.cuh"
#include "common/normal.cuh"
#include "common/row_chunks.cuh"

namespace vico {
namespace {

constexpr int kRowsInFlight = 4;

// Whether the dropout of packs can be drawn by fours (common/dropout.cuh).
VICO_INLINE bool has_aligned_rows(int64_t columns) { return columns % kPhiloxBlock == 0; }

// out = z * Phi(z) * keep,  z = x + bias
template <class T, int kN>
__global__ void __launch_bounds__(kSlabThreads)
    bias_gelu_kernel(const __grid_constant__ BiasGeluParams p, const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  const int64_t last = at.last_row(), pack = at.pack(), c = pack * kN;
  const bool inside = pack < at.packs, aligned = has_aligned_rows(p.columns);
  const uint64_t seed = p.mask.active ? p.mask.current_seed() : 0;
  const A scale = static_cast<A>(p.mask.scale);
  A bias[kN] = {};
  if (inside && p.bias) load_values(bias, static_cast<const A*>(p.bias) + c);
  for (int64_t row = at.first_row(); row < last; row += kRowsInFlight) {
    Pack<T, kN> x[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      // Not a streaming load: `out` may be `x`.
      if (inside && row + r < last) x[r] = load_pack<T, kN>(static_cast<const T*>(p.x) + (row + r) * p.columns + c);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r >= last) break;
      const uint32_t kept = p.mask.active ? kept_bits<kN>(p.mask, seed, (row + r) * p.columns + c, aligned) : 0;
      A y[kN];
      if (!inside) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const A z = value_of(x[r].at[i]) + bias[i];
        y[i] = z * normal_at(z).cdf;
        if (p.mask.active) y[i] *= kept >> i & 1 ? scale : A(0);
      }
      store_pack(static_cast<T*>(p.out) + (row + r) * p.columns + c, pack_of<T, kN>(y));
    }
  }
}

// grad_x = grad_out * keep * (Phi(z) + z * phi(z)),  partials[chunk] = its sum over the chunk's rows
template <class T, int kN>
__global__ void __launch_bounds__(kSlabThreads)
    bias_gelu_backward_kernel(const __grid_constant__ BiasGeluBackwardParams p, const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  constexpr A kDensity = A(0.39894228040143267794);  // 1 / sqrt(2 pi)
  const int64_t last = at.last_row(), pack = at.pack(), c = pack * kN;
  const bool inside = pack < at.packs, aligned = has_aligned_rows(p.columns);
  const uint64_t seed = p.mask.active ? p.mask.current_seed() : 0;
  const A scale = static_cast<A>(p.mask.scale);
  A bias[kN] = {}, total[kN] = {};
  if (inside && p.bias) load_values(bias, static_cast<const A*>(p.bias) + c);
  for (int64_t row = at.first_row(); row < last; row += kRowsInFlight) {
    Pack<T, kN> x[kRowsInFlight], dy[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (!inside || row + r >= last) continue;
      const int64_t first = (row + r) * p.columns + c;
      x[r] = load_pack_streaming<T, kN>(static_cast<const T*>(p.x) + first);
      dy[r] = load_pack_streaming<T, kN>(static_cast<const T*>(p.grad_out) + first);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r >= last) break;
      const uint32_t kept = p.mask.active ? kept_bits<kN>(p.mask, seed, (row + r) * p.columns + c, aligned) : 0;
      A g[kN];
      if (!inside) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const A z = value_of(x[r].at[i]) + bias[i];
        const NormalAt<A> at_z = normal_at(z);
        g[i] = value_of(dy[r].at[i]);
        if (p.mask.active) g[i] *= kept >> i & 1 ? scale : A(0);
        g[i] *= at_z.cdf + z * at_z.gauss * kDensity;
        total[i] += g[i];
      }
      store_pack(static_cast<T*>(p.grad_x) + (row + r) * p.columns + c, pack_of<T, kN>(g));
    }
  }
  if (inside && p.partials) {
    store_values(static_cast<A*>(p.partials) + at.first_row() / at.chunk_rows * p.columns + c, total);
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
  const int64_t rows = p.elements / p.columns, chunk_rows = cuda_chunk_rows(rows, p.columns, p.dtype);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = wide ? bias_gelu_kernel<T, kPackWidth<T>> : bias_gelu_kernel<T, 1>;
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
    const auto kernel = wide ? bias_gelu_backward_kernel<T, kPackWidth<T>> : bias_gelu_backward_kernel<T, 1>;
    launch_row_chunks(kernel, row_chunks(p.elements / p.columns, p.columns, wide ? kPackWidth<T> : 1, p.chunk_rows),
                      stream, p);
  });
}

}  // namespace vico
