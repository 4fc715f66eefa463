// Transcendental functions on the vectors of common/vec.h. Like vec.h, for <op>_cpu.cpp files only.
#pragma once

#include <cmath>

#include "common/exp.h"
#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

VICO_INLINE VecF abs(VecF x) { return (VecF)((VecU32)x & 0x7fffffffu); }

// c[0] + c[1] x + c[2] x^2 + ...
template <class V, int N>
VICO_INLINE V polynomial(V x, const accumulate_t<std::remove_reference_t<decltype(V{}[0])>> (&c)[N]) {
  V y = broadcast<V>(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

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
  // With t = |x| / sqrt(2) and u = 1 / (1 + t / 2): erfc(t) / 2 = exp(-t^2) u Q(u). Q is the least-maximum fit of
  // relative error 3.5e-9 over 0 <= t <= 10.1, beyond which the product is below the smallest float.
  constexpr float kQ[] = {0.14104413895f,  0.14112902295f, 0.1225613325f,   0.09295781885f,
                          0.026865679705f, 0.01905527089f, -0.01311714197f, -0.14255629125f,
                          0.1892161694f,   -0.0949429572f, 0.017786949285f};
  const VecF gauss = exp(x * x * -0.5f);
  const VecF u = 1.0f / (0.35355339059f * abs(x) + 1.0f);
  const VecF tail = gauss * (u * polynomial(u, kQ));
  return {x > 0.0f ? 1.0f - tail : tail, gauss};
}

VICO_INLINE Normal<VecD> normal(VecD x) {
  VecD cdf{};
  for (int i = 0; i < kLanes<VecD>; ++i) cdf[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
  return {cdf, exp(x * x * -0.5)};
}

}  // namespace vico::VICO_CPU_ARCH
