// What the functions of CUDA do that cuda_on_host has bodies for: shuffles, votes, atomics, arithmetic.
#pragma once

#include "common/ptx.cuh"
#include "cuda_on_host/conformance/dump.h"

namespace conformance {

// ---- shuffles and votes of one warp

constexpr int kShuffles = 11, kVotes = 5;

__global__ void shuffle_kernel(const uint32_t* in, uint32_t* out, double* doubles, uint32_t* votes) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t x = in[lane];
  uint32_t* to = out + lane * kShuffles;
  to[0] = __shfl_sync(~0u, x, (lane * 7 + 3) & 31);
  to[1] = __shfl_sync(~0u, x, 13, 8);
  to[2] = __shfl_xor_sync(~0u, x, 5);
  to[3] = __shfl_xor_sync(~0u, x, 3, 8);
  to[4] = __shfl_xor_sync(~0u, x, 12, 8);
  to[5] = __shfl_down_sync(~0u, x, 3);
  to[6] = __shfl_down_sync(~0u, x, 3, 8);
  to[7] = __shfl_up_sync(~0u, x, 3);
  to[8] = __shfl_up_sync(~0u, x, 3, 16);
  to[9] = to[10] = 0;
  if (lane < 16) to[9] = __shfl_xor_sync(0xffffu, x, 9);
  __syncwarp();
  if (lane % 2) to[10] = __shfl_down_sync(0xaaaaaaaau, x, 2);
  __syncwarp();
  doubles[lane] = __shfl_xor_sync(~0u, static_cast<double>(x) * 0x1p-40 + x, 17);
  const int bit = static_cast<int>(x >> 11 & 1);
  votes[lane * kVotes] = __ballot_sync(~0u, bit);
  votes[lane * kVotes + 1] = __any_sync(~0u, x == in[9]) != 0;
  votes[lane * kVotes + 2] = __any_sync(~0u, 0) != 0;
  votes[lane * kVotes + 3] = __all_sync(~0u, x != in[9]) != 0;
  votes[lane * kVotes + 4] = __all_sync(~0u, 1) != 0;
}

inline void dump_shuffles(Dump& dump, Random& random) {
  const auto in = dump.input("shuffle/in", random.bits<uint32_t>(32), {32});
  const Array<uint32_t> out{std::vector<uint32_t>(32 * kShuffles)}, votes{std::vector<uint32_t>(32 * kVotes)};
  const Array<double> doubles{std::vector<double>(32)};
  vico::launch(shuffle_kernel, 1, 32, 0, nullptr, in.data(), out.data(), doubles.data(), votes.data());
  dump.output("shuffle/out", out, {32, kShuffles});
  dump.output("shuffle/doubles", doubles, {32});
  dump.output("shuffle/votes", votes, {32, kVotes});
}

// ---- atomics: every thread has a cell of its own for each operation, and all share one counter

constexpr int kAtomics = 7, kCells = 64;

__global__ void atomic_kernel(int* cells, const int* operands, int* old, float* float_cells, float* float_old,
                              unsigned* counter, unsigned* tickets) {
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  tickets[i] = atomicAdd(counter, 1u);
  __threadfence();
  if (blockIdx.x != 0) return;
  int *cell = cells + t * kAtomics, *was = old + t * kAtomics;
  const int operand = operands[t];
  was[0] = atomicAdd(cell, operand);
  was[1] = atomicMax(cell + 1, operand);
  was[2] = atomicMin(cell + 2, operand);
  was[3] = atomicExch(cell + 3, operand);
  was[4] = atomicOr(cell + 4, operand);
  was[5] = atomicAnd(cell + 5, operand);
  was[6] = atomicCAS(cell + 6, t % 2 ? cells[t * kAtomics + 6] : operand, operand);
  float_old[t] = atomicAdd(float_cells + t, 0.1f);
}

