// The depth of the weight is next to each other in memory: tensor cores, 16 features and more a block.
#pragma once

#include "common/mma.cuh"
#include "skinny_linear/skinny_block_cuda.cuh"

namespace vico {

// ---- tensor cores, depth next to each other: a warp's step is 32 of the depth

constexpr int kDotDepth = 32;

// A block of kTiles tiles of 8 rows and kFeatureTiles tiles of 16 features.
template <int kTiles, int kFeatureTiles, int kBlockWarps = 8, int kMostBytes = 96 * 1024>
struct SkinnyDot {
  static constexpr int kWarps = kBlockWarps, kThreads = 32 * kWarps, kBlocks = 16 / kWarps;  // per multiprocessor
  static constexpr int kRows = 8 * kTiles, kFeatures = 16 * kFeatureTiles;
  static constexpr int kStride = kFeatures + 4;              // between rows of sums: no two lanes write to a bank
  static constexpr int kPacks = 2 * kFeatureTiles + kTiles;  // 16 bytes each, per lane and step
  static constexpr int kStepBytes = 16 * kPacks * kThreads;  // of all warps
  // kMostBytes: two blocks fit into a multiprocessor, and one on devices that give a block no more (sm_86).
  static constexpr int kStages = kMostBytes / kStepBytes < 6 ? kMostBytes / kStepBytes : 6;
  static constexpr int kSumsBytes = kWarps * kRows * kStride * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kSumsBytes > kStages* kStepBytes ? kSumsBytes : kStages* kStepBytes;
};

// Lane (g, t) takes elements 8 t .. 8 t + 7 of rows g, g + 8, ... of the weight and of x: they stand for k = 2 t, 2 t +
// 1, 2 t + 8, 2 t + 9 of two matrix instructions. They wait in shared memory, kStages steps ahead, where registers
// would hold one: no other lane reads them, so that nobody waits for anybody before the sums meet.
template <class T, int kTiles, int kFeatureTiles, class D = SkinnyDot<kTiles, kFeatureTiles>>
__global__ void __launch_bounds__(D::kThreads, D::kBlocks)
    skinny_dot_kernel(const __grid_constant__ SkinnyLinearParams p) {
  constexpr int kBlockDepth = D::kWarps * kDotDepth;
  VICO_DYNAMIC_SHARED(unsigned char, shared);
  const SkinnyBlock block(p, D::kFeatures, D::kRows);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int64_t start = int64_t{warp} * kDotDepth;
  const int steps = static_cast<int>((block.depth - start + kBlockDepth - 1) / kBlockDepth);
  const T* weight = block.weight<T>(p) + g * p.feature_stride + start + 8 * t;
  const T* x = block.x<T>(p) + g * p.groups * p.depth + start + 8 * t;
  ptx::let_next_kernel_begin();
  const int64_t weight_tile = 8 * p.feature_stride, x_tile = 8 * p.groups * p.depth;
  const int left = static_cast<int>(block.depth - start - 8 * t);  // of the depth, from the first step
  uint4* mine = reinterpret_cast<uint4*>(shared) + thread;

  // One step's share of the weight and of x.
  const auto stage_weight = [&](uint4* to, int step) {
    const T* from = weight + int64_t{step} * kBlockDepth;
    const bool there = left > step * kBlockDepth, whole = block.features == D::kFeatures;
#pragma unroll
    for (int i = 0; i < 2 * kFeatureTiles; ++i, from += weight_tile) {
      ptx::cp_async_16(to + i * D::kThreads, there ? from : weight,
                       there && (whole || g + 8 * i < block.features) ? 16 : 0);
    }
  };
  const auto stage_x = [&](uint4* to, int step) {
    const T* from = x + int64_t{step} * kBlockDepth;
    const bool there = left > step * kBlockDepth, whole = block.rows == D::kRows;
#pragma unroll
    for (int n = 0; n < kTiles; ++n, from += x_tile) {
      ptx::cp_async_16(to + (2 * kFeatureTiles + n) * D::kThreads, there ? from : x,
                       there && (whole || g + 8 * n < block.rows) ? 16 : 0);
    }
  };
  // A thread stores one feature of several rows: its bias is under way meanwhile.
  const int f = thread % D::kFeatures;
  const T bias = block.bias<T>(p, f);

  float sums[kFeatureTiles][kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < D::kStages; ++step) {
    if (step < steps) stage_weight(mine + step * D::kPacks * D::kThreads, step);
  }
  ptx::wait_for_earlier_kernels();
#pragma unroll
  for (int step = 0; step < D::kStages; ++step) {
    if (step < steps) stage_x(mine + step * D::kPacks * D::kThreads, step);
    ptx::cp_async_commit();
  }
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint4* packs = mine + slot * D::kPacks * D::kThreads;
    ptx::cp_async_wait<D::kStages - 1>();
    uint4 b[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) b[n] = ptx::load16(packs + (2 * kFeatureTiles + n) * D::kThreads);
#pragma unroll
    for (int j = 0; j < kFeatureTiles; ++j) {
      const uint4 low = ptx::load16(packs + 2 * j * D::kThreads);
      const uint4 high = ptx::load16(packs + (2 * j + 1) * D::kThreads);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma<T>(sums[j][n], {low.x, high.x, low.y, high.y}, {b[n].x, b[n].y});
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma<T>(sums[j][n], {low.z, high.z, low.w, high.w}, {b[n].z, b[n].w});
    }
    if (step + D::kStages < steps) {
      stage_weight(packs, step + D::kStages);
      stage_x(packs, step + D::kStages);
    }
    ptx::cp_async_commit();
    slot = slot + 1 == D::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();                                  // the sums lie where other threads' steps were
  float* parts = reinterpret_cast<float*>(shared);  // [D::kWarps, kRows, kStride]
#pragma unroll
  for (int j = 0; j < kFeatureTiles; ++j) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        parts[(warp * D::kRows + 8 * n + 2 * t + i % 2) * D::kStride + 16 * j + g + 8 * (i / 2)] = sums[j][n][i];
      }
    }
  }
  __syncthreads();
  if (f >= block.features) return;
  static_assert(D::kThreads % D::kFeatures == 0, "a thread keeps to its feature");
  for (int r = thread / D::kFeatures; r < block.rows; r += D::kThreads / D::kFeatures) {
    float sum = parts[r * D::kStride + f];
#pragma unroll
    for (int w = 1; w < D::kWarps; ++w) sum += parts[(w * D::kRows + r) * D::kStride + f];
    block.store<T>(p, r, f, sum, bias);
  }
}

