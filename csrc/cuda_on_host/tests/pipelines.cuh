// Two small matrix products that use every asynchronous mechanism the wrappers have, with room for one bug each.
//
//   cp_async_product   C[16, 8] = A[16, K] B[8, K]^T: cp.async in two stages, ldmatrix, mma.sync; one warp computes,
//                      all four copy
//   tma_product        C[64, 64] = -A[64, K] B[64, K]^T: one producer warp (TMA, mbarrier ring), four consumer warps
//                      (wgmma), which turn the signs of A in shared memory before they multiply
#pragma once

#include "common/tensor_map.cuh"

namespace coh_test {

using vico::BFloat16;
namespace ptx = vico::ptx;

enum class Bug {
  kNone,
  kWaitCount,
  kNoBarrier,
  kMisalignedCopy,
  kParity,
  kTransactionBytes,
  kNoProxyFence,
  kNoEmptyWait,
  kNoWgmmaWait,
  kNoWgmmaFence,
  kNoMbarrierFence,
};

constexpr int kDepth = 16;  // of one stage of cp_async_product

__global__ void cp_async_product(const BFloat16* a, const BFloat16* b, float* c, int k_total, Bug bug) {
  VICO_DYNAMIC_SHARED(BFloat16, stages);  // [2][24][kDepth]: 16 rows of A, 8 of B
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  const auto row = [&](int stage, int r) { return stages + (stage * 24 + r) * kDepth; };
  const auto copy = [&](int step) {
    if (tid < 48) {  // 24 rows of two 16-byte halves
      const int r = tid / 2, at = tid % 2 * 8;
      const BFloat16* from = (r < 16 ? a + r * k_total : b + (r - 16) * k_total) + step * kDepth + at;
      ptx::cp_async_16(row(step & 1, r) + at + (bug == Bug::kMisalignedCopy ? 4 : 0), from);
    }
    ptx::cp_async_commit();
  };
  float d[4] = {};
  const int steps = k_total / kDepth;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy(step + 1);
    } else {
      ptx::cp_async_commit();
    }
    if (bug == Bug::kWaitCount) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (bug != Bug::kNoBarrier) __syncthreads();
    if (tid < 32) {
      uint32_t fa[4], fb[2];
      ptx::ldmatrix(fa, row(step & 1, lane & 15) + (lane >> 4) * 8);
      ptx::ldmatrix(fb, row(step & 1, 16 + (lane & 7)) + (lane >> 3 & 1) * 8);
      ptx::mma_m16n8k16_bf16(d, fa, fb);
    }
    __syncthreads();
  }
  if (tid >= 32) return;
  for (int i = 0; i < 4; ++i) c[((lane >> 2) + 8 * (i >> 1)) * 8 + (lane & 3) * 2 + (i & 1)] = d[i];
}

constexpr int kStages = 3, kTileBytes = 64 * 64 * 2;  // a tile: 64 rows of 128 bytes, swizzled
constexpr int kProductShared = 2 * kStages * kTileBytes;

__global__ void tma_product(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                            float* c, int steps, Bug bug) {
  VICO_DYNAMIC_SHARED(unsigned char, shared);  // A's stages, B's
  VICO_SHARED(uint64_t, full, [kStages]);
  VICO_SHARED(uint64_t, turned, [kStages]);
  VICO_SHARED(uint64_t, empty, [kStages]);
  unsigned char *tiles_a = shared, *tiles_b = shared + kStages * kTileBytes;
  const int tid = static_cast<int>(threadIdx.x), warp = tid >> 5, lane = tid & 31;
  if (tid == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&turned[s], 128);
      ptx::mbarrier_init(&empty[s], 4);
    }
    if (bug != Bug::kNoMbarrierFence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == 4) {
    ptx::take_fewer_registers<24>();
    if (lane != 0) return;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages, at[2] = {step * 64, 0};
      if (bug != Bug::kNoEmptyWait) ptx::mbarrier_wait(&empty[s], (step / kStages & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&full[s], bug == Bug::kTransactionBytes ? kTileBytes : 2 * kTileBytes);
      ptx::tma_load(tiles_a + s * kTileBytes, &map_a, at, &full[s]);
      ptx::tma_load(tiles_b + s * kTileBytes, &map_b, at, &full[s]);
    }
    return;
  }
  float d[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(&full[s], (step / kStages & 1) ^ (bug == Bug::kParity ? 1 : 0));
    auto* words = reinterpret_cast<uint32_t*>(tiles_a + s * kTileBytes);
    for (int i = tid; i < kTileBytes / 4; i += 128) words[i] ^= 0x80008000u;
    if (bug != Bug::kNoProxyFence) ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&turned[s]);
    ptx::mbarrier_wait(&turned[s], step / kStages & 1);
    const uint32_t a = ptx::shared_address(words);
    const uint32_t b = ptx::shared_address(tiles_b + s * kTileBytes);
    if (bug != Bug::kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma_m64k16<64, false>(d, ptx::matrix_descriptor(a + k * 32, 16, 1024, ptx::Swizzle::k128),
                                   ptx::matrix_descriptor(b + k * 32, 16, 1024, ptx::Swizzle::k128), true);
    }
    ptx::wgmma_commit();
    if (bug != Bug::kNoWgmmaWait) ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&empty[s]);
  }
  for (int i = 0; i < 32; ++i) {
    const int r = warp * 16 + (lane >> 2) + 8 * (i >> 1 & 1), column = (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
    c[r * 64 + column] = d[i];
  }
}

}  // namespace coh_test
