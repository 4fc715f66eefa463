// The dropout arguments of ops, checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "bias_gelu/bias_gelu.h"
#include "door/door.h"

namespace vico {

// The mask of activations x, called `x_name`. A seed on the CPU is read here and now; one beside x on the GPU is left
// for the kernel to read.
inline DropoutMask dropout_mask(const Tensor& x, const char* x_name, const std::optional<Tensor>& seed, double dropout,
                                const char* op) {
  VICO_CHECK(dropout >= 0 && dropout <= 1, op, "dropout must lie in [0, 1], got ", dropout);
  DropoutMask mask;
  if (dropout == 0) return mask;
  VICO_CHECK(seed.has_value(), op, "dropout ", dropout, " needs a seed: a tensor [1] of int64");
  if (!seed->is_cpu()) check_device(*seed, x, "seed", x_name, op);
  check_dtype(*seed, ScalarType::Long, "seed", "int64", op);
  check_shape(*seed, {1}, "seed", "[1]", op);
  mask.active = true;
  const int64_t* value = seed->const_data_ptr<int64_t>();
  if (on_cuda(*seed)) {
    mask.seed_on_device = value;
  } else {
    mask.seed = static_cast<uint64_t>(*value);
  }
  mask.keep_below = static_cast<uint32_t>(std::min(std::round((1 - dropout) * 4294967296.0), 4294967295.0));
  mask.scale = dropout < 1 ? 1 / (1 - dropout) : 0;
  return mask;
}

}  // namespace vico
