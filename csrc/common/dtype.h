// Element types of the kernels. Torch-free, for host and device code alike.
#pragma once

#include <cstdint>
#include <cstring>

// NOTE: always_inline because <op>_cpu.cpp files are compiled once per instruction set: an ordinary inline function
// would be linked once for all of them, perhaps in the version with instructions this machine lacks.
#ifdef __CUDACC__
#define VICO_INLINE __host__ __device__ __forceinline__
#else
#define VICO_INLINE inline __attribute__((always_inline))
#endif

namespace vico {

enum class Dtype : int8_t { kFloat, kDouble, kBFloat16, kHalf };

// Storage of the 16-bit types; arithmetic happens in float (common/vec.h).
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type sums are kept in: double for double, float for everything else.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

namespace detail {

template <class To, class From>
VICO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace detail

VICO_INLINE float to_float(BFloat16 x) { return detail::bit_cast<float>(uint32_t{x.bits} << 16); }

// Round to nearest, ties to even; NaN stays NaN.
VICO_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

VICO_INLINE float to_float(Half x) {
  // Shift exponent and mantissa into place and rescale by 2^112: exact for normal and subnormal numbers.
  const uint32_t magnitude = x.bits & 0x7fffu;
  float value = detail::bit_cast<float>(magnitude << 13) * detail::bit_cast<float>(0x77800000u);
  if (magnitude >= 0x7c00u) value = detail::bit_cast<float>(0x7f800000u | ((magnitude & 0x3ffu) << 13));
  return (x.bits & 0x8000u) ? -value : value;
}

// Round to nearest, ties to even; overflow gives infinity, NaN stays NaN.
VICO_INLINE Half to_half(float x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal result: adding 0.5 aligns the mantissa, the FPU rounds it
    const float aligned = detail::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (detail::bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}

template <class T>
VICO_INLINE T from_float(float x) {
  return x;
}
template <>
VICO_INLINE BFloat16 from_float<BFloat16>(float x) {
  return to_bfloat16(x);
}
template <>
VICO_INLINE Half from_float<Half>(float x) {
  return to_half(x);
}
VICO_INLINE float to_float(float x) { return x; }

// Calls fn(T{}) with the element type of dtype. Host code only: nvcc would take `fn` for a device function otherwise.
template <class Fn>
inline __attribute__((always_inline)) void dispatch(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::kFloat:
      return fn(float{});
    case Dtype::kDouble:
      return fn(double{});
    case Dtype::kBFloat16:
      return fn(BFloat16{});
    case Dtype::kHalf:
      return fn(Half{});
  }
}

VICO_INLINE bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

VICO_INLINE int64_t element_size(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

}  // namespace vico
