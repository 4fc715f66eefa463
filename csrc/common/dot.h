// Dot products of rows with rows, for operands whose rows are read along their length.
#pragma once

#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

constexpr int kDotLeft = 4;  // rows on the left per tile
// Rows on the right per tile: 12 sums and what they are made of fit 16 registers; there are 32 of 64 bytes.
constexpr int kDotRight = kVecBytes == 64 ? 4 : 3;

// totals[r * total_stride + l] += the vector of partial sums of left[l, :] . right[r, :] over n elements. Meanwhile n
// elements of `ahead_rows` rows from `ahead` on, `ahead_stride` apart, are fetched into the L2 cache. NOTE: each total
// has one order of summation, whatever kL and kR: how rows are grouped does not change a bit of the result. Sums of
// sums round less than one long sum.
template <int kL, int kR, bool kFetch, class L, class T, class A, class V>
VICO_INLINE void dot_tile(const L* left, int64_t left_stride, const A* right, int64_t right_stride, int64_t n,
                          int64_t ahead_rows, const T* ahead, int64_t ahead_stride, V* totals, int64_t total_stride) {
  constexpr int64_t kStep = (kFetch ? 64 : 128) / sizeof(T);
  V sums[kL][kR] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    V of_right[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) of_right[r] = load(right + r * right_stride + k);
#pragma GCC unroll 4
    for (int l = 0; l < kL; ++l) {
      const V of_left = load(left + l * left_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[l][r] += of_left * of_right[r];
    }
  };
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    if constexpr (kFetch) {
#pragma GCC unroll 1
      for (int64_t l = 0; l < ahead_rows; ++l) __builtin_prefetch(ahead + l * ahead_stride + k, 0, 2);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStep; i += kLanes<V>) step(k + i);
  }
  for (; k + kLanes<V> <= n; k += kLanes<V>) step(k);
#pragma GCC unroll 4
  for (int l = 0; l < kL; ++l) {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      V sum = sums[l][r];
      if (k < n)
        sum += load_partial(left + l * left_stride + k, n - k) * load_partial(right + r * right_stride + k, n - k);
      totals[r * total_stride + l] += sum;
    }
  }
}

// The sums of neighbouring lanes: those of a, then those of b.
template <class V>
VICO_INLINE V pair_sums(V a, V b) {
  constexpr int kL = kLanes<V>;
#ifdef __clang__
  V out;
  for (int i = 0; i < kL / 2; ++i) {
    out[i] = a[2 * i] + a[2 * i + 1];
    out[kL / 2 + i] = b[2 * i] + b[2 * i + 1];
  }
  return out;
#else
  using Index = std::conditional_t<std::is_same_v<V, VecD>, VecU64, VecU32>;
  Index even{};
  for (int i = 0; i < kL; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1u);
#endif
}

// Lane i is the sum of the lanes of v[i]. Consumes `v`.
template <class V>
VICO_INLINE V lane_sums(V (&v)[kLanes<V>]) {
#pragma GCC unroll 4
  for (int n = kLanes<V> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
  }
  return v[0];
}

}  // namespace vico::VICO_CPU_ARCH