template <class T, int kTiles, int kFeatureTiles, class D = SkinnyDot<kTiles, kFeatureTiles>>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  launch_early(p.chained, skinny_dot_kernel<T, kTiles, kFeatureTiles, D>,
               dim3(skinny_blocks(p, D::kFeatures, D::kRows), static_cast<unsigned>(p.parts)), dim3(D::kThreads),
               D::kSharedBytes, stream, p);
}

// Every block reads its rows of x from L2: more features per block read them less often, fewer keep more
// multiprocessors busy.
template <class T, int kTiles>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  const int64_t features = p.groups * p.features * p.parts;
  if (features >= 8192) return skinny_dot_cuda<T, kTiles, 4>(p, stream);
  if (features >= 2048) return skinny_dot_cuda<T, kTiles, 2>(p, stream);
  skinny_dot_cuda<T, kTiles, 1>(p, stream);
}

template <class T>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  if (p.rows <= 8) return skinny_dot_cuda<T, 1>(p, stream);
  // Few blocks of 32 rows leave half the chip idle: twice as many of 16 share the weight through L2.
  if (p.rows <= 16 || (p.groups * p.features * p.parts <= 1024 && p.rows <= 32))
    return skinny_dot_cuda<T, 2>(p, stream);
  skinny_dot_cuda<T, 4>(p, stream);
}

}  // namespace vico
