// The door of projection: checks, allocation, and the way of the products: the own kernels for 16-bit tensors on CUDA;
// for all else torch's BLAS, bias_gelu and pack_tokens.
#include "bias_gelu/dropout_args.h"
#include "pack_tokens/plan_args.h"
#include "projection/group_args.h"

namespace vico {
namespace {

std::tuple<Tensor, Tensor> projection_op(const std::optional<Tensor>& full, const std::optional<Tensor>& full_weight,
                                         const std::optional<Tensor>& full_bias,
                                         const std::optional<Tensor>& compressed,
                                         const std::optional<Tensor>& compressed_weight,
                                         const std::optional<Tensor>& compressed_bias, bool gelu,
                                         const std::optional<Tensor>& seed, double dropout) {
  constexpr const char* kOp = "projection";
  VICO_CHECK(full || compressed, kOp, "full or compressed must be given, got None for both");
  const GroupArgs groups[2] = {
      {full, full_weight, full_bias, "full", "full_weight", "full_bias"},
      {compressed, compressed_weight, compressed_bias, "compressed", "compressed_weight", "compressed_bias"}};
  const GroupArgs& first = full ? groups[0] : groups[1];
  const Tensor& like = *first.x;
  check_kernels(like, kOp);
  for (const GroupArgs& g : groups) {
    if (g.x) check_group(g, like, first.x_name, kOp);
  }
  VICO_CHECK(gelu || dropout == 0, kOp, "dropout follows GELU alone, got dropout ", dropout, " without gelu");
  const DropoutMask mask = dropout_mask(like, first.x_name, seed, dropout, kOp);

  Tensor outs[2] = {make_tensor(like, {0}), make_tensor(like, {0})};
  ProjectionParams p;
  std::vector<KernelGroup> kept;  // until the kernel has been launched
  for (int i = 0; i < 2; ++i) {
    const GroupArgs& g = groups[i];
    if (!g.x) continue;
    if (!has_kernel(like)) {
      outs[i] = torch_linear(g, !gelu);
      const bool drops = i == 1 && mask.active;
      if (gelu) outs[i] = call_op("vico::bias_gelu", outs[i], g.bias, seed, drops ? dropout : 0.0);
      continue;
    }
    kept.emplace_back(g);
    p.group[i] = kept.back().group;
    std::vector<int64_t> shape;
    for (int64_t d = 0; d + 1 < g.x->dim(); ++d) shape.push_back(g.x->size(d));
    shape.push_back(p.group[i].columns);
    outs[i] = torch::stable::new_empty(like, shape);
    p.group[i].gelu = gelu;
    if (i == 1) p.group[i].mask = mask;
    p.group[i].out = outs[i].mutable_data_ptr();
    p.group[i].out_rows = p.group[i].rows;
  }
  if (has_kernel(like)) {
    p.dtype = kernel_dtype(like);
    VICO_CUDA_CALL(projection, p, like);
  }
  return {outs[0], outs[1]};
}

// The last layer of both connectors, whose rows go to places of their own.
struct LastLayer {
  const std::optional<Tensor> tensors[6];  // as the ops take them: x, weight and bias of full, then of compressed
  const GroupArgs groups[2] = {
      {tensors[0], tensors[1], tensors[2], "full", "full_weight", "full_bias"},
      {tensors[3], tensors[4], tensors[5], "compressed", "compressed_weight", "compressed_bias"}};

  const Tensor& full() const { return *tensors[0]; }
  int64_t columns() const { return tensors[1]->size(0); }
};

// The tiles and tokens of its rows; where they go is not checked yet.
PackShape check_last_layer(const LastLayer& layer, const char* op) {
  check_kernels(layer.full(), op);
  for (const GroupArgs& g : layer.groups) {
    check_group(g, layer.full(), "full", op);
    check_shape(*g.x, {-1, -1, -1}, g.x_name, "[tiles, tokens, in features]", op);
  }
  check_shape(*layer.groups[1].weight, {layer.columns(), -1}, "compressed_weight",
              "[out features of full_weight, in features]", op);
  PackShape shape;
  shape.full_tiles = layer.full().size(0);
  shape.full_tokens = layer.full().size(1);
  shape.compressed_tiles = layer.groups[1].x->size(0);
  shape.compressed_tokens = layer.groups[1].x->size(1);
  shape.hidden = layer.columns();
  return shape;
}

// By the own kernels, to places that have been checked.
void project_rows(const LastLayer& layer, const PackShape& shape, Tensor& out) {
  const KernelGroup kept[2] = {KernelGroup(layer.groups[0]), KernelGroup(layer.groups[1])};
  ProjectionParams p;
  p.dtype = kernel_dtype(out);
  for (int i = 0; i < 2; ++i) {
    ProjectionGroup& g = p.group[i] = kept[i].group;
    g.out = out.mutable_data_ptr();
    g.out_stride = out.stride(0);
    g.out_rows = out.size(0);
    g.out_row = shape.first_row;
    g.out_tile = shape.order + (i == 0 ? 0 : shape.full_tiles);
    g.out_tiles = shape.tiles();
    g.tile_rows = std::max<int64_t>(1, layer.groups[i].x->size(1));
  }
  VICO_CUDA_CALL(projection, p, out);
}

Tensor packed_projection_op(const Tensor& full, const Tensor& full_weight, const std::optional<Tensor>& full_bias,
                            const Tensor& compressed, const Tensor& compressed_weight,
                            const std::optional<Tensor>& compressed_bias, const Tensor& cu_tokens,
                            const Tensor& order) {
  constexpr const char* kOp = "packed_projection";
  const LastLayer layer{{full, full_weight, full_bias, compressed, compressed_weight, compressed_bias}};
  PackShape shape = check_last_layer(layer, kOp);
  check_plan(cu_tokens, order, full, "full", shape, kOp);
  if (!has_kernel(full)) {
    return call_op("vico::pack_tokens", torch_linear(layer.groups[0], false), torch_linear(layer.groups[1], false),
                   full_bias, compressed_bias, cu_tokens, order);
  }
  Tensor out = make_tensor(full, {shape.rows(), shape.hidden});
  project_rows(layer, shape, out);
  return out;
}

void packed_projection_in_place_op(Tensor out, const Tensor& full, const Tensor& full_weight,
                                   const std::optional<Tensor>& full_bias, const Tensor& compressed,
                                   const Tensor& compressed_weight, const std::optional<Tensor>& compressed_bias,
                                   const Tensor& first_row, const Tensor& order) {
  constexpr const char* kOp = "packed_projection_";
  const LastLayer layer{{full, full_weight, full_bias, compressed, compressed_weight, compressed_bias}};
  PackShape shape = check_last_layer(layer, kOp);
  check_out(out, shape.hidden, full, "full", kOp);
  for (const GroupArgs& g : layer.groups) {
    check_apart(out, {{g.x, g.x_name}, {g.weight, g.weight_name}, {g.bias, g.bias_name}}, kOp);
  }
  check_places(first_row, order, out, full, "full", shape, kOp);
  if (has_kernel(full)) return project_rows(layer, shape, out);
  dispatch_op("vico::pack_tokens_", out, torch_linear(layer.groups[0], false), torch_linear(layer.groups[1], false),
              full_bias, compressed_bias, first_row, order);
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("projection", TORCH_BOX(&vico::projection_op));
  m.impl("packed_projection", TORCH_BOX(&vico::packed_projection_op));
  m.impl("packed_projection_", TORCH_BOX(&vico::packed_projection_in_place_op));
}
