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

// Likewise in double, exp(r) by its Taylor series: the first term left out is below 2^-57.
VICO_INLINE VecD exp(VecD x) {
  const VecD bounded = min(max(x, broadcast<VecD>(-746.0)), broadcast<VecD>(710.0));
  // Adding 1.5 * 2^52 rounds to an integer, whose two's complement is then the low end of the bits.
  const VecD magic = broadcast<VecD>(6755399441055744.0);
  const VecD n = (bounded * 1.44269504088896340736 + magic) - magic;
  VecD r = bounded - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  constexpr double kInverseFactorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                           1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                           1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  VecD y = broadcast<VecD>(kInverseFactorials[0]);
  for (int i = 1; i < 12; ++i) y = y * r + kInverseFactorials[i];
  y = y * r * r + r + 1.0;
  const VecD half = (n * 0.5 + magic) - magic;
  y = y * (VecD)(((VecU64)(half + magic) + 1023u) << 52) * (VecD)(((VecU64)(n - half + magic) + 1023u) << 52);
  return x == x ? y : x;
}

}  // namespace vico::VICO_CPU_ARCH
