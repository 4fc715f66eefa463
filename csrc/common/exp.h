// exp of the CPU kernels' vectors.
#pragma once

#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

// Within about one ulp over the whole range, subnormal results included; -inf gives 0, overflow inf, NaN stays NaN.
//
// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, and exp(r) by the polynomial of Cephes' expf.
VICO_INLINE VecF exp(VecF x) {
  // Beyond these bounds the result is 0 or inf all the same, and n still fits the two scalings below.
  const VecF bounded = min(max(x, broadcast<VecF>(-104.0f)), broadcast<VecF>(89.0f));
  // Adding 1.5 * 2^23 leaves no bits for a fraction: the FPU rounds to an integer.
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF n = (bounded * 1.44269504088896341f + magic) - magic;
  VecF r = bounded - n * 0.693359375f;  // ln 2 in two parts, the first with so few bits that its product is exact
  r = r + n * 2.12194440e-4f;
  VecF y = broadcast<VecF>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // 2^n in two steps, because 2^128 and 2^-150 are no normal floats while the results may well be finite.
  const VecI32 exponent = __builtin_convertvector(n, VecI32);
  const VecI32 half = exponent >> 1;
  y = y * (VecF)((half + 127) << 23) * (VecF)((exponent - half + 127) << 23);
  return x == x ? y : x;
}

VICO_INLINE VecD exp(VecD x) {
  for (int i = 0; i < kLanes<VecD>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace vico::VICO_CPU_ARCH
