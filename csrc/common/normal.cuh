// The normal distribution on the device, and GELU by it.
#pragma once

#include "common/normal.h"
#include "common/ptx.cuh"

namespace vico {

template <class A>
struct NormalAt {
  A cdf, gauss;  // Phi(z), exp(-z^2 / 2)
};

// Phi as the tail on z's side, never as 1 minus nearly 1, so that it is right for negative z (common/math.h).
VICO_DEVICE NormalAt<float> normal_at(float z) {
  const float gauss = expf(z * z * -0.5f);
  const float u = __fdividef(1.0f, 0.35355339059f * fabsf(z) + 1.0f);
  const float tail = gauss * (u * normal_tail_quotient(u));
  return {z > 0.0f ? 1.0f - tail : tail, gauss};
}
// The same for results that are rounded to 16 bits: a polynomial of relative error 1.4e-6, and the special function
// unit without what makes its results right for subnormal numbers: half the instructions. `cdf` is that of -|z|.
VICO_DEVICE NormalAt<float> normal_tail_16(float z) {
  const float gauss = ptx::exp2_approximate(z * z * -0.72134752044f);
  const float u = ptx::reciprocal_approximate(0.35355339059f * fabsf(z) + 1.0f);
  constexpr float kQ[] = {0.14116506278514862f, 0.1388000249862671f,   0.14070391654968262f, 0.019073545932769775f,
                          0.19443081319332123f, -0.17823928594589233f, 0.04406525194644928f};
  float q = u * kQ[6] + kQ[5];
#pragma unroll
  for (int i = 4; i >= 0; --i) q = q * u + kQ[i];
  return {gauss * (u * q), gauss};
}
VICO_DEVICE NormalAt<double> normal_at(double z) {
  return {0.5 * erfc(z * -0.70710678118654752440), exp(z * z * -0.5)};
}

// As exact as results of type T need.
template <class T>
VICO_DEVICE NormalAt<accumulate_t<T>> normal_for(accumulate_t<T> z) {
  if constexpr (sizeof(T) == 2) {
    const NormalAt<float> tail = normal_tail_16(z);
    return {z > 0.0f ? 1.0f - tail.cdf : tail.cdf, tail.gauss};
  } else {
    return normal_at(z);
  }
}

// z Phi(z) as exact as results of type T need. For 16 bits max(z, 0) - |z| tail: less work than the distribution; the
// bound keeps an infinite z from meeting its tail of zero.
template <class T>
VICO_DEVICE accumulate_t<T> gelu_for(accumulate_t<T> z) {
  if constexpr (sizeof(T) == 2) {
    return fmaxf(z, 0.0f) - fabsf(fminf(z, 3.4e38f)) * normal_tail_16(z).cdf;
  } else {
    return z * normal_at(z).cdf;
  }
}

// z Phi(z).
template <class A>
VICO_DEVICE A gelu_of(A z) {
  return z * normal_at(z).cdf;
}

}  // namespace vico
