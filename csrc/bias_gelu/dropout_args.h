// The dropout arguments of ops, checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "bias_gelu/bias_gelu.h"
#include "common/tensor.h"

namespace vico {

inline DropoutMask dropout_mask(const std::optional<Tensor>& seed, double dropout, const char* op) {
  VICO_CHECK(dropout >= 0 && dropout <= 1, op, "dropout must lie in [0, 1], got ", dropout);
  DropoutMask mask;
  if (dropout == 0) return mask;
  VICO_CHECK(seed.has_value(), op, "dropout ", dropout, " needs a seed: a tensor [1] of int64");
  check_cpu(*seed, "seed", op);
  check_dtype(*seed, ScalarType::Long, "seed", "int64", op);
  check_shape(*seed, {1}, "seed", "[1]", op);
  mask.active = true;
  mask.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  mask.keep_below = static_cast<uint32_t>(std::min(std::round((1 - dropout) * 4294967296.0), 4294967295.0));
  mask.scale = dropout < 1 ? 1 / (1 - dropout) : 0;
  return mask;
}

}  // namespace vico
