// What every wrapper of common/ptx.cuh does, and every function of CUDA that cuda_on_host has a body for.
#pragma once

#include "common/ptx.cuh"
#include "cuda_on_host/conformance/dump.h"

namespace conformance {

namespace ptx = vico::ptx;

// ---- 16-byte accesses

__global__ void load16_kernel(const uint32_t* in, uint32_t* out, uint32_t* streamed) {
  const unsigned mirror = 31 - threadIdx.x;
  ptx::store16(out + 4 * mirror, ptx::load16(in + 4 * threadIdx.x));
  ptx::store16(streamed + 4 * mirror, ptx::load16_streaming(in + 4 * threadIdx.x));
}

inline void dump_vector_accesses(Dump& dump, Random& random) {
  const auto in = dump.input("load16/in", random.bits<uint32_t>(128), {32, 4});
  const Array<uint32_t> out(std::vector<uint32_t>(128)), streamed(std::vector<uint32_t>(128));
  vico::launch(load16_kernel, 1, 32, 0, nullptr, in.data(), out.data(), streamed.data());
  dump.output("load16/out", out, {32, 4});
  dump.output("load16/streamed", streamed, {32, 4});
}

// ---- conversions

__global__ void pack_kernel(const float* in, uint32_t* bfloat16, uint32_t* half) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  bfloat16[i] = ptx::pack_bfloat16(in[2 * i], in[2 * i + 1]);
  half[i] = ptx::pack_half(in[2 * i], in[2 * i + 1]);
}

__global__ void half_to_float_kernel(const uint16_t* in, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = ptx::half_to_float(in[i]);
}

inline void dump_conversions(Dump& dump, Random& random) {
  constexpr size_t kPairs = 2048;
  std::vector<float> floats = random.floats(2 * kPairs);
  for (size_t i = 0; i < kPairs; ++i) {  // half of them near what half can hold, every other of these a tie
    uint32_t bits = vico::detail::bit_cast<uint32_t>(floats[i]);
    bits = (bits & 0x807fffffu) | static_cast<uint32_t>(100 + random.below(46)) << 23;
    if (i % 4 == 1) bits = (bits & ~0x1fffu) | 0x1000u;
    if (i % 4 == 3) bits = (bits & ~0xffffu) | 0x8000u;
    floats[i] = vico::detail::bit_cast<float>(bits);
  }
  const auto in = dump.input("pack/in", floats, {kPairs, 2});
  const Array<uint32_t> bfloat16{std::vector<uint32_t>(kPairs)}, half{std::vector<uint32_t>(kPairs)};
  vico::launch(pack_kernel, kPairs / 128, 128, 0, nullptr, in.data(), bfloat16.data(), half.data());
  dump.output("pack/bfloat16", bfloat16, {kPairs});
  dump.output("pack/half", half, {kPairs});

  std::vector<uint16_t> halves(4096);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i * 16 + (random.next() & 15));
  const auto from = dump.input("half_to_float/in", halves, {halves.size()});
  const Array<float> to{std::vector<float>(halves.size())};
  vico::launch(half_to_float_kernel, static_cast<unsigned>(halves.size() / 128), 128, 0, nullptr, from.data(),
               to.data());
  dump.output("half_to_float/out", to, {halves.size()});
}

// ---- cp.async: rows of 16 bytes that hold 0xab before; each lane says how many bytes there are

