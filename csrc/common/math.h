// Transcendental functions on the vectors of common/vec.h. Like vec.h, for <op>_cpu.cpp files only.
#pragma once

#include <cmath>

#include "common/exp.h"
#include "common/normal.h"
#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

VICO_INLINE VecF abs(VecF x) { return (VecF)((VecU32)x & 0x7fffffffu); }
VICO_INLINE VecD abs(VecD x) { return (VecD)((VecU64)x & 0x7fffffffffffffffu); }

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
  // With t = |x| / sqrt(2).
  const VecF gauss = exp(x * x * -0.5f);
  const VecF u = 1.0f / (0.35355339059f * abs(x) + 1.0f);
  const VecF tail = gauss * (u * normal_tail_quotient(u));
  return {x > 0.0f ? 1.0f - tail : tail, gauss};
}

VICO_INLINE Normal<VecD> normal(VecD x) {
  // With t = |x| / sqrt(2) and w = (t - 3.75) / (t + 3.75): erfc(t) / 2 = exp(-t^2) Q(w) / (1 + 2 t). Q interpolates at
  // Chebyshev nodes with a relative error of 1.4e-17 over 0 <= t <= 27.3, beyond which the product is below the
  // smallest double.
  constexpr double kQ[] = {
      0.6187563154189137,     -0.07012029929277334,   0.0017927077427317198,  0.041138369245056684,
      -0.05440196507084668,   0.0461521605807478,     -0.029346699295362648,  0.014181138700413572,
      -0.0048732897743949495, 0.0008778130079169542,  0.00014685681827542597, -0.00014507748472945045,
      2.5824514420679708e-05, 1.1193656756419091e-05, -5.721631256401456e-06, -4.901852462644962e-07,
      8.742434538051884e-07,  -2.38849149604321e-08,  -1.26424602788902e-07,  7.808954048317971e-09,
      1.6426932927516397e-08, -3.641776008446285e-10, -1.1802610312528346e-09};
  const VecD y = min(abs(x), broadcast<VecD>(40.0));  // everything is 0 or 1 from there on, at infinity too
  // exp(-x^2 / 2) from the exact square of x's upper bits: the rounding of x^2 would become a relative error of up to
  // 745 ulps. What is left of the exponent is below 2^-13, where three terms are enough.
  const VecD upper = (VecD)((VecU64)y & 0xfffffffff8000000u);
  const VecD rest = (y - upper) * (y + upper) * -0.5;
  const VecD gauss = exp(upper * upper * -0.5) * (1.0 + rest * (1.0 + rest * (0.5 + rest * (1.0 / 6))));
  const VecD w = (y - 5.30330085889910643) / (y + 5.30330085889910643);
  const VecD tail = gauss * polynomial(w, kQ) / (1.0 + 1.41421356237309505 * y);
  return {x != x ? x : x > 0.0 ? 1.0 - tail : tail, x != x ? x : gauss};
}

}  // namespace vico::VICO_CPU_ARCH
