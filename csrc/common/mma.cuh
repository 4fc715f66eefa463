// mma.sync for either 16-bit type.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

namespace vico {

// D[16, 8] += A[16, 16] B[16, 8]; fragments as in common/ptx.cuh.
template <class T>
VICO_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>, "tensor cores of 16 bits");
  if constexpr (std::is_same_v<T, Half>) {
    ptx::mma_m16n8k16_f16(d, a, b);
  } else {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
}

}  // namespace vico
