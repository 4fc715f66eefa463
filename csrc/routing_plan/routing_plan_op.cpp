// The door of routing_plan: checks, allocation, threads or launch, and torch's own interpolation between order
// statistics.
#include <array>

#include "door/door.h"
#include "routing_plan/routing_plan.h"

namespace vico {
namespace {

Tensor checked_vector(const Tensor& p, const char* op) {
  check_kernels(p, op);
  float_dtype(p, "p", op);
  check_shape(p, {-1}, "p", "[tiles]", op);
  return to_contiguous(p);
}

// `p` as float32 or float64 values, contiguous, in memory of its own. A bad value fails: on the CPU the first one here,
// on CUDA in the kernel.
Tensor widen_probabilities_checked(const Tensor& p, bool bounded, const char* op) {
  const Dtype dtype = float_dtype(p, "p", op);
  Tensor out = make_tensor(p, {p.numel()}, accumulate_type(dtype));
  int64_t bad = -1;
  const ProbabilityParams params{dtype, bounded, p.numel(), p.const_data_ptr(), out.mutable_data_ptr(), &bad};
  if (on_cuda(p)) {
    VICO_CUDA_CALL(widen_probabilities, params, p);
    return out;
  }
  VICO_CPU_CALL(widen_probabilities, params, 0, p.numel());
  if (bad < 0) return out;
  const double value = dtype == Dtype::kDouble ? out.const_data_ptr<double>()[bad] : out.const_data_ptr<float>()[bad];
  VICO_CHECK(value == value, op, "p must hold probabilities, got NaN for tile ", bad,
             ": look for NaN or infinity in the ViT's tokens or the router's weights");
  detail::fail(op, "p must hold probabilities in [0, 1], got ", value, " for tile ", bad,
               ": pass the router's softmax, not its logits");
}

// What the deciding kernels read: on CUDA the values as they are, which they widen and check on the way.
Tensor decision_values(const Tensor& p, const char* op) {
  return on_cuda(p) ? p : widen_probabilities_checked(p, false, op);
}

Tensor checked_probabilities_op(const Tensor& p) {
  constexpr const char* kOp = "checked_probabilities";
  return widen_probabilities_checked(checked_vector(p, kOp), true, kOp);
}

// below + weight * (above - below). NOTE: torch's own kernel, because whether it fuses the multiplication into the
// addition depends on the machine, and torch.quantile's decisions at ties depend on that.
Tensor interpolate(const Tensor& below, const Tensor& above, const Tensor& weight) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(below), torch::stable::detail::from(above),
                                    torch::stable::detail::from(weight)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::lerp", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int64_t checked_segments(const std::optional<Tensor>& cu_tiles, const Tensor& p, const char* op) {
  if (!cu_tiles) return 1;
  const int64_t tiles = p.numel();
  check_device(*cu_tiles, p, "cu_tiles", "p", op);
  check_dtype(*cu_tiles, ScalarType::Long, "cu_tiles", "int64", op);
  check_shape(*cu_tiles, {-1}, "cu_tiles", "[segments + 1]", op);
  VICO_CHECK(cu_tiles->is_contiguous(), op, "cu_tiles must be contiguous");
  const int64_t segments = cu_tiles->numel() - 1;
  VICO_CHECK(segments >= 0, op, "cu_tiles must have shape [segments + 1], got [0]");
  if (on_cuda(p)) {
    VICO_CHECK(segments > 0 || tiles == 0, op, "cu_tiles must end with the number of tiles (", tiles,
               "), got no segments");
    return segments;  // the kernel checks the values
  }
  const int64_t* cu = cu_tiles->const_data_ptr<int64_t>();
  VICO_CHECK(cu[0] == 0 && cu[segments] == tiles, op, "cu_tiles must begin with 0 and end with the number of tiles (",
             tiles, "), got ", cu[0], " and ", cu[segments]);
  for (int64_t i = 0; i < segments; ++i) {
    VICO_CHECK(cu[i] <= cu[i + 1], op, "cu_tiles must not decrease, got ", cu[i], " then ", cu[i + 1], " at position ",
               i);
  }
  return segments;
}

Tensor quantile_route_op(const Tensor& p_in, const std::optional<Tensor>& cu_tiles, double relative, double absolute) {
  constexpr const char* kOp = "quantile_route";
  VICO_CHECK(relative >= 0 && relative <= 1, kOp, "relative must lie in [0, 1], got ", relative);
  const Tensor p = decision_values(checked_vector(p_in, kOp), kOp);
  const int64_t segments = checked_segments(cu_tiles, p, kOp);
  Tensor compress = make_tensor(p, {p.numel()}, ScalarType::Bool);
  if (p.numel() == 0) return compress;
  QuantileParams params;
  params.dtype = float_dtype(p, "p", kOp);
  const ScalarType wide = accumulate_type(params.dtype);
  Tensor below = make_tensor(p, {segments}, wide), above = make_tensor(p, {segments}, wide);
  Tensor weight = make_tensor(p, {segments}, wide);
  params.tiles = p.numel();
  params.segments = segments;
  params.cu_tiles = cu_tiles ? cu_tiles->const_data_ptr<int64_t>() : nullptr;
  params.relative = relative;
  params.absolute = absolute;
  params.p = p.const_data_ptr();
  params.below = below.mutable_data_ptr();
  params.above = above.mutable_data_ptr();
  params.weight = weight.mutable_data_ptr();
  params.compress = static_cast<unsigned char*>(compress.mutable_data_ptr());
  if (on_cuda(p)) {
    VICO_CUDA_CALL(quantile_neighbors, params, p);
    const Tensor quantile = interpolate(below, above, weight);
    params.quantile = quantile.const_data_ptr();
    VICO_CUDA_CALL(route_segments, params, p);
    return compress;
  }
  constexpr int64_t kOperations = 32;  // at most, per tile
  const int64_t work = kOperations * (p.numel() / segments);
  parallel_rows(segments, work,
                [&](int64_t begin, int64_t end) { VICO_CPU_CALL(quantile_neighbors, params, begin, end); });
  const Tensor quantile = interpolate(below, above, weight);
  params.quantile = quantile.const_data_ptr();
  parallel_rows(segments, work, [&](int64_t begin, int64_t end) { VICO_CPU_CALL(route_segments, params, begin, end); });
  return compress;
}

Tensor budget_route_op(const Tensor& p_in, int64_t count) {
  constexpr const char* kOp = "budget_route";
  const Tensor p = decision_values(checked_vector(p_in, kOp), kOp);
  VICO_CHECK(count >= 0 && count <= p.numel(), kOp, "count must lie in [0, ", p.numel(), "], the number of tiles, got ",
             count);
  Tensor compress = make_tensor(p, {p.numel()}, ScalarType::Bool);
  const BudgetParams params{float_dtype(p, "p", kOp), p.numel(), count, p.const_data_ptr(),
                            static_cast<unsigned char*>(compress.mutable_data_ptr())};
  if (on_cuda(p)) {
    VICO_CUDA_CALL(budget_route, params, p);
  } else {
    VICO_CPU_CALL(budget_route, params);
  }
  return compress;
}

std::tuple<Tensor, Tensor> plan_tokens_op(const Tensor& compress_in, int64_t full_tokens, int64_t compressed_tokens) {
  constexpr const char* kOp = "plan_tokens";
  check_kernels(compress_in, kOp);
  check_dtype(compress_in, ScalarType::Bool, "compress", "bool", kOp);
  check_shape(compress_in, {-1}, "compress", "[tiles]", kOp);
  check_tile_tokens(full_tokens, compressed_tokens, compress_in.numel(), kOp);
  const Tensor compress = to_contiguous(compress_in);
  const int64_t tiles = compress.numel();
  Tensor cu_tokens = make_tensor(compress, {tiles + 1}, ScalarType::Long);
  Tensor order = make_tensor(compress, {tiles}, ScalarType::Long);
  const PlanTokensParams params{tiles,
                                full_tokens,
                                compressed_tokens,
                                static_cast<const unsigned char*>(compress.const_data_ptr()),
                                cu_tokens.mutable_data_ptr<int64_t>(),
                                order.mutable_data_ptr<int64_t>()};
  if (on_cuda(compress)) {
    VICO_CUDA_CALL(plan_tokens, params, compress);
  } else {
    VICO_CPU_CALL(plan_tokens, params);
  }
  return {cu_tokens, order};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("checked_probabilities", TORCH_BOX(&vico::checked_probabilities_op));
  m.impl("quantile_route", TORCH_BOX(&vico::quantile_route_op));
  m.impl("budget_route", TORCH_BOX(&vico::budget_route_op));
  m.impl("plan_tokens", TORCH_BOX(&vico::plan_tokens_op));
}
