// bias_gelu: dropout(gelu(x + bias)), exact GELU; the epilogue of the connectors' projections.
//
//   z = x + bias,  out = z * Phi(z) * keep,  grad_x = grad_out * keep * (Phi(z) + z * phi(z)),
// with Phi and phi the normal distribution and its density, and keep 0 or 1 / (1 - p).
#pragma once

#include "common/column_sum.h"
#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/philox.h"

namespace vico {

// Which elements dropout keeps: a pure function of the seed and the element's index (common/philox.h), drawn again in
// the backward pass.
struct DropoutMask {
  bool active = false;
  uint64_t seed = 0;
  const int64_t* seed_on_device = nullptr;  // CUDA: where the seed is, if the host does not know it
  uint32_t keep_below = 0;                  // an element is kept iff its random word is below: (1 - p) * 2^32
  double scale = 1;                         // of kept elements: 1 / (1 - p)

  VICO_INLINE uint64_t current_seed() const { return seed_on_device ? static_cast<uint64_t>(*seed_on_device) : seed; }
};

struct BiasGeluParams {
  Dtype dtype = Dtype::kFloat;
  int64_t columns = 1;         // H; elements are [rows, columns], contiguous
  int64_t elements = 0;        // rows * columns; without a bias any number
  const void* x = nullptr;     // [rows, columns]
  const void* bias = nullptr;  // [columns], float, or double where x is double; null: none
  bool element_bias = false;   // CUDA: bias is of type `dtype` instead
  void* out = nullptr;         // [rows, columns]; may be `x`
  DropoutMask mask;
};

struct BiasGeluBackwardParams {
  Dtype dtype = Dtype::kFloat;
  int64_t columns = 1;
  int64_t elements = 0;             // rows * columns; without a bias any number
  int64_t chunk_rows = kChunkRows;  // CUDA: rows per chunk of `partials`
  const void* grad_out = nullptr;
  const void* x = nullptr;
  const void* bias = nullptr;  // as above
  bool element_bias = false;   // as above
  void* grad_x = nullptr;
  void* partials = nullptr;  // [chunks, columns], type of bias: grad_bias of each chunk of rows; null: not wanted
  DropoutMask mask;
};

// Elements [begin, end).
VICO_CPU_KERNEL(bias_gelu, const BiasGeluParams&, int64_t begin, int64_t end)
void bias_gelu_cuda(const BiasGeluParams& p, cudaStream_t stream);
// Chunks [begin, end) of kChunkRows rows each (common/column_sum.h).
VICO_CPU_KERNEL(bias_gelu_backward, const BiasGeluBackwardParams&, int64_t begin, int64_t end)
void bias_gelu_backward_cuda(const BiasGeluBackwardParams& p, cudaStream_t stream);

}  // namespace vico