template <int kBytes>
__global__ void cp_async_kernel(const uint4* in, const int* counts, uint4* out) {
  VICO_SHARED(uint4, rows, [2][32]);
  for (int r = 0; r < 2; ++r) {
    rows[r][threadIdx.x] = make_uint4(0xabababab, 0xabababab, 0xabababab, 0xabababab);
    const int count = counts[32 * r + threadIdx.x];
    if constexpr (kBytes == 16) {
      ptx::cp_async_16(&rows[r][threadIdx.x], in + 32 * r + threadIdx.x, count);
    } else {
      ptx::cp_async_8(&rows[r][threadIdx.x], in + 32 * r + threadIdx.x, count);
    }
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = rows[0][31 - threadIdx.x];
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[32 + threadIdx.x] = rows[1][31 - threadIdx.x];
}

template <int kBytes>
void dump_cp_async(Dump& dump, Random& random) {
  const std::string name = "cp_async." + std::to_string(kBytes);
  std::vector<int> bytes(64);
  for (int& n : bytes) n = random.below(kBytes + 1);
  const auto in = dump.input(name + "/in", random.bits<uint8_t>(64 * 16), {2, 32, 16});
  const auto counts = dump.input(name + "/bytes", bytes, {2, 32});
  const Array<uint8_t> out{std::vector<uint8_t>(64 * 16)};
  vico::launch(cp_async_kernel<kBytes>, 1, 32, 0, nullptr, reinterpret_cast<const uint4*>(in.data()), counts.data(),
               reinterpret_cast<uint4*>(out.data()));
  dump.output(name + "/out", out, {2, 32, 16});
}

// ---- ldmatrix

template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(const uint4* in, uint32_t* out) {
  VICO_SHARED(uint4, rows, [32]);
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t r[kCount];
  if constexpr (kTransposed) {
    ptx::ldmatrix_transposed(r, &rows[threadIdx.x % (8 * kCount)]);
  } else {
    ptx::ldmatrix(r, &rows[threadIdx.x % (8 * kCount)]);
  }
  for (int i = 0; i < kCount; ++i) out[threadIdx.x * kCount + i] = r[i];
}

template <int kCount, bool kTransposed>
void dump_ldmatrix(Dump& dump, Random& random) {
  const std::string name = "ldmatrix" + std::string(kTransposed ? "_transposed" : "") + ".x" + std::to_string(kCount);
  const auto in = dump.input(name + "/in", random.bits<uint16_t>(32 * 8), {32, 8});
  const Array<uint32_t> out{std::vector<uint32_t>(32 * kCount)};
  vico::launch(ldmatrix_kernel<kCount, kTransposed>, 1, 32, 0, nullptr, reinterpret_cast<const uint4*>(in.data()),
               out.data());
  dump.output(name + "/out", out, {32, kCount});
}

// ---- mma.sync: fragments in and out, a problem per warp

template <bool kHalf>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  uint32_t fa[4], fb[2];
  float d[4];
  for (int i = 0; i < 4; ++i) fa[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) fb[i] = b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = c[threadIdx.x * 4 + i];
  if constexpr (kHalf) {
    ptx::mma_m16n8k16_f16(d, fa, fb);
  } else {
    ptx::mma_m16n8k16_bf16(d, fa, fb);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

template <bool kHalf>
void dump_mma(Dump& dump, Random& random, const std::string& numbers, int limit) {
  constexpr size_t kWarps = 4;
  const std::string name = "mma_m16n8k16_" + std::string(kHalf ? "f16." : "bf16.") + numbers;
  const auto a = dump.input(name + "/a", random.numbers(kWarps * 256, kHalf, limit), {kWarps, 32, 8});
  const auto b = dump.input(name + "/b", random.numbers(kWarps * 128, kHalf, limit), {kWarps, 32, 4});
  std::vector<float> sums(kWarps * 128);
  for (float& x : sums) x = static_cast<float>(random.below(129) - 64);
  const auto c = dump.input(name + "/c", sums, {kWarps, 32, 4});
  const Array<float> out{std::vector<float>(kWarps * 128)};
  vico::launch(mma_kernel<kHalf>, 1, 32 * kWarps, 0, nullptr, reinterpret_cast<const uint32_t*>(a.data()),
               reinterpret_cast<const uint32_t*>(b.data()), c.data(), out.data());
  dump.output(name + "/out", out, {kWarps, 32, 4});
}

// ---- the block's barrier, and its votes

__global__ void barrier_kernel(const uint32_t* in, uint32_t* out, int* votes, uint32_t* addresses) {
  VICO_SHARED(uint32_t, row, [128]);
  const unsigned t = threadIdx.x;
  row[t] = in[t];
  __syncthreads();
  out[t] = row[127 - t];
  const int bit = static_cast<int>(in[t] >> 7 & 1);
  const int any = __syncthreads_or(bit), every = __syncthreads_and(bit), none = __syncthreads_or(0),
            all = __syncthreads_and(1), count = __syncthreads_count(bit);
  votes[t * 5] = any != 0;
  votes[t * 5 + 1] = every != 0;
  votes[t * 5 + 2] = none != 0;
  votes[t * 5 + 3] = all != 0;
  votes[t * 5 + 4] = count;
  addresses[t] = ptx::shared_address(row + t) - ptx::shared_address(row);
}

inline void dump_barriers(Dump& dump, Random& random) {
  const auto in = dump.input("barrier/in", random.bits<uint32_t>(128), {128});
  const Array<uint32_t> out{std::vector<uint32_t>(128)}, addresses{std::vector<uint32_t>(128)};
  const Array<int> votes{std::vector<int>(128 * 5)};
  vico::launch(barrier_kernel, 1, 128, 0, nullptr, in.data(), out.data(), votes.data(), addresses.data());
  dump.output("barrier/out", out, {128});
  dump.output("barrier/votes", votes, {128, 5});
  dump.output("barrier/addresses", addresses, {128});
}

}  // namespace conformance
