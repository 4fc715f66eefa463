// Thin PTX wrappers, everything that runs on sm_80 and later. With nvcc each is its instruction; without, the host body
// that csrc/cuda_on_host emulates it with. Kernels use no other way to write PTX.
//
// Matrix fragments are as in the PTX ISA: for mma.m16n8k16, lane l = 4 g + t holds a[0..3] = A[g + 8 (i % 2)][2 t + 8
// (i / 2)] and its right neighbour, b[0..1] = B[2 t + 8 i][g] and the element below, d[0..3] = D[g + 8 (i / 2)][2 t + i
// % 2].
#pragma once

#include "common/device.cuh"
#include "common/dtype.h"

#ifndef __CUDACC__
#include "cuda_on_host/ptx_host.h"
#endif

namespace vico::ptx {

// Address of `p` in the shared window.
VICO_DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return coh::shared_address(p);
#endif
}

// ---- 16-byte accesses; the address must be aligned to 16 bytes

VICO_DEVICE uint4 load16(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const uint4*>(p);
#else
  coh::check_vector(p, 16, "16-byte load");
  return *static_cast<const uint4*>(p);
#endif
}
// From global memory that no kernel writes meanwhile and that is read once: it does not enter the L1 cache.
VICO_DEVICE uint4 load16_streaming(const void* p) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  coh::check_vector(p, 16, "16-byte load");
  return *static_cast<const uint4*>(p);
#endif
}
VICO_DEVICE void store16(void* p, uint4 v) {
#ifdef __CUDACC__
  *static_cast<uint4*>(p) = v;
#else
  coh::check_vector(p, 16, "16-byte store");
  *static_cast<uint4*>(p) = v;
#endif
}

// ---- conversions, round to nearest even

// A NaN becomes 0x7fff.
VICO_DEVICE uint32_t pack_bfloat16(float low, float high) {
#ifdef __CUDACC__
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto bits = [](float x) { return uint32_t{x != x ? uint16_t{0x7fff} : to_bfloat16(x).bits}; };
  return bits(low) | bits(high) << 16;
#endif
}
// A NaN becomes 0x7fff.
VICO_DEVICE uint32_t pack_half(float low, float high) {
#ifdef __CUDACC__
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto bits = [](float x) { return uint32_t{x != x ? uint16_t{0x7fff} : to_half(x).bits}; };
  return bits(low) | bits(high) << 16;
#endif
}
VICO_DEVICE float half_to_float(uint16_t bits) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  return to_float(Half{bits});
#endif
}

// ---- approximations of the special function unit, relative error about 2^-22; subnormal numbers become zeros

VICO_DEVICE float exp2_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return coh::flush_subnormal(std::exp2(coh::flush_subnormal(x)));
#endif
}
VICO_DEVICE float reciprocal_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return coh::flush_subnormal(1.0f / coh::flush_subnormal(x));
#endif
}

// ---- cp.async: global to shared memory, in groups that complete in order

// 16 bytes past the L1 cache; only the first `bytes` are read, the rest is zeros.
VICO_DEVICE void cp_async_16(void* to, const void* from, int bytes = 16) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  coh::copy_async(to, from, 16, bytes);
#endif
}
// 8 bytes, through the L1 cache.
VICO_DEVICE void cp_async_8(void* to, const void* from, int bytes = 8) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  coh::copy_async(to, from, 8, bytes);
#endif
}
VICO_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  coh::copy_async_commit();
#endif
}
// Until at most the `kKeep` latest groups of this thread are under way.
template <int kKeep>
VICO_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kKeep) : "memory");
#else
  coh::copy_async_wait(kKeep);
#endif
}

// ---- ldmatrix: kCount 8x8 matrices of 16-bit elements; lane 8 i + r brings the address of row r of matrix i

template <int kCount>
VICO_DEVICE void ldmatrix(uint32_t (&r)[kCount], const void* row) {
#ifdef __CUDACC__
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t a = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
  }
#else
  coh::load_matrix(r, kCount, false, row);
#endif
}
template <int kCount>
VICO_DEVICE void ldmatrix_transposed(uint32_t (&r)[kCount], const void* row) {
#ifdef __CUDACC__
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t a = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
  }
#else
  coh::load_matrix(r, kCount, true, row);
#endif
}

// ---- mma.sync: D[16, 8] += A[16, 16] B[16, 8], sums in float

VICO_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  coh::mma_m16n8k16(d, a, b, coh::Element::kBFloat16);
#endif
}
VICO_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  coh::mma_m16n8k16(d, a, b, coh::Element::kHalf);
#endif
}

// ---- kernels that overlap (launch_early)

// Until all kernels before this one on the stream have ended, and what they wrote can be seen.
VICO_DEVICE void wait_for_earlier_kernels() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  coh::wait_for_earlier_kernels();
#endif
}
// Once every block has said so, the next kernel may begin, if it was launched early.
VICO_DEVICE void let_next_kernel_begin() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

}  // namespace vico::ptx
