// router_pool: four rounds of one query attending to a tile's tokens, as one call without gradients. Each round is
//
//   q = (W_q x + b_q) / sqrt(d)   keys[h] = W_k[h]^T q[h]   context = attention_pool(tokens, keys)
//   x = LayerNorm(W_out concat_h(W_v[h] context[h] + b_v[h]) + b_out)
//
// with d = channels / heads; x begins as the learned query, the same for all tiles. Round 1 has weights of its own,
// rounds 2 to 4 share theirs.
#pragma once

#include "attention_pool/attention_pool.h"

namespace vico {

// Contiguous, of the tokens' dtype. in_weight [3 channels, channels] holds W_q, W_k and W_v, in_bias their biases.
struct RouterAttention {
  const void *in_weight = nullptr, *in_bias = nullptr;
  const void *out_weight = nullptr, *out_bias = nullptr;    // [channels, channels], [channels]
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // [channels]
};

struct RouterPoolParams {
  AttentionPoolShape shape;
  const void* tokens = nullptr;  // [tiles, count, channels], from the first token that is pooled
  int64_t tile_stride = 0, token_stride = 0;
  const void* query_token = nullptr;  // [1, channels]
  RouterAttention first, later;
  double eps = 0;
  void* pooled = nullptr;   // [tiles, channels], contiguous, as are the work areas
  void* rows[2] = {};       // [tiles, channels]
  void* heads[2] = {};      // [tiles, heads, channels]
  void* lse = nullptr;      // [tiles, heads], accumulate type
  void* partial = nullptr;  // as in AttentionPoolParams
};

void router_pool_cuda(const RouterPoolParams& params, cudaStream_t stream);

}  // namespace vico
