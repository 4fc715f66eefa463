// CUDA kernel of the chunked column sums: out[c] = sum over chunks k of partials[k][c], in one fixed order.
//
// A block sums 32 columns: warp w adds chunks w, w + 16, ... in order, several on their way, then the warps' sums are
// added in order.
#include "common/column_sum.h"
#include "common/pack.cuh"

namespace vico {

constexpr int kColumnSumWarps = 16;

template <class T>
__global__ void __launch_bounds__(32 * kColumnSumWarps)
    combine_chunks_kernel(const __grid_constant__ ColumnSumParams p) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, sums, [kColumnSumWarps][32]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  A total = 0;
  if (column < p.columns) {
    const A* partials = static_cast<const A*>(p.partials) + column;
#pragma unroll 8
    for (int64_t k = warp; k < p.chunks; k += kColumnSumWarps) total += partials[k * p.chunk_stride];
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || column >= p.columns) return;
  for (int w = 1; w < kColumnSumWarps; ++w) total += sums[w][lane];
  const A values[1] = {total};
  store_pack(static_cast<T*>(p.out) + column, pack_of<T, 1>(values));
}

void combine_chunks_cuda(const ColumnSumParams& p, cudaStream_t stream) {
  if (p.columns == 0) return;
  dispatch(p.dtype, [&](auto element) {
    launch(combine_chunks_kernel<decltype(element)>, dim3(static_cast<unsigned>((p.columns + 31) / 32)),
           dim3(32 * kColumnSumWarps), 0, stream, p);
  });
}

}  // namespace vico
