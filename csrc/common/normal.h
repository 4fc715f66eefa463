// The normal distribution's tail, for CPU and CUDA kernels alike. Torch-free.
#pragma once

#include "common/dtype.h"

namespace vico {

// Q(u) of erfc(t) / 2 = exp(-t^2) u Q(u), with u = 1 / (1 + t / 2) and t >= 0: the least-maximum fit of relative error
// 3.5e-9 over t <= 10.1, beyond which the product is below the smallest float. V is float or a vector of them.
template <class V>
VICO_INLINE V normal_tail_quotient(V u) {
  constexpr float kQ[] = {0.14104413895f,  0.14112902295f, 0.1225613325f,   0.09295781885f,
                          0.026865679705f, 0.01905527089f, -0.01311714197f, -0.14255629125f,
                          0.1892161694f,   -0.0949429572f, 0.017786949285f};
  V y = u * kQ[10] + kQ[9];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 8; i >= 0; --i) y = y * u + kQ[i];
  return y;
}

}  // namespace vico
