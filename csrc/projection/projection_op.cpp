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

Tensor packed_projection_op(const Tensor& full_in, const Tensor& full_weight, const std::optional<Tensor>& full_bias,
                            const Tensor& compressed_in, const Tensor& compressed_weight,
                            const std::optional<Tensor>& compressed_bias, const Tensor& cu_tokens,
                            const Tensor& order) {
  constexpr const char* kOp = "packed_projection";
  const std::optional<Tensor> full = full_in, compressed = compressed_in;
  const std::optional<Tensor> weights[2] = {full_weight, compressed_weight};
  const GroupArgs groups[2] = {
      {full, weights[0], full_bias, "full", "full_weight", "full_bias"},
      {compressed, weights[1], compressed_bias, "compressed", "compressed_weight", "compressed_bias"}};
  check_kernels(full_in, kOp);
  for (const GroupArgs& g : groups) {
    check_group(g, full_in, "full", kOp);
    check_shape(*g.x, {-1, -1, -1}, g.x_name, "[tiles, tokens, in features]", kOp);
  }
  check_shape(compressed_weight, {full_weight.size(0), -1}, "compressed_weight",
              "[out features of full_weight, in features]", kOp);
  PackShape plan;
  plan.full_tiles = full_in.size(0);
  plan.full_tokens = full_in.size(1);
  plan.compressed_tiles = compressed_in.size(0);
  plan.compressed_tokens = compressed_in.size(1);
  check_plan(cu_tokens, order, full_in, "full", plan, kOp);
  if (!has_kernel(full_in)) {
    return call_op("vico::pack_tokens", torch_linear(groups[0], false), torch_linear(groups[1], false), full_bias,
                   compressed_bias, cu_tokens, order);
  }
  const KernelGroup kept[2] = {KernelGroup(groups[0]), KernelGroup(groups[1])};
  Tensor out = make_tensor(full_in, {plan.rows(), full_weight.size(0)});
  ProjectionParams p;
  p.dtype = kernel_dtype(full_in);
  for (int i = 0; i < 2; ++i) {
    ProjectionGroup& g = p.group[i] = kept[i].group;
    g.out = out.mutable_data_ptr();
    g.out_rows = plan.rows();
    g.out_row = plan.cu_tokens;
    g.out_tile = plan.order + (i == 0 ? 0 : plan.full_tiles);
    g.out_tiles = plan.full_tiles + plan.compressed_tiles;
    g.tile_rows = std::max<int64_t>(1, groups[i].x->size(1));
  }
  VICO_CUDA_CALL(projection, p, full_in);
  return out;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("projection", TORCH_BOX(&vico::projection_op));
  m.impl("packed_projection", TORCH_BOX(&vico::packed_projection_op));
}
