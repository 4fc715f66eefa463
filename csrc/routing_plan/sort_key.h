// Numbers as unsigned integers of the same order: what radix selection decides digit by digit.
#pragma once

#include "common/dtype.h"

namespace vico {

// Negative numbers have all bits flipped, others the sign. NaN has no place in the order.
VICO_INLINE uint32_t sort_key(float x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
VICO_INLINE uint64_t sort_key(double x) {
  const uint64_t bits = detail::bit_cast<uint64_t>(x);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}
VICO_INLINE float from_sort_key(uint32_t key) {
  return detail::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
VICO_INLINE double from_sort_key(uint64_t key) {
  return detail::bit_cast<double>(key >> 63 ? key & ~(uint64_t{1} << 63) : ~key);
}

}  // namespace vico
