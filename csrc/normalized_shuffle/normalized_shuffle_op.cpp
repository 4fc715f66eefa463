// The doors of normalized_shuffle and shuffle_statistics: checks, allocation, threads or launch.
#include "door/parameter.h"
#include "door/shuffle_args.h"
#include "normalized_shuffle/backward_plan.h"
#include "normalized_shuffle/normalized_shuffle.h"

namespace vico {
namespace {

constexpr const char* kChannels = "[rate * rate * channels]";

// Tokens, room for the statistics of their shuffled rows, and the kernels' parameters that point to both.
struct Forward {
  Tensor tokens, mean, rstd;
  NormalizedShuffleParams p;
};

Forward checked_forward(const Tensor& tokens_in, double eps, const GridArgs& grid,
                        const std::optional<Tensor>& tile_index, const char* op) {
  VICO_CHECK(tokens_in.dim() == 3, op, "tokens must have shape [tiles, tokens, channels], got ",
             shape_string(tokens_in));
  const Tensor tokens = with_dense_last_dim(tokens_in);
  NormalizedShuffleParams p;
  p.shape = checked_shuffle_shape(tokens, grid, tile_index, op);
  p.dtype = float_dtype(tokens, "tokens", op);
  VICO_CHECK(eps >= 0, op, "eps must not be negative, got ", eps);
  const ScalarType sum_type = accumulate_type(p.dtype);
  Tensor mean = make_tensor(tokens, {p.shape.selected, p.shape.out_tokens()}, sum_type);
  Tensor rstd = make_tensor(tokens, {p.shape.selected, p.shape.out_tokens()}, sum_type);
  p.eps = eps;
  p.tokens = tokens.const_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  return {tokens, mean, rstd, p};
}

void run_forward(const Forward& f) {
  const ShuffleShape& s = f.p.shape;
  if (s.selected == 0 || s.channels == 0) return;
  if (on_cuda(f.tokens)) {
    VICO_CUDA_CALL(normalized_shuffle, f.p, f.tokens);
  } else {
    parallel_rows(s.selected * s.out_tokens(), s.out_channels(),
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(normalized_shuffle, f.p, begin, end); });
  }
}

std::tuple<Tensor, Tensor, Tensor> normalized_shuffle_op(const Tensor& tokens, const Tensor& weight_in,
                                                         const Tensor& bias_in, double eps, int64_t grid_h,
                                                         int64_t grid_w, int64_t rate,
                                                         const std::optional<Tensor>& tile_index, int64_t skip,
                                                         bool transposed) {
  constexpr const char* kOp = "normalized_shuffle";
  Forward f = checked_forward(tokens, eps, {grid_h, grid_w, rate, skip, transposed}, tile_index, kOp);
  NormalizedShuffleParams& p = f.p;
  const ShuffleShape& s = p.shape;
  check_parameter(weight_in, f.tokens, s.out_channels(), "weight", "tokens", kChannels, kOp);
  check_parameter(bias_in, f.tokens, s.out_channels(), "bias", "tokens", kChannels, kOp);
  check_same_dtype(bias_in, weight_in, "bias", "weight", kOp);

  Tensor out = make_tensor(f.tokens, {s.selected, s.out_tokens(), s.out_channels()});
  const Tensor weight = as_parameter(weight_in, p.dtype, p.element_parameters);
  const Tensor bias = as_parameter(bias_in, p.dtype, p.element_parameters);
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.out = out.mutable_data_ptr();
  run_forward(f);
  return {out, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor> shuffle_statistics_op(const Tensor& tokens, double eps, int64_t grid_h, int64_t grid_w,
                                                 int64_t rate, const std::optional<Tensor>& tile_index, int64_t skip,
                                                 bool transposed) {
  constexpr const char* kOp = "shuffle_statistics";
  const Forward f = checked_forward(tokens, eps, {grid_h, grid_w, rate, skip, transposed}, tile_index, kOp);
  VICO_CHECK(f.p.shape.channels > 0, kOp, "tokens must have at least one channel, got shape ", shape_string(tokens));
  run_forward(f);
  return {f.mean, f.rstd};
}

// Both run the backward kernels and return the partial sums [chunks, 2 * out_channels] of grad_weight and grad_bias.
Tensor run_backward_cpu(NormalizedShuffleBackwardParams& p, const Tensor& tokens) {
  const ShuffleShape& s = p.shape;
  const TileMap map = invert_tile_index(s.tile_index, s.selected, s.tiles);
  std::vector<int64_t> used_tiles;
  for (int64_t t = 0; t < s.tiles; ++t) {
    if (map.offsets[t] < map.offsets[t + 1]) used_tiles.push_back(t);
  }
  p.tile_offsets = map.offsets.data();
  p.selected_tiles = map.selected.data();
  p.used_tiles = used_tiles.data();
  p.used = static_cast<int64_t>(used_tiles.size());
  const int64_t chunks = chunk_count(p.used * s.out_tokens());
  Tensor partials = make_partials(tokens, p.dtype, chunks, 2 * s.out_channels());
  p.partials = partials.mutable_data_ptr();
  if (p.grad_tokens) {
    parallel_rows(s.tiles, tokens.size(1) * s.channels,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(normalized_shuffle_zero_rest, p, begin, end); });
  }
  parallel_rows(chunks, kChunkRows * s.out_channels(),
                [&](int64_t begin, int64_t end) { VICO_CPU_CALL(normalized_shuffle_backward, p, begin, end); });
  return partials;
}
Tensor run_backward_cuda(NormalizedShuffleBackwardParams& p, const Tensor& tokens,
                         const std::optional<Tensor>& tile_index) {
  const ShuffleShape& s = p.shape;
  const std::optional<Tensor> map = device_tile_map(tile_index, s.tiles);
  p.tile_offsets = map ? map->const_data_ptr<int64_t>() : nullptr;
  p.selected_tiles = map ? p.tile_offsets + s.tiles + 1 : nullptr;
  const NormalizedShuffleBackwardPlan plan = plan_normalized_shuffle_backward(p);
  Tensor partials = make_partials(tokens, p.dtype, plan.chunks, 2 * s.out_channels());
  Tensor row_means = make_tensor(tokens, {plan.row_means}, accumulate_type(p.dtype));
  p.partials = partials.mutable_data_ptr();
  p.row_means = row_means.mutable_data_ptr();
  VICO_CUDA_CALL(normalized_shuffle_backward, p, tokens);
  return partials;
}

std::tuple<Tensor, Tensor, Tensor> normalized_shuffle_backward_op(const Tensor& grad_out_in, const Tensor& tokens_in,
                                                                  const Tensor& weight_in, const Tensor& mean_in,
                                                                  const Tensor& rstd_in, int64_t grid_h, int64_t grid_w,
                                                                  int64_t rate, const std::optional<Tensor>& tile_index,
                                                                  int64_t skip, bool transposed,
                                                                  bool need_grad_tokens) {
  constexpr const char* kOp = "normalized_shuffle_backward";
  VICO_CHECK(tokens_in.dim() == 3, kOp, "tokens must have shape [tiles, tokens, channels], got ",
             shape_string(tokens_in));
  const Tensor tokens = with_dense_last_dim(tokens_in);
  NormalizedShuffleBackwardParams p;
  p.shape = checked_shuffle_shape(tokens, {grid_h, grid_w, rate, skip, transposed}, tile_index, kOp);
  const ShuffleShape& s = p.shape;
  p.dtype = float_dtype(tokens, "tokens", kOp);
  const ScalarType sum_type = accumulate_type(p.dtype);
  const char* sum_name = p.dtype == Dtype::kDouble ? "float64" : "float32";
  check_device(grad_out_in, tokens, "grad_out", "tokens", kOp);
  check_same_dtype(grad_out_in, tokens, "grad_out", "tokens", kOp);
  check_shape(grad_out_in, {s.selected, s.out_tokens(), s.out_channels()}, "grad_out",
              "[selected, out_tokens, rate * rate * channels]", kOp);
  check_parameter(weight_in, tokens, s.out_channels(), "weight", "tokens", kChannels, kOp);
  for (const auto& [statistic, name] : {std::pair{&mean_in, "mean"}, std::pair{&rstd_in, "rstd"}}) {
    check_device(*statistic, tokens, name, "tokens", kOp);
    check_dtype(*statistic, sum_type, name, sum_name, kOp);
    check_shape(*statistic, {s.selected, s.out_tokens()}, name, "[selected, out_tokens]", kOp);
  }

  const int64_t channels = s.out_channels();
  Tensor grad_weight = make_tensor(weight_in, {channels}), grad_bias = make_tensor(weight_in, {channels});
  Tensor grad_tokens =
      need_grad_tokens ? make_tensor(tokens, {s.tiles, tokens.size(1), s.channels}) : make_tensor(tokens, {0});
  const Tensor grad_out = to_contiguous(grad_out_in);
  const Tensor weight = as_parameter(weight_in, p.dtype, p.element_parameters);
  const Tensor mean = to_contiguous(mean_in), rstd = to_contiguous(rstd_in);
  p.grad_out = grad_out.const_data_ptr();
  p.tokens = tokens.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.mean = mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.grad_tokens = grad_tokens.numel() ? grad_tokens.mutable_data_ptr() : nullptr;
  const Tensor partials = on_cuda(tokens) ? run_backward_cuda(p, tokens, tile_index) : run_backward_cpu(p, tokens);
  combine_partials(partials, 0, grad_weight);
  combine_partials(partials, channels, grad_bias);
  return {grad_tokens, grad_weight, grad_bias};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("normalized_shuffle", TORCH_BOX(&vico::normalized_shuffle_op));
  m.impl("shuffle_statistics", TORCH_BOX(&vico::shuffle_statistics_op));
  m.impl("normalized_shuffle_backward", TORCH_BOX(&vico::normalized_shuffle_backward_op));
}
