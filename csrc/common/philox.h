// Philox4x32-10, the counter-based random number generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). Torch-free, for host and device code alike.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vico {

// The two words of the product of 32-bit words.
struct MultiplyWide {
  VICO_INLINE void operator()(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) const {
#ifdef __CUDA_ARCH__
    high = __umulhi(a, m);  // with the next line one instruction; of a 64-bit product nvcc makes two
    low = a * m;
#else
    const uint64_t product = uint64_t{a} * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
#endif
  }
};

// Replaces the counter x by its four random words. Word is uint32_t, or a vector of them with a Multiply of its own:
// then each lane is a counter.
template <class Word, class Multiply = MultiplyWide>
VICO_INLINE void philox4x32_10(Word (&x)[4], uint64_t seed, const Multiply& multiply_wide = {}) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply_wide(x[0], 0xD2511F53u, high0, low0);
    multiply_wide(x[2], 0xCD9E8D57u, high1, low1);
    x[0] = high1 ^ x[1] ^ key0;
    x[2] = high0 ^ x[3] ^ key1;
    x[1] = low1;
    x[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// How the elements of a long array share the words: element e takes word (e % 32) / 8 of counter (e / 32) * 8 + e % 8,
// so that neighbours are neighbouring counters and a block of 32 elements is eight of them.
constexpr int64_t kPhiloxLanes = 8;
constexpr int64_t kPhiloxBlock = 4 * kPhiloxLanes;

}  // namespace vico
