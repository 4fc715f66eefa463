// skinny_linear: y = x weight^T + bias for few rows of x, alone or for several groups at once. Bound by reading the
// weight once.
//
//   y[m, g, n] = sum_k x[m, g, k] weight[g, n, k] + bias[g, n]
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// All strides are in elements.
struct SkinnyLinearParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;      // M
  int64_t groups = 0;    // G, 1 for a plain linear layer
  int64_t features = 0;  // N
  int64_t depth = 0;     // K
  // [rows, groups, depth], contiguous. On the CPU of the accumulate type: every thread reads all of it, so it is
  // converted once. On CUDA of the element type, which the tensor cores take.
  const void* x = nullptr;
  const void* weight = nullptr;  // [groups, features, depth]
  // Either depth_stride or feature_stride is 1: weight^T serves as well as weight.
  int64_t group_stride = 0, feature_stride = 0, depth_stride = 0;
  const void* bias = nullptr;  // [groups, features], contiguous; null for none
  void* y = nullptr;           // [rows, groups, features], contiguous
  // CUDA: how many parts the depth is cut into. More than one leaves the sums of each, float [parts, rows, features]
  // without bias, in y, for a kernel that adds them up in order (common/layer_norm.h). depth_parts says how many.
  static constexpr int64_t kMostParts = 4;
  int64_t parts = 1;
  // What is done to a result before it is stored, CUDA kernels only: y = gelu(scale (x weight^T + bias)), exact GELU.
  double scale = 1;
  bool gelu = false;
  // CUDA: the kernel launched before this one belongs to the same chain of calls, and the weight and bias are older
  // than that chain. They may then be read before that kernel has ended.
  bool chained = false;

  static constexpr int64_t kMostBlock = 64;
  // Features per item of work: where they are next to each other in memory, enough for long runs of it.
  VICO_INLINE int64_t block() const { return depth_stride == 1 ? 32 : kMostBlock; }
  VICO_INLINE int64_t blocks() const { return (features + block() - 1) / block(); }
};

// One layer of contiguous tensors: x [rows, depth], weight [features, depth], bias [features] or null.
inline SkinnyLinearParams dense_layer(Dtype dtype, const void* x, int64_t rows, int64_t depth, const void* weight,
                                      const void* bias, int64_t features, void* y) {
  SkinnyLinearParams p;
  p.dtype = dtype;
  p.rows = rows;
  p.groups = 1;
  p.features = features;
  p.depth = p.feature_stride = depth;
  p.depth_stride = 1;
  p.x = x;
  p.weight = weight;
  p.bias = bias;
  p.y = y;
  return p;
}

// Into how many parts the CUDA kernels should cut a deep layer's depth. Every block reads its rows of x from L2, as
// many bytes as it reads of the weight where it has as many features as rows: fewer, deeper blocks read x more often,
// and that, not the weight, is then what takes the time. One part where there is nothing to gain or no kernel for it.
int64_t depth_parts(const SkinnyLinearParams& p);

// Items [begin, end) of all groups * blocks(): block() features of one group each, for all rows.
VICO_CPU_KERNEL(skinny_linear, const SkinnyLinearParams&, int64_t begin, int64_t end)

void skinny_linear_cuda(const SkinnyLinearParams& params, cudaStream_t stream);

}  // namespace vico
