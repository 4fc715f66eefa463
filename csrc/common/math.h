// Transcendental functions on the vectors of common/vec.h. Like vec.h, for <op>_cpu.cpp files only.
#pragma once

#include <cmath>

#include "common/exp.h"
#include "common/normal.h"
#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

VICO_INLINE VecF abs(VecF x) { return (VecF)((VecU32)x & 0x7fffffffu); }

// The normal distribution at x: `cdf` Phi(x) = P(N(0, 1) <= x), `gauss` exp(-x^2 / 2).
//
// Phi is computed as the tail probability on the side of x's sign, never as 1 minus nearly 1, so its relative error
// stays small for negative x.
template <class V>
struct Normal {
  V cdf;
  V gauss;
};

VICO_INLINE Normal<VecF> normal(VecF x) {
  // With t = |x| / sqrt(2).
  const VecF gauss = exp(x * x * -0.5f);
  const VecF u = 1.0f / (0.35355339059f * abs(x) + 1.0f);
  const VecF tail = gauss * (u * normal_tail_quotient(u));
  return {x > 0.0f ? 1.0f - tail : tail, gauss};
}

VICO_INLINE Normal<VecD> normal(VecD x) {
  VecD cdf{};
  for (int i = 0; i < kLanes<VecD>; ++i) cdf[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
  return {cdf, exp(x * x * -0.5)};
}

}  // namespace vico::VICO_CPU_ARCH
