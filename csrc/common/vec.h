// Vectors of the CPU kernels, on the compiler's vector extension: as wide as the instruction set that the file is being
// compiled for. Arithmetic operators come with the type; this file adds loads, stores, reductions and conversions.
//
// Everything lives in the namespace of the instruction set (common/cpu_arch.h), so that no inline function compiled for
// one is ever linked into another.
#pragma once

#ifndef VICO_CPU_ARCH
#error "vec.h is for <op>_cpu.cpp files, which are compiled once per instruction set with VICO_CPU_ARCH set"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace vico::VICO_CPU_ARCH {

#ifdef __AVX512F__
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));  // 16-bit storage of one VecF

// The vector that holds elements of T while they are computed with.
template <class T>
struct VecOf {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <class T>
using vec_t = typename VecOf<T>::type;

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
// Elements of T in one vec_t<T>.
template <class T>
constexpr int kWidth = kLanes<vec_t<T>>;

template <class V>
VICO_INLINE V broadcast(accumulate_t<std::remove_reference_t<decltype(V{}[0])>> x) {
  return x - V{};  // x - (+0) is x for every x, -0 included
}

// ---- loads and stores, unaligned

VICO_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
VICO_INLINE VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
VICO_INLINE VecF load(const BFloat16* p) {
#ifdef __AVX512F__
  __m256i half;
  std::memcpy(&half, p, sizeof(half));
  return (VecF)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
#elif defined(__AVX2__)
  __m128i
      half;  // NOTE: an intrinsic, because gcc widens by __builtin_convertvector in four instructions instead of one
  std::memcpy(&half, p, sizeof(half));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  return (VecF)(__builtin_convertvector(half, VecU32) << 16);
#endif
}
VICO_INLINE VecF load(const Half* p) {
#ifdef __AVX512F__
  __m256i half;
  std::memcpy(&half, p, sizeof(half));
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, half);
#elif defined(__F16C__)
  __m128i half;
  std::memcpy(&half, p, sizeof(half));
  return (VecF)_mm256_cvtph_ps(half);
#else
  VecF v;
  for (int i = 0; i < kLanes<VecF>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

VICO_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }
VICO_INLINE void store(double* p, VecD v) { std::memcpy(p, &v, sizeof(v)); }
VICO_INLINE void store(BFloat16* p, VecF v) {
  const VecU32 bits = (VecU32)v;
  VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 is_nan = (VecU32)(v != v);
  rounded = (is_nan & 0x7fc0u) | (~is_nan & rounded);
  const VecU16 half = __builtin_convertvector(rounded, VecU16);
  std::memcpy(p, &half, sizeof(half));
}
VICO_INLINE void store(Half* p, VecF v) {
#ifdef __AVX512F__
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof(half));
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof(half));
#else
  for (int i = 0; i < kLanes<VecF>; ++i) p[i] = to_half(v[i]);
#endif
}

// The first n elements, n < kWidth<T>; the other lanes are zero.
template <class T>
VICO_INLINE vec_t<T> load_partial(const T* p, int64_t n) {
  T buffer[kWidth<T>] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
VICO_INLINE void store_partial(T* p, vec_t<T> v, int64_t n) {
  T buffer[kWidth<T>];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// ---- reductions and selection

template <class V>
VICO_INLINE auto sum(V v) {
  auto total = v[0];
  if constexpr (kLanes<V> == 16) {
    typedef decltype(total) Half8 __attribute__((vector_size(sizeof(V) / 2)));
    Half8 halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return sum(halves[0] + halves[1]);
  } else if constexpr (kLanes<V> == 8) {
    total = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  } else if constexpr (kLanes<V> == 4) {
    total = (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    for (int i = 1; i < kLanes<V>; ++i) total += v[i];
  }
  return total;
}

template <class V>
VICO_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
VICO_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// Loads and stores of a loop `for (i = 0; i < n; i += kWidth<T>)`: whole vectors, and in the last step what is left.
template <class T>
VICO_INLINE vec_t<T> load_n(const T* p, int64_t n) {
  return n >= kWidth<T> ? load(p) : load_partial(p, n);
}
template <class T>
VICO_INLINE void store_n(T* p, vec_t<T> v, int64_t n) {
  if (n >= kWidth<T>) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

}  // namespace vico::VICO_CPU_ARCH
