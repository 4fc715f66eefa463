// router_gate: logits of the gating head as one call without gradients or dropout.
//
//   x <- x + LayerNorm(W2 gelu(W1 x + b1) + b2)   for each block
//   logits = W LayerNorm(x) + b,  and if wanted  probability = softmax(logits)[0]
#pragma once

#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// Contiguous, of x's dtype.
struct RouterGateBlock {
  const void *up_weight = nullptr, *up_bias = nullptr;      // [hidden, channels], [hidden]
  const void *down_weight = nullptr, *down_bias = nullptr;  // [channels, hidden], [channels]
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // [channels]
  int64_t hidden = 0;
};

struct RouterGateParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, channels = 0, classes = 0;
  const void* x = nullptr;  // [rows, channels], contiguous, as all below
  const RouterGateBlock* blocks = nullptr;
  int64_t block_count = 0;
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // [channels]
  const void *weight = nullptr, *bias = nullptr;            // [classes, channels], [classes]
  double eps = 0;
  void* logits = nullptr;       // [rows, classes]
  void* probability = nullptr;  // [rows], accumulate type; null: not wanted
  void* hidden = nullptr;       // work areas: [rows, the widest block's hidden]
  void* update = nullptr;       // [rows, channels]
  void* parts = nullptr;        // float [SkinnyLinearParams::kMostParts, rows, channels]; for 16-bit dtypes alone
  void* current = nullptr;      // [rows, channels]
};

void router_gate_cuda(const RouterGateParams& params, cudaStream_t stream);

}  // namespace vico
