// Division by a number that the host knows before the launch, as a multiplication. Torch-free.
#pragma once

#include "common/dtype.h"

namespace vico {

// n / divisor for n < 2^31 and 1 <= divisor < 2^31. With 2^(l - 1) < divisor <= 2^l the multiplier ceil(2^(31 + l) /
// divisor) exceeds the true one by less than 2^l / 2^(31 + l) of it: too little to reach the next integer (Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (uint64_t{1} << (shift_ - 31) < divisor_) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor_ - 1) / divisor_);
  }
  VICO_INLINE uint32_t quotient(uint32_t n) const { return static_cast<uint32_t>(uint64_t{n} * multiplier_ >> shift_); }
  VICO_INLINE uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1u << 31, shift_ = 31;
};

}  // namespace vico
