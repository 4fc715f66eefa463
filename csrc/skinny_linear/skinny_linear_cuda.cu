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
#include <stdexcept>
#include <string>

#include "common/block_reduce.cuh"
#include "common/mma.cuh"
#include "common/normal.cuh"
#include "common/pack.cuh"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

// What block blockIdx.x works on. Blocks that share features follow one another: their weights come from the L2 cache.
struct SkinnyBlock {
  int64_t group, feature, row;
  int features, rows;

  VICO_DEVICE SkinnyBlock(const SkinnyLinearParams& p, int most_features, int most_rows) {
    const int64_t row_blocks = (p.rows + most_rows - 1) / most_rows;
    const int64_t feature_blocks = (p.features + most_features - 1) / most_features;
    const int64_t block = blockIdx.x / row_blocks;
    row = blockIdx.x % row_blocks * most_rows;
    group = block / feature_blocks;
    feature = block % feature_blocks * most_features;
    features = static_cast<int>(p.features - feature < most_features ? p.features - feature : most_features);
    rows = static_cast<int>(p.rows - row < most_rows ? p.rows - row : most_rows);
  }
  template <class T>
  VICO_DEVICE const T* x(const SkinnyLinearParams& p) const {
    return static_cast<const T*>(p.x) + (row * p.groups + group) * p.depth;
  }
  template <class T>
  VICO_DEVICE const T* weight(const SkinnyLinearParams& p) const {
    return static_cast<const T*>(p.weight) + group * p.group_stride + feature * p.feature_stride;
  }
  template <class T>
  VICO_DEVICE T bias(const SkinnyLinearParams& p, int f) const {
    return p.bias && f < features ? static_cast<const T*>(p.bias)[group * p.features + feature + f] : T{};
  }
  template <class T>
  VICO_DEVICE void store(const SkinnyLinearParams& p, int r, int f, accumulate_t<T> sum) const {
    store<T>(p, r, f, sum, bias<T>(p, f));
  }
  template <class T>
  VICO_DEVICE void store(const SkinnyLinearParams& p, int r, int f, accumulate_t<T> sum, T bias) const {
    const int64_t at = group * p.features + feature + f;
    accumulate_t<T> y[1] = {sum + value_of(bias)};
    y[0] *= static_cast<accumulate_t<T>>(p.scale);
    if (p.gelu) y[0] = gelu_of(y[0]);
    store_pack(static_cast<T*>(p.y) + (row + r) * p.groups * p.features + at, pack_of<T, 1>(y));
  }
  // Features f .. f + 7 of 16 bits, aligned.
  template <class T, bool kGelu>
  VICO_DEVICE void store8(const SkinnyLinearParams& p, int r, int f, float (&sum)[8]) const {
    const float scale = static_cast<float>(p.scale);
    const int64_t at = group * p.features + feature + f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (p.bias) sum[j] += value_of(static_cast<const T*>(p.bias)[at + j]);
      sum[j] *= scale;
    }
    if (kGelu && p.gelu) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = gelu_of(sum[j]);
    }
    store_pack(static_cast<T*>(p.y) + (row + r) * p.groups * p.features + at, pack_of<T, 8>(sum));
  }
};

inline unsigned skinny_blocks(const SkinnyLinearParams& p, int64_t most_features, int64_t most_rows) {
  const int64_t blocks =
      p.groups * ((p.features + most_features - 1) / most_features) * ((p.rows + most_rows - 1) / most_rows);
  if (blocks > INT32_MAX) {
    throw std::runtime_error("skinny_linear of " + std::to_string(p.rows) + " rows, " + std::to_string(p.groups) +
                             " groups and " + std::to_string(p.features) +
                             " features: its CUDA kernels take up to 2^31 - 1 blocks");
  }
  return static_cast<unsigned>(blocks);
}

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
  const int steps = static_cast<int>((p.depth - start + kBlockDepth - 1) / kBlockDepth);
  const T* weight = block.weight<T>(p) + g * p.feature_stride + start + 8 * t;
  const T* x = block.x<T>(p) + g * p.groups * p.depth + start + 8 * t;
  ptx::let_next_kernel_begin();
  const int64_t weight_tile = 8 * p.feature_stride, x_tile = 8 * p.groups * p.depth;
  const int left = static_cast<int>(p.depth - start - 8 * t);  // of the depth, from the first step
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

template <class T, int kTiles, int kFeatureTiles, class D = SkinnyDot<kTiles, kFeatureTiles>>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  launch_early(p.chained, skinny_dot_kernel<T, kTiles, kFeatureTiles, D>,
               dim3(skinny_blocks(p, D::kFeatures, D::kRows)), dim3(D::kThreads), D::kSharedBytes, stream, p);
}

// Every block reads its rows of x from L2: more features per block read them less often, fewer keep more
// multiprocessors busy.
template <class T, int kTiles>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  const int64_t features = p.groups * p.features;
  if (features >= 8192) return skinny_dot_cuda<T, kTiles, 4>(p, stream);
  if (features >= 2048) return skinny_dot_cuda<T, kTiles, 2>(p, stream);
  skinny_dot_cuda<T, kTiles, 1>(p, stream);
}

template <class T>
void skinny_dot_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  if (p.rows <= 8) return skinny_dot_cuda<T, 1>(p, stream);
  // Few blocks of 32 rows leave half the chip idle: twice as many of 16 share the weight through L2.
  if (p.rows <= 16 || (p.groups * p.features <= 1024 && p.rows <= 32)) return skinny_dot_cuda<T, 2>(p, stream);
  skinny_dot_cuda<T, 4>(p, stream);
}

template <class T, int kTiles, int kWarps>
void skinny_columns_cuda(const SkinnyLinearParams& p, cudaStream_t stream) {
  using D = SkinnyColumns<kTiles, kWarps>;
  launch_early(p.chained, skinny_columns_kernel<T, kTiles, kWarps>, dim3(skinny_blocks(p, kColumnFeatures, D::kRows)),
               dim3(D::kThreads), D::kSharedBytes, stream, p);
}
// Whether one warp takes all the depth: a short one, and enough features for every multiprocessor.
bool is_short(const SkinnyLinearParams& p) {
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

// Whether the tensor core kernels can read x and the weight in their packs, and write y in packs of features.
bool is_wide(const SkinnyLinearParams& p) {
  if (!is_aligned16(p.x) || !is_aligned16(p.weight) || p.group_stride % 8 != 0) return false;
  if (p.depth_stride == 1) return p.feature_stride % 8 == 0 && p.depth % 8 == 0;
  return is_aligned16(p.y) && p.depth_stride % 8 == 0 && p.features % 8 == 0 && p.depth % 4 == 0;
}

}  // namespace

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
