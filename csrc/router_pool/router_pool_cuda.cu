// The rounds of router_pool, as launches of kernels of other rooms: seven a round.
#include <cmath>

#include "common/layer_norm.h"
#include "common/replay.h"
#include "router_pool/router_pool.h"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

const void* element(const void* p, int64_t i, Dtype dtype) {
  return static_cast<const char*>(p) + i * element_size(dtype);
}

// x [rows, channels] -> x' [tiles, channels]. `chained`: not the first kernel.
void router_round(const RouterPoolParams& p, const RouterAttention& a, const void* x, int64_t rows, void* out,
                  bool chained, cudaStream_t stream) {
  const AttentionPoolShape& s = p.shape;
  const int64_t channels = s.channels, head = channels / s.heads;

  SkinnyLinearParams query = dense_layer(s.dtype, x, rows, channels, a.in_weight, a.in_bias, channels, p.rows[0]);
  query.scale = 1 / std::sqrt(static_cast<double>(head));
  query.chained = chained;
  skinny_linear_cuda(query, stream);

  SkinnyLinearParams keys;
  keys.dtype = s.dtype;
  keys.rows = rows;
  keys.groups = s.heads;
  keys.features = channels;
  keys.depth = head;
  keys.x = p.rows[0];
  keys.weight = element(a.in_weight, channels * channels, s.dtype);
  keys.group_stride = head * channels;
  keys.feature_stride = 1;
  keys.depth_stride = channels;
  keys.y = p.heads[0];
  keys.chained = true;
  skinny_linear_cuda(keys, stream);

  AttentionPoolParams pool;
  pool.shape = s;
  pool.in.tokens = p.tokens;
  pool.in.tile_stride = p.tile_stride;
  pool.in.token_stride = p.token_stride;
  pool.in.query = p.heads[0];
  pool.in.query_stride = rows == 1 ? 0 : s.heads * channels;
  pool.in.query_head_stride = channels;
  pool.context = p.heads[1];
  pool.lse = p.lse;
  pool.partial = p.partial;
  pool.chained = true;
  attention_pool_cuda(pool, stream);

  SkinnyLinearParams values;
  values.dtype = s.dtype;
  values.rows = s.tiles;
  values.groups = s.heads;
  values.features = head;
  values.depth = channels;
  values.x = p.heads[1];
  values.weight = element(a.in_weight, 2 * channels * channels, s.dtype);
  values.group_stride = head * channels;
  values.feature_stride = channels;
  values.depth_stride = 1;
  values.bias = element(a.in_bias, 2 * channels, s.dtype);
  values.y = p.rows[0];
  values.chained = true;
  skinny_linear_cuda(values, stream);

  SkinnyLinearParams last =
      dense_layer(s.dtype, p.rows[0], s.tiles, channels, a.out_weight, a.out_bias, channels, p.rows[1]);
  last.chained = true;
  last.y = p.rows[1];
  skinny_linear_cuda(last, stream);

  LayerNormParams norm;
  norm.dtype = s.dtype;
  norm.rows = s.tiles;
  norm.channels = channels;
  norm.x = p.rows[1];
  norm.weight = a.norm_weight;
  norm.bias = a.norm_bias;
  norm.eps = p.eps;
  norm.y = out;
  norm.chained = true;
  layer_norm_cuda(norm, stream);
}

LaunchKey key_of(const RouterPoolParams& p) {
  const AttentionPoolShape& s = p.shape;
  LaunchKey key(&router_pool_cuda, s.dtype, s.tiles, s.count, s.channels, s.heads, s.cuda_chunk, p.tokens,
                p.tile_stride, p.token_stride, p.query_token, p.eps, p.pooled, p.rows[0], p.rows[1], p.heads[0],
                p.heads[1], p.lse, p.partial);
  for (const RouterAttention* a : {&p.first, &p.later}) {
    key.add(a->in_weight, a->in_bias, a->out_weight, a->out_bias, a->norm_weight, a->norm_bias);
  }
  return key;
}

}  // namespace

void router_pool_cuda(const RouterPoolParams& p, cudaStream_t stream) {
  if (p.shape.tiles == 0) return;
  replayed(key_of(p), stream, [&](cudaStream_t s) {
    router_round(p, p.first, p.query_token, 1, p.pooled, false, s);
    for (int round = 2; round <= 4; ++round) router_round(p, p.later, p.pooled, p.shape.tiles, p.pooled, true, s);
  });
}

}  // namespace vico
