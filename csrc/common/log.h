// log of the CPU kernels' vectors.
#pragma once

#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

// For positive normal floats up to about 1e38, within about one ulp; NaN stays NaN.
//
// log(x) = n ln 2 + log(m) with m in [sqrt(1/2), sqrt(2)), and log(m) by the polynomial of Cephes' logf.
VICO_INLINE VecF log(VecF x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const VecI32 above = (VecI32)x - kSqrtHalf;
  const VecI32 exponent = above >> 23;
  const VecF f = (VecF)((above & 0x007fffff) + kSqrtHalf) - 1.0f;
  const VecF n = __builtin_convertvector(exponent, VecF);
  VecF y = broadcast<VecF>(7.0376836292e-2f);
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const VecF f2 = f * f;
  y = y * f * f2;
  y = y - n * 2.12194440e-4f;  // ln 2 in two parts, as in exp
  y = y - f2 * 0.5f;
  y = f + y + n * 0.693359375f;
  return x == x ? y : x;
}

VICO_INLINE VecD log(VecD x) {
  for (int i = 0; i < kLanes<VecD>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace vico::VICO_CPU_ARCH
