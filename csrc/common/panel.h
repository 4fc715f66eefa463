// Rows of a matrix copied into the cache in the accumulate type, padded so that vectors and cache sets come out even.
#pragma once

#include <cstdlib>
#include <new>

#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

VICO_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VICO_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
VICO_INLINE accumulate_t<T> to_accumulate(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}
template <class T>
VICO_INLINE T from_accumulate(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// Uninitialised memory of a kernel call, aligned to cache lines.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(n ? static_cast<A*>(std::aligned_alloc(64, round_up(n * sizeof(A), 64))) : nullptr) {
    if (n && !data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  A* get() const { return data_; }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  A* data_;
};

// Elements from one row of a panel to the next, for rows of n. An odd number of cache lines: rows a power of two apart
// would share one set of the L1 cache and push each other out.
template <class A>
VICO_INLINE int64_t panel_stride(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return round_up(n, kLine) + (round_up(n, kLine) / kLine % 2 ? 0 : kLine);
}

// Rows in a panel whose rows have n elements: a multiple of 4 that leaves most of the L2 cache to the other operands.
template <class A>
VICO_INLINE int64_t panel_rows(int64_t n, int64_t most) {
  constexpr int64_t kBytes = 1 << 18;
  int64_t rows = 64;
  while (rows > 16 && rows * n * static_cast<int64_t>(sizeof(A)) > kBytes) rows /= 2;
  return min_of(rows, most);
}

// to [count, to_stride] = from [count, n], zero from n to the next multiple of a cache line.
template <class T>
void copy_rows(const T* from, int64_t from_stride, int64_t count, int64_t n, accumulate_t<T>* to, int64_t to_stride) {
  const int64_t whole = n - n % kWidth<T>, padded = round_up(n, 64 / sizeof(accumulate_t<T>));
  for (int64_t r = 0; r < count; ++r, from += from_stride, to += to_stride) {
    for (int64_t c = 0; c < whole; c += kWidth<T>) store(to + c, load(from + c));
    if (whole < n) store(to + whole, load_partial(from + whole, n - whole));
    for (int64_t c = round_up(n, kWidth<T>); c < padded; ++c) to[c] = 0;
  }
}

}  // namespace vico::VICO_CPU_ARCH
