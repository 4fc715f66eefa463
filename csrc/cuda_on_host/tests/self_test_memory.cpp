// Bugs in the use of memory and in synchronisation, planted one by one: the harness must catch each of them
// (python_tests/test_cuda_on_host.py says with which build), and pass the same kernel without it.
#include "common/ptx_sm90.cuh"
#include "cuda_on_host/tests/harness.h"

using coh::Buffer;
using coh::expect;
using coh::planted;

namespace {

constexpr int kThreads = 128;

template <class T>
void expect_iota(const Buffer<T>& b, T step) {
  for (size_t i = 0; i < b.size(); ++i) {
    expect(b[i] == static_cast<T>(i) * step, "element %zu is %g", i, static_cast<double>(b[i]));
  }
}

__global__ void reverse_kernel(float* out, bool bug) {
  VICO_SHARED(float, row, [kThreads]);
  row[kThreads - 1 - threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x);
  if (!bug) __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

// Two rounds through one buffer: without the second barrier a fast warp overwrites what a slow one has yet to read.
__global__ void reuse_kernel(float* out, bool bug) {
  VICO_SHARED(float, row, [kThreads]);
  float total = 0;
  for (int round = 0; round < 4; ++round) {
    row[threadIdx.x] = static_cast<float>(threadIdx.x * round);
    __syncthreads();
    total += row[kThreads - 1 - threadIdx.x];
    if (!bug) __syncthreads();
  }
  out[kThreads - 1 - threadIdx.x] = total;
}

__global__ void copy_kernel(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = in[i];
}

__global__ void static_bounds_kernel(float* out, int reach) {
  VICO_SHARED(float, row, [kThreads]);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  float* p = row;
  out[threadIdx.x] = p[threadIdx.x + reach] - static_cast<float>(reach);
}

__global__ void dynamic_bounds_kernel(float* out, int reach) {
  VICO_DYNAMIC_SHARED(float, row);
  row[threadIdx.x + reach] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + reach];
}

__global__ void raw_vector_kernel(const float* in, float* out) {
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x);
}

__global__ void wrapped_vector_kernel(const float* in, float* out) {
  vico::ptx::store16(out + 4 * threadIdx.x, vico::ptx::load16(in + 4 * threadIdx.x));
}

// An array of floats may begin at any multiple of 4 bytes.
__global__ void static_alignment_kernel(float* out, bool bug) {
  VICO_SHARED(float, floats, [4 * 32]);
  VICO_SHARED(uint4, aligned, [32]);
  void* row = bug ? static_cast<void*>(floats) : aligned;
  vico::ptx::store16(static_cast<float*>(row) + 4 * threadIdx.x, make_uint4(1, 2, 3, 4));
  __syncwarp();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void shuffle_kernel(int* out, int lanes) {
  int v = static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < lanes) {
    v = __shfl_xor_sync(~0u, v, 1);
  } else {
    __syncwarp();
  }
  out[threadIdx.x ^ 1] = v;
}

__global__ void ldmatrix_kernel(uint32_t* out, int lanes) {
  VICO_SHARED(uint4, m, [32]);
  const unsigned pair = threadIdx.x | threadIdx.x << 16;
  m[threadIdx.x] = make_uint4(pair, pair, pair, pair);
  __syncwarp();
  uint32_t r[4] = {};
  if (static_cast<int>(threadIdx.x) < lanes) {
    vico::ptx::ldmatrix(r, &m[threadIdx.x]);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = r[0] & 0xffff;
}

__global__ void mbarrier_kernel(int* out, int threads) {
  VICO_SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) vico::ptx::mbarrier_init(barrier, kThreads);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < threads) {
    vico::ptx::mbarrier_arrive(barrier);
    vico::ptx::mbarrier_wait(barrier, 0);
  }
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

