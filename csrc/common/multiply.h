// Small matrix products on vectors, for operands that lie in the cache.
#pragma once

#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

// Operands of C[r, :] = (beta * C[r, :]) + sum_k A[r, k] * B[k, :]. Strides are in elements.
// NOTE: rows of B and C are read and written in whole vectors of V; C must not alias A or B.
template <class V, class B>
struct Product {
  using A = accumulate_t<B>;
  int64_t depth;  // k
  const A* a;
  int64_t a_row, a_depth;  // strides of A: one element at a time, so any layout will do
  const B* b;
  int64_t b_depth;  // stride of B; columns are next to each other
  A* c;
  int64_t c_row;            // stride of C; columns are next to each other
  const A* beta = nullptr;  // [columns]: what C is multiplied by before the sum is added; null: C is overwritten
};

namespace detail {

// kRows rows of C by kVecs vectors, at (row, column).
// NOTE: every element of C is one chain of multiply-adds over k in ascending order whatever the tiling, so results do
// not depend on how many rows or columns a call has.
template <int kRows, int kVecs, bool kUnitRow, class V, class B>
VICO_INLINE void multiply_tile(const Product<V, B>& p, int64_t row, int64_t column) {
  V sum[kRows][kVecs] = {};
  const auto* a = p.a + row * p.a_row;
  const B* b = p.b + column;
  const int64_t a_row = kUnitRow ? 1 : p.a_row;  // a constant saves a register for each row
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_depth) {
    V right[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) right[j] = load(b + j * kLanes<V>);
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
      const V left = broadcast<V>(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const int64_t at = column + j * kLanes<V>;
      auto* c = p.c + (row + i) * p.c_row + at;
      store(c, p.beta ? load(p.beta + at) * load(c) + sum[i][j] : sum[i][j]);
    }
  }
}

template <int kVecs, bool kUnitRow, class V, class B>
VICO_INLINE void multiply_columns(const Product<V, B>& p, int64_t rows, int64_t column) {
  // As many sums as still fit the registers: more than enough to hide the latency of a multiply-add.
  constexpr int kMost = (kVecBytes == 64 ? 24 : 12) / kVecs;
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) multiply_tile<kMost, kVecs, kUnitRow>(p, row, column);
  if constexpr (kMost > 4) {
    for (; row + 4 <= rows; row += 4) multiply_tile<4, kVecs, kUnitRow>(p, row, column);
  }
  for (; row < rows; ++row) multiply_tile<1, kVecs, kUnitRow>(p, row, column);
}

}  // namespace detail

// C [rows, columns] from A [rows, depth] and B [depth, columns]; columns is a multiple of the vector's lanes. kUnitRow:
// a_row is 1.
template <class V, class B, bool kUnitRow = false>
void multiply(const Product<V, B>& p, int64_t rows, int64_t columns) {
  int64_t column = 0;
  if (rows <= 3) {
    for (; column + 4 * kLanes<V> <= columns; column += 4 * kLanes<V>)
      detail::multiply_columns<4, kUnitRow>(p, rows, column);
  }
  for (; column + 2 * kLanes<V> <= columns; column += 2 * kLanes<V>)
    detail::multiply_columns<2, kUnitRow>(p, rows, column);
  for (; column < columns; column += kLanes<V>) detail::multiply_columns<1, kUnitRow>(p, rows, column);
}

}  // namespace vico::VICO_CPU_ARCH
