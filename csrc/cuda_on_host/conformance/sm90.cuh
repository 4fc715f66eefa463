// What every wrapper of common/ptx_sm90.cuh does, with the tensor maps of common/tensor_map.cuh.
#pragma once

#include "common/tensor_map.cuh"
#include "cuda_on_host/conformance/dump.h"

namespace conformance {

namespace ptx = vico::ptx;

// ---- mbarrier: a warp writes to a row four times, another reads it each time, and two barriers keep them apart

constexpr int kMbarrierRounds = 4;

__global__ void mbarrier_kernel(const uint32_t* in, uint32_t* out) {
  VICO_SHARED(uint32_t, row, [32]);
  VICO_SHARED(uint64_t, barrier, [2]);
  uint64_t *full = &barrier[0], *empty = &barrier[1];
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, 1);
  }
  __syncthreads();
  for (unsigned round = 0; round < kMbarrierRounds; ++round) {
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty, round % 2 ^ 1);  // the first of these passes at once
      row[lane] = in[round * 32 + lane];
      ptx::mbarrier_arrive(full);
    } else {
      ptx::mbarrier_wait(full, round % 2);
      out[round * 32 + lane] = row[31 - lane];
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty);
    }
  }
}

inline void dump_mbarrier(Dump& dump, Random& random) {
  constexpr size_t kWords = kMbarrierRounds * 32;
  const auto in = dump.input("mbarrier/in", random.bits<uint32_t>(kWords), {kMbarrierRounds, 32});
  const Array<uint32_t> out{std::vector<uint32_t>(kWords)};
  vico::launch(mbarrier_kernel, 1, 64, 0, nullptr, in.data(), out.data());
  dump.output("mbarrier/out", out, {kMbarrierRounds, 32});
}

// ---- TMA

struct Coordinates {
  int at[5];
};

template <int kRank>
__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, Coordinates c, int bytes, uint32_t* out) {
  VICO_DYNAMIC_SHARED(uint32_t, box);
  VICO_SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    int at[kRank];
    for (int d = 0; d < kRank; ++d) at[d] = c.at[d];
    ptx::mbarrier_arrive_expect(barrier, bytes);
    ptx::tma_load(box, &map, at, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) out[i] = box[i];
}

// A box that hangs over the edges of a tensor [2][2][3][5][row]; ranks below 5 see its first part.
template <int kRank>
void dump_tma(Dump& dump, Random& random, vico::MapElement element, ptx::Swizzle swizzle) {
  constexpr uint64_t kSize[5] = {72, 5, 3, 2, 2};
  constexpr uint32_t kBox[5] = {0, 3, 2, 2, 2};
  constexpr int kAt[5] = {0, 3, -1, 1, -1};
  const int element_bytes = element == vico::MapElement::kFloat ? 4 : 2;
  const char* types[] = {"f16", "bf16", "f32"};
  const int span = swizzle == ptx::Swizzle::kNone ? 32 : 16 << static_cast<int>(swizzle);
  const std::string name = "tma." + std::to_string(kRank) + "d." + types[static_cast<int>(element)] + ".swizzle" +
                           std::to_string(swizzle == ptx::Swizzle::kNone ? 0 : span);
  vico::TensorMapShape s;
  s.element = element;
  s.rank = kRank;
  s.swizzle = swizzle;
  uint64_t tensor_bytes = kSize[0] * static_cast<uint64_t>(element_bytes);
  int box_bytes = span;
  for (int d = 0; d < kRank; ++d) {
    s.size[d] = kSize[d];
    s.box[d] = d ? kBox[d] : static_cast<uint32_t>(span / element_bytes);
    if (d == 0) continue;
    s.stride[d - 1] = (tensor_bytes + 31) / 16 * 16;  // 16 bytes or more between rows, planes...
    tensor_bytes = s.stride[d - 1] * s.size[d];
    box_bytes *= static_cast<int>(s.box[d]);
  }
  Coordinates at{};
  for (int d = 0; d < kRank; ++d) at.at[d] = d ? kAt[d] : 72 - span / element_bytes / 2;
  const std::vector<uint8_t> contents = random.bits<uint8_t>(tensor_bytes);
  const size_t tensor_size = contents.size(), box_size = static_cast<size_t>(box_bytes);
  const auto tensor = dump.input(name + "/tensor", contents, {tensor_size});
  s.base = tensor.data();
  const CUtensorMap map = vico::encode_tensor_map(s);
  const Array<uint32_t> box{std::vector<uint32_t>(box_size / 4)};
  vico::launch(tma_load_kernel<kRank>, 1, 64, box_size, nullptr, map, at, box_bytes, box.data());
  dump.output(name + "/loaded", box, {box_size / 4});
}

// ---- setmaxnreg: values survive it. 384 threads of 168 registers; 40 + 2 x 232 are as many.

__global__ void __launch_bounds__(384, 1) registers_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t kept[8];
  for (int i = 0; i < 8; ++i) kept[i] = in[i * 384 + threadIdx.x];
  if (threadIdx.x < 128) {
    ptx::take_fewer_registers<40>();
  } else {
    ptx::take_more_registers<232>();
  }
  uint32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum = sum * 3 + kept[i];
  out[threadIdx.x] = sum;
}

inline void dump_registers(Dump& dump, Random& random) {
  const auto in = dump.input("registers/in", random.bits<uint32_t>(8 * 384), {8, 384});
  const Array<uint32_t> out{std::vector<uint32_t>(384)};
  vico::launch(registers_kernel, 1, 384, 0, nullptr, in.data(), out.data());
  dump.output("registers/out", out, {384});
}

// ---- kernels that begin early: each reads what the one before it wrote

__global__ void overlap_kernel(const uint32_t* in, uint32_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::let_next_kernel_begin();
  ptx::wait_for_earlier_kernels();
  out[i] = in[(i + 12345) % (gridDim.x * blockDim.x)] * 3 + 1;
}

inline void dump_overlap(Dump& dump, Random& random) {
  constexpr unsigned kBlocks = 256, kThreads = 128, kWords = kBlocks * kThreads;
  const auto in = dump.input("overlap/in", random.bits<uint32_t>(kWords), {kWords});
  const Array<uint32_t> once{std::vector<uint32_t>(kWords)}, twice{std::vector<uint32_t>(kWords)};
  vico::launch_early(true, overlap_kernel, kBlocks, kThreads, 0, nullptr, in.data(), once.data());
  for (int i = 0; i < 4; ++i) {  // in turn into the one and the other: each overwrites what the last but one read
    vico::launch_early(true, overlap_kernel, kBlocks, kThreads, 0, nullptr, once.data(), twice.data());
    vico::launch_early(true, overlap_kernel, kBlocks, kThreads, 0, nullptr, twice.data(), once.data());
  }
  dump.output("overlap/out", once, {kWords});
}

}  // namespace conformance
