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

// A pack that waits in a loop's registers: in words, because the compiler takes a Pack apart into its elements.
template <class T, int kN>
using PackBits = std::conditional_t<kN == 1, Pack<T, 1>, uint4>;

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

// The values of a pack. Two 16-bit elements are taken out of their word at once: by elements it costs twice as much.
template <class T, int kN, class A>
VICO_DEVICE void values_of(A (&to)[kN], const Pack<T, kN>& from) {
  if constexpr (sizeof(T) == 2 && kN > 1) {
    const auto words = detail::bit_cast<uint4>(from);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kN; i += 2) {
      const uint32_t two = word[i / 2];
      if constexpr (std::is_same_v<T, BFloat16>) {
        to[i] = detail::bit_cast<float>(two << 16);
        to[i + 1] = detail::bit_cast<float>(two & 0xffff0000u);
      } else {
        to[i] = ptx::half_to_float(static_cast<uint16_t>(two));
        to[i + 1] = ptx::half_to_float(static_cast<uint16_t>(two >> 16));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = value_of(from.at[i]);
  }
}

// Elements [first, first + kN) of a gain or bias, which is of type T where `as_elements`, else of the sum type: a
// 16-bit parameter is read as it is, so that no launch has to convert it.
template <class T, int kN, class A>
VICO_DEVICE void load_parameter(A (&to)[kN], const void* from, int64_t first, bool as_elements) {
  if constexpr (!std::is_same_v<T, A>) {
    if (as_elements) return values_of(to, load_pack<T, kN>(static_cast<const T*>(from) + first));
  }
  load_values(to, static_cast<const A*>(from) + first);
}

template <class T, int kN>
VICO_DEVICE Pack<T, kN> pack_of(const accumulate_t<T> (&x)[kN]) {
  if constexpr (sizeof(T) > 2) {
    Pack<T, kN> p;
#pragma unroll
    for (int i = 0; i < kN; ++i) p.at[i] = x[i];
    return p;
  } else {
    const auto two = [](float low, float high) {
      return std::is_same_v<T, Half> ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
    };
    if constexpr (kN == 1) {
      return {{{static_cast<uint16_t>(two(x[0], x[0]))}}};
    } else {
      return detail::bit_cast<Pack<T, kN>>(uint4{two(x[0], x[1]), two(x[2], x[3]), two(x[4], x[5]), two(x[6], x[7])});
    }
  }
}

}  // namespace vico