__global__ void unwritten_kernel(float* out, int n) {
  if (static_cast<int>(threadIdx.x) < n) out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void early_kernel(float* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  vico::ptx::wait_for_earlier_kernels();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void overlap_kernel(float* out, int stride) {
  out[blockIdx.x * static_cast<unsigned>(stride) + threadIdx.x] =
      static_cast<float>(blockIdx.x * static_cast<unsigned>(stride) + threadIdx.x);
}

// Neighbouring bytes are places of their own.
__global__ void bytes_kernel(unsigned char* out, unsigned stride) { out[threadIdx.x * stride / 2] = 1; }

// The last block to finish adds up what all have written.
__global__ void last_block_kernel(float* partials, unsigned* ticket, float* out, bool bug) {
  VICO_SHARED(unsigned, rank, [1]);
  if (threadIdx.x < 32) partials[blockIdx.x * 32 + threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!bug) __threadfence();
    rank[0] = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncthreads();
  if (rank[0] != gridDim.x - 1 || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x * 32; ++i) total += partials[i];
  out[0] = total;
}

__global__ void histogram_kernel(const int* in, int* out, int n, bool bug) {
  VICO_SHARED(int, bins, [8]);
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    if (bug && i == n - 1) {
      bins[in[i]] = bins[in[i]] + 1;
    } else {
      atomicAdd(&bins[in[i]], 1);
    }
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);
}

__global__ void unset_shared_kernel(float* out, bool bug) {
  VICO_SHARED(float, row, [kThreads]);
  if (threadIdx.x > 0 || !bug) row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void spin_kernel(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

}  // namespace

COH_CASE(missing_barrier) {
  Buffer<float> out(kThreads);
  vico::launch(reverse_kernel, 1, kThreads, 0, nullptr, out.data(), planted);
  expect_iota(out, 1.0f);
}

COH_CASE(missing_second_barrier) {
  Buffer<float> out(kThreads);
  vico::launch(reuse_kernel, 1, kThreads, 0, nullptr, out.data(), planted);
  expect_iota(out, 6.0f);
}

COH_CASE(global_out_of_bounds) {
  Buffer<float> in(100), out(100);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  vico::launch(copy_kernel, 1, kThreads, 0, nullptr, in.data(), out.data(), planted ? 101 : 100);
  expect_iota(out, 1.0f);
}

COH_CASE(static_shared_out_of_bounds) {
  Buffer<float> out(kThreads);
  vico::launch(static_bounds_kernel, 1, kThreads, 0, nullptr, out.data(), planted ? 1 : 0);
  if (!planted) expect_iota(out, 1.0f);
}

COH_CASE(dynamic_shared_out_of_bounds) {
  Buffer<float> out(kThreads);
  vico::launch(dynamic_bounds_kernel, 1, kThreads, kThreads * sizeof(float), nullptr, out.data(), planted ? 1 : 0);
  if (!planted) expect_iota(out, 1.0f);
}

COH_CASE(misaligned_raw_vector) {
  Buffer<float> in(128 + 4), out(128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  vico::launch(raw_vector_kernel, 1, 32, 0, nullptr, in.data() + (planted ? 1 : 0), out.data());
  if (!planted) expect_iota(out, 1.0f);
}

COH_CASE(misaligned_vector) {
  Buffer<float> in(128 + 4), out(128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  vico::launch(wrapped_vector_kernel, 1, 32, 0, nullptr, in.data() + (planted ? 1 : 0), out.data());
  expect_iota(out, 1.0f);
}

COH_CASE(misaligned_static_shared) {
  Buffer<float> out(32);
  vico::launch(static_alignment_kernel, 1, 32, 0, nullptr, out.data(), planted);
  expect_iota(out, 1.0f);
}

COH_CASE(divergent_shuffle) {
  Buffer<int> out(32);
  vico::launch(shuffle_kernel, 1, 32, 0, nullptr, out.data(), planted ? 16 : 32);
  for (int i = 0; i < 32; ++i) expect(out[i] == i, "shuffled value %d at %d", out[i], i);
}

COH_CASE(divergent_ldmatrix) {
  Buffer<uint32_t> out(32);
  vico::launch(ldmatrix_kernel, 1, 32, 0, nullptr, out.data(), planted ? 16 : 32);
  for (unsigned i = 0; i < 32; ++i) expect(out[i] == i / 4, "row %u in lane %u", out[i], i);
}

COH_CASE(deadlock) {
  Buffer<int> out(kThreads);
  vico::launch(mbarrier_kernel, 1, kThreads, 0, nullptr, out.data(), planted ? kThreads / 2 : kThreads);
  expect_iota(out, 1);
}

COH_CASE(unwritten_output) {
  Buffer<float> out(kThreads);
  vico::launch(unwritten_kernel, 1, kThreads, 0, nullptr, out.data(), planted ? kThreads - 1 : kThreads);
  expect_iota(out, 1.0f);
}

COH_CASE(early_kernel_does_not_wait) {
  Buffer<float> out(kThreads);
  for (int i = 0; i < kThreads; ++i) out[static_cast<size_t>(i)] = static_cast<float>(i);
  vico::launch_early(true, early_kernel, 1, kThreads, 0, nullptr, out.data(), planted ? kThreads - 1 : kThreads);
  expect_iota(out, 1.0f);
}

COH_CASE(unset_shared) {
  Buffer<float> out(kThreads);
  vico::launch(unset_shared_kernel, 1, kThreads, 0, nullptr, out.data(), planted);
  expect_iota(out, 1.0f);
}

COH_CASE(blocks_write_one_place) {
  Buffer<float> out(planted ? kThreads * 2 - 1 : kThreads * 2);
  vico::launch(overlap_kernel, 2, kThreads, 0, nullptr, out.data(), planted ? kThreads - 1 : kThreads);
  expect_iota(out, 1.0f);
}

COH_CASE(threads_write_one_byte) {
  Buffer<unsigned char> out(kThreads);
  vico::launch(bytes_kernel, 1, kThreads, 0, nullptr, out.data(), planted ? 1u : 2u);
  for (size_t i = 0; i < kThreads / (planted ? 2 : 1); ++i) expect(out[i] == 1, "element %zu holds %d", i, out[i]);
}

COH_CASE(missing_threadfence) {
  Buffer<float> partials(8 * 32), out(1);
  Buffer<unsigned> ticket(1);
  ticket[0] = 0;
  vico::launch(last_block_kernel, 8, 64, 0, nullptr, partials.data(), ticket.data(), out.data(), planted);
  expect(out[0] == 256.0f, "total %g", static_cast<double>(out[0]));
}

COH_CASE(plain_beside_atomic) {
  Buffer<int> in(1000), out(8);
  int wanted[8] = {};
  for (int i = 0; i < 1000; ++i) ++wanted[in[static_cast<size_t>(i)] = i * 7 % 8];
  for (size_t i = 0; i < 8; ++i) out[i] = 0;
  vico::launch(histogram_kernel, 3, kThreads, 0, nullptr, in.data(), out.data(), 1000, planted);
  for (size_t i = 0; i < 8; ++i) expect(out[i] == 3 * wanted[i], "bin %zu holds %d", i, out[i]);
}

COH_CASE(endless_spin) {
  coh::config.max_steps = 100'000;
  Buffer<int> flag(1);
  flag[0] = planted ? 0 : 1;
  vico::launch(spin_kernel, 1, 32, 0, nullptr, flag.data());
}

COH_MAIN
