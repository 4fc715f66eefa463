// The layers of router_gate, as launches of kernels of other rooms: three a block and two at the end.
#include "common/layer_norm.h"
#include "router_gate/router_gate.h"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

void linear(const RouterGateParams& p, const void* x, int64_t depth, const void* weight, const void* bias,
            int64_t features, bool gelu, void* y, cudaStream_t stream) {
  SkinnyLinearParams layer = dense_layer(p.dtype, x, p.rows, depth, weight, bias, features, y);
  layer.gelu = gelu;
  layer.chained = x != p.x;  // the first kernel's x is the call's
  skinny_linear_cuda(layer, stream);
}

void norm(const RouterGateParams& p, const void* x, const void* residual, const void* weight, const void* bias, void* y,
          cudaStream_t stream) {
  LayerNormParams n;
  n.dtype = p.dtype;
  n.rows = p.rows;
  n.channels = p.channels;
  n.x = x;
  n.residual = residual;
  n.weight = weight;
  n.bias = bias;
  n.eps = p.eps;
  n.y = y;
  n.chained = x != p.x;
  layer_norm_cuda(n, stream);
}

}  // namespace

void router_gate_cuda(const RouterGateParams& p, cudaStream_t stream) {
  const void* x = p.x;
  for (int64_t i = 0; i < p.block_count; ++i) {
    const RouterGateBlock& b = p.blocks[i];
    linear(p, x, p.channels, b.up_weight, b.up_bias, b.hidden, true, p.hidden, stream);
    linear(p, p.hidden, b.hidden, b.down_weight, b.down_bias, p.channels, false, p.update, stream);
    norm(p, p.update, x, b.norm_weight, b.norm_bias, p.current, stream);
    x = p.current;
  }
  norm(p, x, nullptr, p.norm_weight, p.norm_bias, p.update, stream);
  linear(p, p.update, p.channels, p.weight, p.bias, p.classes, false, p.logits, stream);
}

}  // namespace vico
