// LayerNorm of the router's rows, on CUDA: y = residual + (x - mean) rstd weight + bias, each row by itself. x may
// still be in parts, as a skinny_linear with a cut depth leaves it: x = part 0 + part 1 + ... + part_bias.
#pragma once

#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

struct LayerNormParams {
  Dtype dtype = Dtype::kFloat;  // of all tensors
  int64_t rows = 0, channels = 0;
  const void* x = nullptr;          // [rows, channels], as all below contiguous
  int64_t parts = 0;                // 0: x is of `dtype`; else x is float [parts, rows, channels], 16-bit dtypes only
  const void* part_bias = nullptr;  // [channels]; with parts only
  const void* residual = nullptr;   // [rows, channels], or null
  const void* weight = nullptr;     // [channels]
  const void* bias = nullptr;       // [channels]
  double eps = 0;
  void* y = nullptr;     // [rows, channels]; may be x or residual
  bool chained = false;  // the kernel launched before this one belongs to the same chain of calls
};

void layer_norm_cuda(const LayerNormParams& params, cudaStream_t stream);

}  // namespace vico