inline void dump_atomics(Dump& dump, Random& random) {
  const auto cells = dump.input("atomic/in", random.bits<int>(kCells * kAtomics), {kCells, kAtomics});
  const auto operands = dump.input("atomic/operands", random.bits<int>(kCells), {kCells});
  std::vector<float> floats(kCells);
  for (float& x : floats) x = static_cast<float>(random.below(2001) - 1000) / 7;
  const auto float_cells = dump.input("atomic/float_in", floats, {kCells});
  const Array<int> old{std::vector<int>(kCells * kAtomics)};
  const Array<float> float_old{std::vector<float>(kCells)};
  const Array<unsigned> counter{std::vector<unsigned>(1)}, tickets{std::vector<unsigned>(4 * kCells)};
  vico::launch(atomic_kernel, 4, kCells, 0, nullptr, cells.data(), operands.data(), old.data(), float_cells.data(),
               float_old.data(), counter.data(), tickets.data());
  dump.output("atomic/old", old, {kCells, kAtomics});
  dump.output("atomic/out", cells, {kCells, kAtomics});
  dump.output("atomic/float_old", float_old, {kCells});
  dump.output("atomic/float_out", float_cells, {kCells});
  dump.output("atomic/counter", counter, {1});
  std::vector<unsigned> sorted = tickets.values();  // their order is not determined
  std::sort(sorted.begin(), sorted.end());
  dump.add("atomic/tickets", sorted, {sorted.size()});
}

// ---- arithmetic

constexpr int kIntegers = 5, kFloats = 7;

__global__ void arithmetic_kernel(const uint32_t* bits, const float* x, uint32_t* integers, float* floats,
                                  double* doubles) {
  const unsigned i = threadIdx.x;
  const uint32_t b = __ldg(bits + i);
  integers[i * kIntegers] = static_cast<uint32_t>(__popc(b));
  integers[i * kIntegers + 1] = static_cast<uint32_t>(__ffs(static_cast<int>(b)));
  integers[i * kIntegers + 2] = static_cast<uint32_t>(__clz(static_cast<int>(b)));
  integers[i * kIntegers + 3] = __float_as_uint(x[3 * i]);
  integers[i * kIntegers + 4] = __float_as_uint(__uint_as_float(b & 0x7f7fffffu));
  floats[i * kFloats] = __fmaf_rn(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
  floats[i * kFloats + 1] = rsqrtf(fabsf(x[3 * i]) + 0.001f);
  floats[i * kFloats + 2] = __expf(x[3 * i + 1]);
  floats[i * kFloats + 3] = __fdividef(x[3 * i + 2], x[3 * i + 1]);
  // Rounded before the sum: plain products would be fused with it.
  floats[i * kFloats + 4] = __fmul_rn(x[3 * i], x[3 * i + 1]) + x[3 * i + 2];
  floats[i * kFloats + 5] = vico::ptx::exp2_approximate(x[3 * i + 1]);
  floats[i * kFloats + 6] = vico::ptx::reciprocal_approximate(x[3 * i + 2]);
  doubles[i] = __dmul_rn(double{x[3 * i]} / 3, double{x[3 * i + 1]} / 7) + x[3 * i + 2];
}

inline void dump_arithmetic(Dump& dump, Random& random) {
  constexpr size_t kN = 256;
  std::vector<uint32_t> values = random.bits<uint32_t>(kN);
  for (size_t i = 0; i < kN; ++i) values[i] = i % 8 == 7 ? 0u : values[i] >> i % 32 << i / 8 % 32;
  std::vector<float> numbers(3 * kN);
  for (float& x : numbers) x = static_cast<float>(random.below(200'001) - 100'000) / 16384 + 0.00001f;
  const auto bits = dump.input("arithmetic/bits", values, {kN});
  const auto x = dump.input("arithmetic/x", numbers, {kN, 3});
  const Array<uint32_t> integers{std::vector<uint32_t>(kN * kIntegers)};
  const Array<float> floats{std::vector<float>(kN * kFloats)};
  const Array<double> doubles{std::vector<double>(kN)};
  vico::launch(arithmetic_kernel, 1, kN, 0, nullptr, bits.data(), x.data(), integers.data(), floats.data(),
               doubles.data());
  dump.output("arithmetic/integers", integers, {kN, kIntegers});
  dump.output("arithmetic/floats", floats, {kN, kFloats});
  dump.output("arithmetic/doubles", doubles, {kN});
}

}  // namespace conformance
