// CUDA kernels of skinny_linear: a thread block takes a few features of one group and up to 32 rows of x; its warps
// share the depth, so that even a small weight is read by the whole chip, and the block adds up what they found in
// order.
//
// 16-bit weights whose rows are aligned go to tensor cores, and no lane needs what another has read: which element a
// lane reads is free as long as weight and x agree on the order of the depth and the results on that of the features,
// so every lane reads 16 bytes in a row. Features are the rows of the matrix instruction, rows of x its columns. Other
// weights take kernels of ordinary arithmetic.
//
// The depth is shared out in one way whatever the number of rows: a row's result has the same bits in any company.
#include "common/block_reduce.cuh"
#include "skinny_linear/skinny_block_cuda.cuh"
#include "skinny_linear/skinny_columns_cuda.cuh"
#include "skinny_linear/skinny_dot_cuda.cuh"

namespace vico {
namespace {

// ---- ordinary arithmetic, any type and alignment: 8 rows a block

constexpr int kPlainRows = 8;
constexpr int kPlainWarps = 4, kPlainFeatures = 4;  // features per warp

// Depth next to each other: its lanes share the depth of a warp's features.
template <class T>
__global__ void __launch_bounds__(32 * kPlainWarps)
    skinny_plain_dot_kernel(const __grid_constant__ SkinnyLinearParams p) {
  using A = accumulate_t<T>;
  ptx::wait_for_earlier_kernels();
  const SkinnyBlock block(p, kPlainWarps * kPlainFeatures, kPlainRows);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int feature = static_cast<int>(threadIdx.x) / 32 * kPlainFeatures;
  if (feature >= block.features) return;
  const T* weight = block.weight<T>(p) + feature * p.feature_stride;
  const T* x = block.x<T>(p);
  A sums[kPlainFeatures * kPlainRows] = {};
#pragma unroll 2
  for (int64_t k = lane; k < p.depth; k += 32) {
    A w[kPlainFeatures];
#pragma unroll
    for (int f = 0; f < kPlainFeatures; ++f) {
      w[f] = feature + f < block.features ? value_of(weight[f * p.feature_stride + k]) : A{};
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      if (r >= block.rows) break;
      const A value = value_of(x[r * p.groups * p.depth + k]);
#pragma unroll
      for (int f = 0; f < kPlainFeatures; ++f) sums[r * kPlainFeatures + f] += w[f] * value;
    }
  }
  static_assert(kPlainFeatures * kPlainRows == 32, "one sum for each lane");
  warp_sum_spread(sums);
  const int r = lane / kPlainFeatures, f = feature + lane % kPlainFeatures;
  if (r < block.rows && f < block.features) block.store<T>(p, r, f, sums[0]);
}

// Features next to each other: a lane a feature, the warps share the depth.
constexpr int kPlainColumnWarps = 8;

template <class T>
__global__ void __launch_bounds__(32 * kPlainColumnWarps)
    skinny_plain_columns_kernel(const __grid_constant__ SkinnyLinearParams p) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, parts, [kPlainColumnWarps][kPlainRows][32]);
  ptx::wait_for_earlier_kernels();
  const SkinnyBlock block(p, 32, kPlainRows);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T* weight = block.weight<T>(p) + lane;
  const T* x = block.x<T>(p);
  A sums[kPlainRows] = {};
  constexpr int64_t kPart = 64 * kPlainColumnWarps;  // sums of sums round less than one long sum
  for (int64_t first = warp; first < p.depth; first += kPart) {
    const int64_t last = first + kPart < p.depth ? first + kPart : p.depth;
    A part[kPlainRows] = {};
#pragma unroll 4
    for (int64_t k = first; k < last; k += kPlainColumnWarps) {
      const A w = lane < block.features ? value_of(weight[k * p.depth_stride]) : A{};
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
        if (r < block.rows) part[r] += w * value_of(x[r * p.groups * p.depth + k]);
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) sums[r] += part[r];
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) parts[warp][r][lane] = sums[r];
  __syncthreads();
  if (lane >= block.features) return;
  for (int r = warp; r < block.rows; r += kPlainColumnWarps) {
    A sum = parts[0][r][lane];
    for (int w = 1; w < kPlainColumnWarps; ++w) sum += parts[w][r][lane];
    block.store<T>(p, r, lane, sum);
  }
}

// Whether the tensor core kernels can read x and the weight in their packs, and write y in packs of features.
bool is_wide(const SkinnyLinearParams& p) {
  if (!is_aligned16(p.x) || !is_aligned16(p.weight) || p.group_stride % 8 != 0) return false;
  if (p.depth_stride == 1) return p.feature_stride % 8 == 0 && p.depth % 8 == 0;
  return is_aligned16(p.y) && p.depth_stride % 8 == 0 && p.features % 8 == 0 && p.depth % 4 == 0;
}

}  // namespace

int64_t depth_parts(const SkinnyLinearParams& p) {
  constexpr int64_t kParts = SkinnyLinearParams::kMostParts, kLeastDepth = 2048;
  const bool is_half = p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kHalf;
  const bool is_deep = p.depth >= kLeastDepth && p.depth >= 2 * p.features && p.depth % (8 * kParts) == 0;
  return is_half && is_deep && p.groups == 1 && p.depth_stride == 1 && is_wide(p) ? kParts : 1;
}

void skinny_linear_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.groups == 0 || p.features == 0) return;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (is_wide(p)) return p.depth_stride == 1 ? skinny_dot_cuda<T>(p, stream) : skinny_columns_cuda<T>(p, stream);
    }
    if (p.depth_stride == 1) {
      launch_early(p.chained, skinny_plain_dot_kernel<T>,
                   dim3(skinny_blocks(p, kPlainWarps * kPlainFeatures, kPlainRows)), dim3(32 * kPlainWarps), 0, stream,
                   p);
    } else {
      launch_early(p.chained, skinny_plain_columns_kernel<T>, dim3(skinny_blocks(p, 32, kPlainRows)),
                   dim3(32 * kPlainColumnWarps), 0, stream, p);
    }
  });
}

}  // namespace vico
