// Bugs in clusters of blocks, planted one by one: see self_test_memory.cpp.
#include "common/tensor_map.cuh"
#include "cuda_on_host/tests/harness.h"

namespace {

using coh::Buffer;
using vico::BFloat16;
namespace ptx = vico::ptx;

enum class Bug { kNone, kNoFirstSync, kNoLastSync, kArrivesAtHome };

constexpr int kRows = 16, kWidth = 8, kStages = 2, kBoxBytes = kRows * kWidth * 2;

// Each block sums the rows of `in` that both load, half of a stage's each, for both. Warp 0 loads, warp 1 sums.
__global__ void cluster_sum(const __grid_constant__ CUtensorMap map, int steps, float* out, Bug bug) {
  VICO_DYNAMIC_SHARED(BFloat16, stages);
  VICO_SHARED(uint64_t, full, [kStages]);
  VICO_SHARED(uint64_t, empty, [kStages]);
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], bug == Bug::kArrivesAtHome ? 1 : 2);
    }
    ptx::fence_mbarrier_init();
  }
  bug == Bug::kNoFirstSync ? __syncthreads() : ptx::cluster_sync();
  if (threadIdx.x < 32) {
    for (int step = 0; step < steps && threadIdx.x == 0; ++step) {
      const int s = step % kStages;
      ptx::mbarrier_wait(&empty[s], static_cast<uint32_t>(step / kStages & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&full[s], 2 * kBoxBytes);
      const int at[2] = {0, (2 * step + rank) * kRows};
      ptx::tma_load_multicast(stages + (2 * s + rank) * kRows * kWidth, &map, at, &full[s], 3);
    }
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(&full[s], static_cast<uint32_t>(step / kStages & 1));
    const BFloat16* row = stages + (2 * s * kRows + lane) * kWidth;
    for (int i = 0; i < kWidth; ++i) sum += vico::to_float(row[i]);
    __syncwarp();
    if (bug == Bug::kArrivesAtHome) {
      if (lane == 0) ptx::mbarrier_arrive(&empty[s]);
    } else if (lane < 2) {
      ptx::mbarrier_arrive_at(&empty[s], lane);
    }
  }
  out[static_cast<int>(blockIdx.x) * 32 + lane] = sum;
  if (bug != Bug::kNoLastSync) ptx::cluster_sync();
}

void run(Bug bug) {
  constexpr int kSteps = 9, kAll = 2 * kRows * kSteps, kClusters = 2;
  Buffer<BFloat16> in(kAll * kWidth);
  coh::Random random(1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = coh::element_from<BFloat16>(random.normal());
  vico::TensorMapShape s;
  s.rank = 2;
  s.base = in.data();
  s.size[0] = kWidth;
  s.size[1] = kAll;
  s.stride[0] = kWidth * 2;
  s.box[0] = kWidth;
  s.box[1] = kRows;
  Buffer<float> out(kClusters * 2 * 32);
  vico::launch_clusters(cluster_sum, 2, 2 * kClusters, 64, kStages * 2 * kBoxBytes, nullptr, vico::encode_tensor_map(s),
                        kSteps, out.data(), coh::planted ? bug : Bug::kNone);
  for (size_t i = 0; i < out.size(); ++i) {
    double sum = 0;
    for (size_t step = 0; step < kSteps; ++step) {
      for (size_t j = 0; j < kWidth; ++j) sum += coh::element_value(in[(step * 2 * kRows + i % 32) * kWidth + j]);
    }
    coh::expect(std::fabs(out[i] - sum) < 1e-4, "element %zu is %g, not %g", i, out[i], sum);
  }
}

}  // namespace

COH_CASE(missing_first_cluster_sync) { run(Bug::kNoFirstSync); }
COH_CASE(missing_last_cluster_sync) { run(Bug::kNoLastSync); }
COH_CASE(arrives_at_its_own_block_alone) { run(Bug::kArrivesAtHome); }

COH_MAIN
