// The features of the weight are next to each other in memory: tensor cores, 64 features a block.
#pragma once

#include "common/mma.cuh"
#include "skinny_linear/skinny_block_cuda.cuh"

namespace vico {

// ---- tensor cores, features next to each other: 64 features a block; a warp's step is 16 of the depth

constexpr int kColumnFeatures = 64, kColumnDepth = 16;

// A block of kTiles tiles of 8 rows whose kBlockWarps warps share the depth.
template <int kTiles, int kBlockWarps>
struct SkinnyColumns {
  static constexpr int kWarps = kBlockWarps, kThreads = 32 * kWarps, kRows = 8 * kTiles;
  static constexpr int kStride = kColumnFeatures + 4;                         // between rows of sums
  static constexpr int kStepBytes = 32 * (4 * 16 + kTiles * 8), kStages = 8;  // of a warp: weight, x
  static constexpr int kStagesBytes = kWarps * kStages * kStepBytes;
  static constexpr int kSumsBytes = kWarps > 1 ? kWarps* kRows* kStride* static_cast<int>(sizeof(float)) : 0;
  static constexpr int kSharedBytes = kSumsBytes > kStagesBytes ? kSumsBytes : kStagesBytes;
};

// Lane (g, t) reads features 8 g .. 8 g + 7 at depths 4 t .. 4 t + 3. Of matrix instruction j, feature 8 g + 2 j is row
// g and feature 8 g + 2 j + 1 row g + 8: the lane ends with 8 neighbouring features of 2 kTiles rows. What it reads
// waits in shared memory as in skinny_dot_kernel, so that memory has all of a short depth to read at once, and the
// weight while the kernel before ends. A warp that has all the depth needs neither the others nor their sums.
template <class T, int kTiles, int kBlockWarps, class D = SkinnyColumns<kTiles, kBlockWarps>>
__global__ void __launch_bounds__(D::kThreads) skinny_columns_kernel(const __grid_constant__ SkinnyLinearParams p) {
  VICO_DYNAMIC_SHARED(unsigned char, shared);
  const SkinnyBlock block(p, kColumnFeatures, D::kRows);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int64_t start = int64_t{warp} * kColumnDepth + 4 * t;
  const T* weight = block.weight<T>(p) + start * p.depth_stride + 8 * g;
  const T* x = block.x<T>(p) + g * p.groups * p.depth + start;
  ptx::let_next_kernel_begin();
  const int64_t x_tile = 8 * p.groups * p.depth;
  constexpr int kStepDepth = D::kWarps * kColumnDepth;
  const int left = static_cast<int>(p.depth - start);  // of the depth, from the first step; a multiple of 4
  const int steps = static_cast<int>((p.depth - int64_t{warp} * kColumnDepth + kStepDepth - 1) / kStepDepth);
  const bool is_feature = 8 * g < block.features;
  unsigned char* mine = shared + warp * D::kStages * D::kStepBytes;
  const auto weight_at = [&](int slot, int i) { return mine + slot * D::kStepBytes + (i * 32 + lane) * 16; };
  const auto x_at = [&](int slot, int n) { return mine + slot * D::kStepBytes + 4 * 32 * 16 + (n * 32 + lane) * 8; };

  const auto stage_weight = [&](int slot, int step) {
    const bool there = is_feature && left > step * kStepDepth;
    const T* from = there ? weight + int64_t{step} * kStepDepth * p.depth_stride : static_cast<const T*>(p.weight);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::cp_async_16(weight_at(slot, i), from, there ? 16 : 0);
      if (there) from += p.depth_stride;
    }
  };
  const auto stage_x = [&](int slot, int step) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const bool there = g + 8 * n < block.rows && left > step * kStepDepth;
      ptx::cp_async_8(x_at(slot, n), there ? x + step * kStepDepth + n * x_tile : static_cast<const T*>(p.x),
                      there ? 8 : 0);
    }
  };
#pragma unroll 1
  for (int step = 0; step < D::kStages && step < steps; ++step) stage_weight(step, step);
  ptx::wait_for_earlier_kernels();
#pragma unroll 1
  for (int step = 0; step < D::kStages; ++step) {
    if (step < steps) stage_x(step, step);
    ptx::cp_async_commit();
  }

  float sums[4][kTiles][4] = {};
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<D::kStages - 1>();
    uint32_t w[4][4];  // [depth][pair of features]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 four = ptx::load16(weight_at(slot, i));
      w[i][0] = four.x;
      w[i][1] = four.y;
      w[i][2] = four.z;
      w[i][3] = four.w;
    }
    uint2 b[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) b[n] = *reinterpret_cast<const uint2*>(x_at(slot, n));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto lows = [&](int i) { return (w[i][j] & 0xffffu) | w[i + 1][j] << 16; };
      const auto highs = [&](int i) { return w[i][j] >> 16 | (w[i + 1][j] & 0xffff0000u); };
      const uint32_t a[4] = {lows(0), highs(0), lows(2), highs(2)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma<T>(sums[j][n], a, {b[n].x, b[n].y});
    }
    if (step + D::kStages < steps) {
      stage_weight(slot, step + D::kStages);
      stage_x(slot, step + D::kStages);
    }
    ptx::cp_async_commit();
    slot = slot + 1 == D::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();

  float* parts = reinterpret_cast<float*>(shared);  // [D::kWarps, kRows, kStride]
  if constexpr (D::kWarps > 1) __syncthreads();     // the sums lie where other threads' steps were
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = 8 * n + 2 * t + i;
      float sum[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[2 * j] = sums[j][n][i];
        sum[2 * j + 1] = sums[j][n][i + 2];
      }
      if constexpr (D::kWarps > 1) {
        store_values(parts + (warp * D::kRows + r) * D::kStride + 8 * g, sum);
      } else if (r < block.rows && is_feature) {
        block.store8<T, false>(p, r, 8 * g, sum);
      }
    }
  }
  if constexpr (D::kWarps > 1) {
    __syncthreads();
    for (int i = thread; i < block.rows * 8; i += D::kThreads) {
      const int r = i / 8, f = i % 8 * 8;
      if (f >= block.features) continue;
      float sum[8];
      load_values(sum, parts + r * D::kStride + f);
#pragma unroll
      for (int w = 1; w < D::kWarps; ++w) {
        float more[8];
        load_values(more, parts + (w * D::kRows + r) * D::kStride + f);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += more[j];
      }
      block.store8<T, true>(p, r, f, sum);
    }
  }
}

template <class T, int kTiles, int kWarps>
void skinny_columns_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  using D = SkinnyColumns<kTiles, kWarps>;
  launch_early(p.chained, skinny_columns_kernel<T, kTiles, kWarps>, dim3(skinny_blocks(p, kColumnFeatures, D::kRows)),
               dim3(D::kThreads), D::kSharedBytes, stream, p);
}
// Whether one warp takes all the depth: a short one, and enough features for every multiprocessor.
inline bool is_short(const SkinnyLinearParams& p) {
  return p.depth <= 256 && p.groups * p.features >= 128 * kColumnFeatures && !p.gelu;
}
template <class T, int kTiles>
void skinny_columns_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  is_short(p) ? skinny_columns_cuda<T, kTiles, 1>(p, stream) : skinny_columns_cuda<T, kTiles, 4>(p, stream);
}
template <class T>
void skinny_columns_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  if (p.rows <= 8) return skinny_columns_cuda<T, 1>(p, stream);
  if (p.rows <= 16) return skinny_columns_cuda<T, 2>(p, stream);
  skinny_columns_cuda<T, 4>(p, stream);
}

}  // namespace vico
