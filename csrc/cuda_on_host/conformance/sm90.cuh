// What every wrapper of common/ptx_sm90.cuh does, with the tensor maps of common/tensor_map.cuh.
#pragma once

#include "common/tensor_map.cuh"
#include "cuda_on_host/conformance/dump.h"

namespace conformance {

namespace ptx = vico::ptx;

// ---- mbarrier: one thread takes it through its life and writes down what each test says

__global__ void mbarrier_kernel(const uint4* in, const __grid_constant__ CUtensorMap map, int* log) {
  VICO_DYNAMIC_SHARED(uint4, row);
  VICO_SHARED(uint64_t, barrier, [2]);
  if (threadIdx.x != 0) return;
  int n = 0;
  const auto test = [&](uint64_t* b) {
    log[n++] = ptx::mbarrier_test(b, 0);
    log[n++] = ptx::mbarrier_test(b, 1);
  };
  ptx::mbarrier_init(&barrier[0], 2);
  test(&barrier[0]);
  ptx::mbarrier_arrive(&barrier[0]);
  test(&barrier[0]);
  ptx::mbarrier_arrive(&barrier[0]);
  test(&barrier[0]);  // phase 0 is over
  ptx::mbarrier_arrive(&barrier[0]);
  ptx::mbarrier_arrive(&barrier[0]);
  test(&barrier[0]);  // phase 1 as well
  ptx::mbarrier_invalidate(&barrier[0]);

  ptx::mbarrier_init(&barrier[1], 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_expect(&barrier[1], 16);
  test(&barrier[1]);
  ptx::mbarrier_arrive_expect(&barrier[1], 16);
  test(&barrier[1]);  // no arrival is missing, 32 bytes are
  const int at[1] = {8};
  ptx::prefetch_tensor_map(&map);
  ptx::tma_load(row, &map, at, &barrier[1]);
  ptx::mbarrier_wait(&barrier[1], 0);
  test(&barrier[1]);
  log[n++] = row[0].x == in[1].x && row[0].w == in[1].w && row[1].y == in[2].y;
}

inline vico::TensorMapShape row_of(void* base, uint64_t elements, uint32_t box) {
  vico::TensorMapShape s;
  s.base = base;
  s.size[0] = elements;
  s.box[0] = box;
  return s;
}

constexpr size_t kMbarrierTests = 15;

inline void dump_mbarrier(Dump& dump, Random& random) {
  const Array<uint16_t> in(random.bits<uint16_t>(64));
  const Array<int> log{std::vector<int>(kMbarrierTests, -1)};
  vico::launch(mbarrier_kernel, 1, 32, 128, nullptr, reinterpret_cast<const uint4*>(in.data()),
               vico::encode_tensor_map(row_of(in.data(), 64, 16)), log.data());
  dump.output("mbarrier/log", log, {kMbarrierTests});
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

template <int kRank>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, Coordinates c, int bytes,
                                 const uint32_t* in) {
  VICO_DYNAMIC_SHARED(uint32_t, box);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) box[i] = in[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  int at[kRank];
  for (int d = 0; d < kRank; ++d) at[d] = c.at[d];
  ptx::tma_store(&map, at, box);
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
  ptx::bulk_wait<0>();
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
  Coordinates load_at{}, store_at{};
  for (int d = 0; d < kRank; ++d) {
    load_at.at[d] = d ? kAt[d] : 72 - span / element_bytes / 2;
    store_at.at[d] = d ? kAt[d] : -span / element_bytes / 2;
  }
  const std::vector<uint8_t> contents = random.bits<uint8_t>(tensor_bytes);
  const size_t tensor_size = contents.size(), box_size = static_cast<size_t>(box_bytes);
  const auto tensor = dump.input(name + "/tensor", contents, {tensor_size});
  s.base = tensor.data();
  const CUtensorMap map = vico::encode_tensor_map(s);
  const Array<uint32_t> box{std::vector<uint32_t>(box_size / 4)};
  vico::launch(tma_load_kernel<kRank>, 1, 64, box_size, nullptr, map, load_at, box_bytes, box.data());
  dump.output(name + "/loaded", box, {box_size / 4});

  const auto from = dump.input(name + "/box", random.bits<uint32_t>(box_size / 4), {box_size / 4});
  vico::launch(tma_store_kernel<kRank>, 1, 64, box_size, nullptr, map, store_at, box_bytes,
               static_cast<const uint32_t*>(from.data()));
  dump.output(name + "/stored", tensor, {tensor_size});
}

// ---- stmatrix

template <int kCount, bool kTransposed>
__global__ void stmatrix_kernel(const uint32_t* in, uint4* out) {
  VICO_SHARED(uint4, rows, [32]);
  rows[threadIdx.x] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  uint32_t r[kCount];
  for (int i = 0; i < kCount; ++i) r[i] = in[threadIdx.x * kCount + i];
  if constexpr (kTransposed) {
    ptx::stmatrix_transposed(r, &rows[threadIdx.x % (8 * kCount)]);
  } else {
    ptx::stmatrix(r, &rows[threadIdx.x % (8 * kCount)]);
  }
  __syncwarp();
  out[threadIdx.x] = rows[threadIdx.x];
}

template <int kCount, bool kTransposed>
void dump_stmatrix(Dump& dump, Random& random) {
  const std::string name = "stmatrix" + std::string(kTransposed ? "_transposed" : "") + ".x" + std::to_string(kCount);
  const auto in = dump.input(name + "/in", random.bits<uint32_t>(32 * kCount), {32, kCount});
  const Array<uint16_t> out{std::vector<uint16_t>(32 * 8)};
  vico::launch(stmatrix_kernel<kCount, kTransposed>, 1, 32, 0, nullptr, in.data(),
               reinterpret_cast<uint4*>(out.data()));
  dump.output(name + "/out", out, {32, 8});
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
