// Which elements dropout keeps, in CUDA kernels: common/philox.h has the numbering.
#pragma once

#include "common/pack.cuh"
#include "common/philox.h"

namespace vico {

// Random words of counter `counter`.
VICO_DEVICE void draw_words(uint32_t (&words)[4], uint64_t seed, uint64_t counter) {
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  words[2] = words[3] = 0;
  philox4x32_10(words, seed);
}

// words[j] of lane t of four neighbours changes places with words[t] of lane j.
VICO_DEVICE void exchange_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & static_cast<unsigned>(step);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? words[j] : words[j + step], step);
      words[j] = upper ? got : words[j];
      words[j + step] = upper ? words[j + step] : got;
    }
  }
}

// Bit i: whether dropout keeps element first + i, of kN. `aligned`, the same for the whole warp, says that the first
// elements of the warp's threads are 8 apart and that those of its first thread begin a block of 32: then four threads,
// which share such a block, draw two of its eight counters each and tell each other by votes what is kept. Otherwise
// each element draws for itself, and three words of four are thrown away. All threads of a warp must call this.
template <int kN, class Mask>
VICO_DEVICE uint32_t kept_bits(const Mask& mask, uint64_t seed, int64_t first, bool aligned) {
  uint32_t bits = 0;
  if constexpr (kN == kPhiloxLanes) {
    if (aligned) {
      const uint64_t counter = static_cast<uint64_t>(first) / kPhiloxBlock * kPhiloxLanes + threadIdx.x % 4 * 2;
      uint32_t even[4], odd[4];
      draw_words(even, seed, counter);
      draw_words(odd, seed, counter + 1);
      // Lane t of four draws the words of elements 2 t and 2 t + 1 for all four, and needs word t of each.
      uint32_t pairs = 0;
#pragma unroll
      for (unsigned j = 0; j < 4; ++j) {
        const uint32_t of_even = __ballot_sync(~0u, even[j] < mask.keep_below);
        const uint32_t of_odd = __ballot_sync(~0u, odd[j] < mask.keep_below);
        const unsigned first_lane = threadIdx.x % 32 / 4 * 4;
        if (threadIdx.x % 4 == j) pairs = (of_even >> first_lane & 15) | (of_odd >> first_lane & 15) << 16;
      }
      pairs = (pairs | pairs << 2) & 0x00330033u;
      pairs = (pairs | pairs << 1) & 0x00550055u;
      bits = (pairs | pairs >> 15) & 0xffu;
      return bits;
    }
  }
#pragma unroll 1
  for (int i = 0; i < kN; ++i) {
    const uint64_t e = static_cast<uint64_t>(first) + static_cast<uint64_t>(i);
    uint32_t words[4];
    draw_words(words, seed, e / kPhiloxBlock * kPhiloxLanes + e % kPhiloxLanes);
    const unsigned part = static_cast<unsigned>(e % kPhiloxBlock / kPhiloxLanes);
    const uint32_t low = part & 1 ? words[1] : words[0], high = part & 1 ? words[3] : words[2];
    bits |= uint32_t{(part < 2 ? low : high) < mask.keep_below} << i;
  }
  return bits;
}

}  // namespace vico
