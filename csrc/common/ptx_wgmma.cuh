// Warp-group matrix multiplication (wgmma, sm_90a): D[64, N] (+)= A[64, 16] B[16, N] from shared memory, sums in float.
// Host bodies as in ptx.cuh.
//
// Register i of lane l of warp w (of the group's four) holds D[16 w + l / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (l % 4) + i
// % 2].
#pragma once

#include "common/ptx_sm90.cuh"

namespace vico::ptx {

enum class Swizzle : int { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };  // as in tensor maps

// The matrix descriptor of an operand at shared address `address` (PTX ISA, "Matrix descriptor format"). Operands lie
// in atoms of 8 rows, each row as long as the swizzle's span (16 bytes without). K-major: `stride` bytes lead to the
// next 8 rows along M or N, `leading` bytes to the next 16 along K (no swizzle only). MN-major: `leading` bytes lead to
// the next atom along M or N, `stride` to the next 8 rows along K; without a swizzle the two change places.
VICO_INLINE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  const uint64_t mode = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<uint64_t>(swizzle);
  return (address & 0x3ffff) >> 4 | uint64_t{leading >> 4 & 0x3fff} << 16 | uint64_t{stride >> 4 & 0x3fff} << 32 |
         mode << 62;
}

// Before the first wgmma, and whenever registers of D have been touched since.
VICO_DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  coh::mma_async_fence();
#endif
}
VICO_DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  coh::mma_async_commit();
#endif
}
// Until at most the kKeep latest groups are under way; only then may D be read.
template <int kKeep>
VICO_DEVICE void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kKeep) : "memory");
#else
  coh::mma_async_wait(kKeep);
#endif
}

#ifdef __CUDACC__
// Operand lists of 8 registers each, and their places in the assembly text.
#define VICO_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define VICO_D32(i) VICO_D8(i), VICO_D8(i + 8), VICO_D8(i + 16), VICO_D8(i + 24)
#define VICO_P10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define VICO_P30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " VICO_P10(1) VICO_P10(2)
#define VICO_P60 VICO_P30 VICO_P10(3) VICO_P10(4) VICO_P10(5)
#define VICO_P120 VICO_P60 VICO_P10(6) VICO_P10(7) VICO_P10(8) VICO_P10(9) VICO_P10(10) VICO_P10(11)
#define VICO_WGMMA(n, type, places, a, b, accumulate, a_mn, b_mn, ...)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                                                     \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" places "}, " a ", " b         \
               ", p, 1, 1, " a_mn ", " b_mn ";\n}"                                                                \
               : __VA_ARGS__                                                                                      \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate_d)), "n"(static_cast<int>(kAMnMajor)), \
                 "n"(static_cast<int>(kBMnMajor)))
#define VICO_WGMMA_N(type)                                                                                            \
  if constexpr (kN == 64) {                                                                                           \
    VICO_WGMMA(64, type, VICO_P30 "%30, %31", "%32", "%33", "%34", "%35", "%36", VICO_D32(0));                        \
  } else if constexpr (kN == 128) {                                                                                   \
    VICO_WGMMA(128, type, VICO_P60 "%60, %61, %62, %63", "%64", "%65", "%66", "%67", "%68", VICO_D32(0),              \
               VICO_D32(32));                                                                                         \
  } else {                                                                                                            \
    VICO_WGMMA(256, type, VICO_P120 "%120, %121, %122, %123, %124, %125, %126, %127", "%128", "%129", "%130", "%131", \
               "%132", VICO_D32(0), VICO_D32(32), VICO_D32(64), VICO_D32(96));                                        \
  }
#endif

// kHalf: fp16, else bf16. kAMnMajor, kBMnMajor: the operand lies with M (N) contiguous, not K.
template <int kN, bool kHalf, bool kAMnMajor = false, bool kBMnMajor = false>
VICO_DEVICE void wgmma_m64k16(float (&d)[kN / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate_d) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "wgmma is wrapped for N = 64, 128 and 256");
#ifdef __CUDACC__
  if constexpr (kHalf) {
    VICO_WGMMA_N("f16")
  } else {
    VICO_WGMMA_N("bf16")
  }
#else
  coh::mma_async({desc_a, desc_b, d, kN, kAMnMajor, kBMnMajor, accumulate_d,
                  kHalf ? coh::Element::kHalf : coh::Element::kBFloat16});
#endif
}

#ifdef __CUDACC__
#undef VICO_D8
#undef VICO_D32
#undef VICO_P10
#undef VICO_P30
#undef VICO_P60
#undef VICO_P120
#undef VICO_WGMMA
#undef VICO_WGMMA_N
#endif

}  // namespace vico::ptx
