// The door of shuffled_projection: the projection kernels with LayerNorm folded in and the ViT's tokens read through
// their pixel-shuffled view, for 16-bit tensors on CUDA; for all else the same formula in the sums' type, of
// pixel_shuffle and torch's operators.
#include "door/shuffle_args.h"
#include "projection/group_args.h"

namespace vico {
namespace {

constexpr const char* kOp = "shuffled_projection";

// The layer that reads the tokens.
struct ViewArgs {
  const Tensor &tokens, &mean, &rstd, &weight, &gain_sum;
  const std::optional<Tensor>& bias;
};

void check_view(const ViewArgs& v, const ShuffleShape& s) {
  const Dtype dtype = float_dtype(v.tokens, "tokens", kOp);
  const ScalarType sum_type = accumulate_type(dtype);
  const char* sum_name = dtype == Dtype::kDouble ? "float64" : "float32";
  for (const auto& [statistic, name] : {std::pair{&v.mean, "mean"}, std::pair{&v.rstd, "rstd"}}) {
    check_device(*statistic, v.tokens, name, "tokens", kOp);
    check_dtype(*statistic, sum_type, name, sum_name, kOp);
    check_shape(*statistic, {s.selected, s.out_tokens()}, name, "[selected, out_tokens]", kOp);
  }
  check_device(v.weight, v.tokens, "weight", "tokens", kOp);
  check_same_dtype(v.weight, v.tokens, "weight", "tokens", kOp);
  check_shape(v.weight, {-1, s.out_channels()}, "weight", "[out features, rate * rate * channels]", kOp);
  check_device(v.gain_sum, v.tokens, "gain_sum", "tokens", kOp);
  check_dtype(v.gain_sum, sum_type, "gain_sum", sum_name, kOp);
  check_shape(v.gain_sum, {v.weight.size(0)}, "gain_sum", "[out features]", kOp);
  if (v.bias) check_parameter(*v.bias, v.tokens, v.weight.size(0), "bias", "tokens", "[out features]", kOp);
}

Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor composed_view(const ViewArgs& v, const GridArgs& g, const std::optional<Tensor>& tile_index, bool gelu) {
  using torch::stable::unsqueeze;
  const Dtype dtype = float_dtype(v.tokens, "tokens", kOp);
  const std::optional<Tensor> none;
  const Tensor rows =
      call_op("vico::pixel_shuffle", v.tokens, g.grid_h, g.grid_w, g.rate, tile_index, g.skip, g.transposed);
  const Tensor product = call_op("aten::linear", as_accumulate(rows, dtype), as_accumulate(v.weight, dtype), none);
  const Tensor shift = torch::stable::matmul(unsqueeze(v.mean, -1), unsqueeze(v.gain_sum, 0));
  Tensor z = multiply(torch::stable::subtract(product, shift), unsqueeze(v.rstd, -1));
  const std::optional<Tensor> bias = as_accumulate(v.bias, dtype);
  if (gelu) {
    z = call_op("vico::bias_gelu", z, bias, none, 0.0);
  } else if (bias) {
    z = torch::stable::subtract(z, *bias, -1);
  }
  return torch::stable::to(z, v.tokens.scalar_type());
}

// One launch for the view, and for the rows of `x` if there are any.
void run_kernels(const ViewArgs& v, const ShuffleShape& s, const GroupArgs* x, bool gelu, Tensor& out, Tensor& x_out) {
  const Tensor weight = to_contiguous(v.weight), gain_sum = to_contiguous(v.gain_sum);
  const Tensor mean = to_contiguous(v.mean), rstd = to_contiguous(v.rstd);
  const std::optional<Tensor> bias = as_accumulate(v.bias, Dtype::kFloat);
  ProjectionParams p;
  p.dtype = kernel_dtype(v.tokens);
  ProjectionGroup& g = p.group[0];
  g.rows = s.selected * s.out_tokens();
  g.columns = weight.size(0);
  g.depth = s.out_channels();
  g.a = v.tokens.const_data_ptr();
  g.shuffled = true;
  g.shape = s;
  g.weight = weight.const_data_ptr();
  g.bias = static_cast<const float*>(data_or_null(bias));
  g.mean = mean.const_data_ptr<float>();
  g.rstd = rstd.const_data_ptr<float>();
  g.gain_sum = gain_sum.const_data_ptr<float>();
  g.out = out.mutable_data_ptr();
  g.out_stride = g.columns;
  g.out_rows = g.rows;
  g.gelu = gelu;
  std::optional<KernelGroup> kept;  // until the kernel has been launched
  if (x) {
    p.group[1] = kept.emplace(*x).group;
    p.group[1].gelu = gelu;
    p.group[1].out = x_out.mutable_data_ptr();
    p.group[1].out_rows = p.group[1].rows;
  }
  VICO_CUDA_CALL(projection, p, v.tokens);
}

std::tuple<Tensor, Tensor> shuffled_projection_op(const Tensor& tokens_in, const Tensor& mean, const Tensor& rstd,
                                                  const Tensor& weight, const Tensor& gain_sum,
                                                  const std::optional<Tensor>& bias, int64_t grid_h, int64_t grid_w,
                                                  int64_t rate, const std::optional<Tensor>& tile_index, int64_t skip,
                                                  bool transposed, bool gelu, const std::optional<Tensor>& x,
                                                  const std::optional<Tensor>& x_weight,
                                                  const std::optional<Tensor>& x_bias) {
  VICO_CHECK(tokens_in.dim() == 3, kOp, "tokens must have shape [tiles, tokens, channels], got ",
             shape_string(tokens_in));
  const Tensor tokens = with_dense_last_dim(tokens_in);
  const GridArgs grid{grid_h, grid_w, rate, skip, transposed};
  const ShuffleShape s = checked_shuffle_shape(tokens, grid, tile_index, kOp);
  const ViewArgs view{tokens, mean, rstd, weight, gain_sum, bias};
  check_view(view, s);
  const GroupArgs rows{x, x_weight, x_bias, "x", "x_weight", "x_bias"};
  if (x) check_group(rows, tokens, "tokens", kOp);
  VICO_CHECK(x || !x_weight, kOp, "x_weight needs x, got None");

  if (!has_kernel(tokens)) {
    Tensor x_out = make_tensor(tokens, {0});
    if (x) x_out = torch_linear(rows, !gelu);
    if (x && gelu) x_out = call_op("vico::bias_gelu", x_out, x_bias, std::optional<Tensor>(), 0.0);
    return {composed_view(view, grid, tile_index, gelu), x_out};
  }
  std::vector<int64_t> x_shape;
  for (int64_t d = 0; x && d + 1 < x->dim(); ++d) x_shape.push_back(x->size(d));
  x_shape.push_back(x ? x_weight->size(0) : 0);
  Tensor out = make_tensor(tokens, {s.selected, s.out_tokens(), weight.size(0)});
  Tensor x_out = torch::stable::new_empty(tokens, x_shape);
  run_kernels(view, s, x ? &rows : nullptr, gelu, out, x_out);
  return {out, x_out};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) { m.impl("shuffled_projection", TORCH_BOX(&vico::shuffled_projection_op)); }
