// The normal distribution on the device, and GELU by it.
#pragma once

#include "common/device.cuh"
#include "common/normal.h"

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
VICO_DEVICE NormalAt<double> normal_at(double z) {
  return {0.5 * erfc(z * -0.70710678118654752440), exp(z * z * -0.5)};
}

// z Phi(z).
template <class A>
VICO_DEVICE A gelu_of(A z) {
  return z * normal_at(z).cdf;
}

}  // namespace vico
