// What the fused kernel of attention_pool leaves of a chunk, for the combine kernel, and what its kernels share.
#pragma once

#include <limits>

#include "attention_pool/attention_pool.h"
#include "common/pack.cuh"

namespace vico {

// The lowest finite number and not -inf: scores of -inf then weigh 0 instead of exp(-inf + inf).
template <class A>
constexpr A kNoScore = std::numeric_limits<A>::lowest();

constexpr int kPoolHeads = static_cast<int>(AttentionPoolShape::kCudaHeads);

VICO_DEVICE float exp_of(float x) { return expf(x); }
VICO_DEVICE double exp_of(double x) { return exp(x); }
VICO_DEVICE float log_of(float x) { return logf(x); }
VICO_DEVICE double log_of(double x) { return log(x); }

// What one head group of a chunk leaves: for each head the tokens' mean under its weights in the element type (means of
// tokens cannot overflow), and in float the maximum its weights are relative to, their sum, and their sum as the tensor
// cores saw them.
template <class T>
struct PoolPartial {
  T* means;           // [kPoolHeads, padded channels]
  float* statistics;  // [3, kPoolHeads]

  // `chunk` of all tiles' chunks.
  VICO_DEVICE PoolPartial(const AttentionPoolShape& s, void* all, int64_t group, int64_t chunk) {
    float* mine = static_cast<float*>(all) + (group * s.tiles * s.cuda_chunks() + chunk) * s.cuda_partial_size();
    means = reinterpret_cast<T*>(mine);
    statistics = mine + kPoolHeads * s.cuda_padded_channels() / 2;
  }
};

}  // namespace vico
