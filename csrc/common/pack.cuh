// Packs: neighbouring elements that move in one access, 16 bytes of them or just one, and their values for arithmetic.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

namespace vico {

template <class T, int kN>
struct Pack {
  static_assert(kN == 1 || kN * sizeof(T) == 16, "a pack is one element or 16 bytes");
  T at[kN];
};
// Elements in 16 bytes.
template <class T>
constexpr int kPackWidth = 16 / sizeof(T);

template <class T, int kN>
VICO_DEVICE Pack<T, kN> load_pack(const T* p) {
  if constexpr (kN == 1) {
    return {{*p}};
  } else {
    return detail::bit_cast<Pack<T, kN>>(ptx::load16(p));
  }
}
// For what no kernel writes meanwhile and that is read once.
template <class T, int kN>
VICO_DEVICE Pack<T, kN> load_pack_streaming(const T* p) {
  if constexpr (kN == 1) {
    return {{*p}};
  } else {
    return detail::bit_cast<Pack<T, kN>>(ptx::load16_streaming(p));
  }
}
template <class T, int kN>
VICO_DEVICE void store_pack(T* p, const Pack<T, kN>& v) {
  if constexpr (kN == 1) {
    *p = v.at[0];
  } else {
    ptx::store16(p, detail::bit_cast<uint4>(v));
  }
}

// kN values of the sum type from memory, in accesses as wide as the pack's alignment allows.
template <class A, int kN>
VICO_DEVICE void load_values(A (&to)[kN], const A* p) {
  if constexpr (kN == 1) {
    to[0] = *p;
  } else {
    constexpr int kStep = kPackWidth<A>;
#pragma unroll
    for (int i = 0; i < kN; i += kStep) {
      const auto part = load_pack<A, kStep>(p + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) to[i + j] = part.at[j];
    }
  }
}
template <class A, int kN>
VICO_DEVICE void store_values(A* p, const A (&from)[kN]) {
  if constexpr (kN == 1) {
    *p = from[0];
  } else {
    constexpr int kStep = kPackWidth<A>;
#pragma unroll
    for (int i = 0; i < kN; i += kStep) {
      Pack<A, kStep> part;
#pragma unroll
      for (int j = 0; j < kStep; ++j) part.at[j] = from[i + j];
      store_pack(p + i, part);
    }
  }
}

VICO_DEVICE float value_of(float x) { return x; }
VICO_DEVICE double value_of(double x) { return x; }
VICO_DEVICE float value_of(BFloat16 x) { return to_float(x); }
VICO_DEVICE float value_of(Half x) { return ptx::half_to_float(x.bits); }

template <class T, int kN>
VICO_DEVICE Pack<T, kN> pack_of(const accumulate_t<T> (&x)[kN]) {
  Pack<T, kN> p;
  if constexpr (sizeof(T) > 2) {
#pragma unroll
    for (int i = 0; i < kN; ++i) p.at[i] = x[i];
  } else {
    const auto two = [](float low, float high) {
      return std::is_same_v<T, Half> ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
    };
    if constexpr (kN == 1) {
      p.at[0].bits = static_cast<uint16_t>(two(x[0], x[0]));
    } else {
#pragma unroll
      for (int i = 0; i < kN; i += 2) {
        const uint32_t bits = two(x[i], x[i + 1]);
        p.at[i].bits = static_cast<uint16_t>(bits);
        p.at[i + 1].bits = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
  return p;
}

}  // namespace vico
