// The layers of router_gate, as launches of kernels of other rooms, three a block and two at the end, and the softmax.
#include <cmath>

#include "common/device.cuh"
#include "common/layer_norm.h"
#include "common/pack.cuh"
#include "common/replay.h"
#include "router_gate/router_gate.h"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

constexpr unsigned kClassThreads = 128;

// probability[row] = softmax(logits[row])[0]. A thread takes a row.
template <class T>
__global__ void __launch_bounds__(kClassThreads)
    first_class_kernel(const T* logits, accumulate_t<T>* probability, int64_t rows, int64_t classes) {
  using A = accumulate_t<T>;
  ptx::let_next_kernel_begin();
  ptx::wait_for_earlier_kernels();
  const int64_t row = int64_t{blockIdx.x} * kClassThreads + threadIdx.x;
  if (row >= rows) return;
  const T* mine = logits + row * classes;
  const A first = value_of(mine[0]);
  A maximum = first, total = 0;
  for (int64_t i = 1; i < classes; ++i) maximum = max(maximum, value_of(mine[i]));
  for (int64_t i = 0; i < classes; ++i) total += static_cast<A>(exp(value_of(mine[i]) - maximum));
  probability[row] = static_cast<A>(exp(first - maximum)) / total;
}

SkinnyLinearParams layer(const RouterGateParams& p, const void* x, int64_t depth, const void* weight, const void* bias,
                         int64_t features, void* y) {
  SkinnyLinearParams layer = dense_layer(p.dtype, x, p.rows, depth, weight, bias, features, y);
  layer.chained = x != p.x;  // the first kernel's x is the call's
  return layer;
}

LayerNormParams norm(const RouterGateParams& p, const void* x, const void* weight, const void* bias, void* y) {
  LayerNormParams n;
  n.dtype = p.dtype;
  n.rows = p.rows;
  n.channels = p.channels;
  n.x = x;
  n.weight = weight;
  n.bias = bias;
  n.eps = p.eps;
  n.y = y;
  n.chained = x != p.x;
  return n;
}

void launch_layers(const RouterGateParams& p, cudaStream_t stream) {
  const void* x = p.x;
  for (int64_t i = 0; i < p.block_count; ++i) {
    const RouterGateBlock& b = p.blocks[i];
    SkinnyLinearParams up = layer(p, x, p.channels, b.up_weight, b.up_bias, b.hidden, p.hidden);
    up.gelu = true;
    skinny_linear_cuda(up, stream);

    SkinnyLinearParams down = layer(p, p.hidden, b.hidden, b.down_weight, b.down_bias, p.channels, p.update);
    LayerNormParams after = norm(p, p.update, b.norm_weight, b.norm_bias, p.current);
    after.residual = x;
    if (const int64_t parts = depth_parts(down); parts > 1) {
      down.parts = after.parts = parts;
      down.bias = nullptr;
      after.part_bias = b.down_bias;
      down.y = p.parts;
      after.x = p.parts;
    }
    skinny_linear_cuda(down, stream);
    layer_norm_cuda(after, stream);
    x = p.current;
  }
  layer_norm_cuda(norm(p, x, p.norm_weight, p.norm_bias, p.update), stream);
  skinny_linear_cuda(layer(p, p.update, p.channels, p.weight, p.bias, p.classes, p.logits), stream);
  if (p.probability == nullptr) return;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto blocks = static_cast<unsigned>((p.rows + kClassThreads - 1) / kClassThreads);
    launch_early(true, first_class_kernel<T>, dim3(blocks), dim3(kClassThreads), 0, stream,
                 static_cast<const T*>(p.logits), static_cast<accumulate_t<T>*>(p.probability), p.rows, p.classes);
  });
}

LaunchKey key_of(const RouterGateParams& p) {
  LaunchKey key(&router_gate_cuda, p.dtype, p.rows, p.channels, p.classes, p.x, p.block_count, p.norm_weight,
                p.norm_bias, p.weight, p.bias, p.eps, p.logits, p.probability, p.hidden, p.update, p.parts, p.current);
  for (int64_t i = 0; i < p.block_count; ++i) {
    const RouterGateBlock& b = p.blocks[i];
    key.add(b.up_weight, b.up_bias, b.down_weight, b.down_bias, b.norm_weight, b.norm_bias, b.hidden);
  }
  return key;
}

}  // namespace

void router_gate_cuda(const RouterGateParams& p, cudaStream_t stream) {
  replayed(key_of(p), stream, [&](cudaStream_t s) { launch_layers(p, s); });
}

}  // namespace vico
