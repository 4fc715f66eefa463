// Rows moved whole by a block: packs of 16 bytes where all addresses allow it, of one element where not, with four
// packs of a thread in flight.
#pragma once

#include <stdexcept>

#include "common/pack.cuh"

namespace vico {

constexpr unsigned kCopyPacks = 4;
constexpr unsigned kCopyThreads = 256;

// Threads of a block that moves rows of this many packs.
inline unsigned copy_threads(int64_t packs) {
  const int64_t warps = (packs + 32 * kCopyPacks - 1) / (32 * kCopyPacks);
  return warps < kCopyThreads / 32 ? 32 * static_cast<unsigned>(warps) : kCopyThreads;
}

// Blocks of a launch with one block per row.
inline unsigned row_blocks(int64_t rows) {
  if (rows > INT32_MAX) throw std::runtime_error("more than 2^31 - 1 rows in one launch");
  return static_cast<unsigned>(rows);
}

template <class T, int kN>
VICO_DEVICE void copy_row(T* to, const T* from, int64_t packs) {
  for (int64_t base = threadIdx.x; base < packs; base += kCopyPacks * blockDim.x) {
    Pack<T, kN> in_flight[kCopyPacks];
#pragma unroll
    for (unsigned i = 0; i < kCopyPacks; ++i) {
      const int64_t u = base + i * blockDim.x;
      if (u < packs) in_flight[i] = load_pack_streaming<T, kN>(from + u * kN);
    }
#pragma unroll
    for (unsigned i = 0; i < kCopyPacks; ++i) {
      const int64_t u = base + i * blockDim.x;
      if (u < packs) store_pack(to + u * kN, in_flight[i]);
    }
  }
}

template <class T, int kN>
VICO_DEVICE void clear_row(T* to, int64_t packs) {
  for (int64_t u = threadIdx.x; u < packs; u += blockDim.x) store_pack(to + u * kN, Pack<T, kN>{});
}

}  // namespace vico
