// LayerNorm of the router's rows, on CUDA: y = residual + (x - mean) rstd weight + bias, each row by itself.
#pragma once

#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

struct LayerNormParams {
  Dtype dtype = Dtype::kFloat;  // of all tensors
  int64_t rows = 0, channels = 0;
  const void* x = nullptr;         // [rows, channels], as all below contiguous
  const void* residual = nullptr;  // [rows, channels], or null
  const void* weight = nullptr;    // [channels]
  const void* bias = nullptr;      // [channels]
  double eps = 0;
  void* y = nullptr;     // [rows, channels]; may be x or residual
  bool chained = false;  // the kernel launched before this one belongs to the same chain of calls
};

void layer_norm_cuda(const LayerNormParams& params, cudaStream_t stream);

}  // namespace vico
