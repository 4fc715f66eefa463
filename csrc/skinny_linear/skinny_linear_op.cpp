// The door of skinny_linear: checks, allocation, threads or launch.
#include "door/door.h"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

constexpr const char* kOp = "skinny_linear";

Tensor skinny_linear_op(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  check_kernels(x_in, kOp);
  check_device(weight_in, x_in, "weight", "x", kOp);
  if (bias_in) check_device(*bias_in, x_in, "bias", "x", kOp);
  SkinnyLinearParams p;
  p.dtype = float_dtype(x_in, "x", kOp);
  check_same_dtype(weight_in, x_in, "weight", "x", kOp);
  if (bias_in) check_same_dtype(*bias_in, x_in, "bias", "x", kOp);
  const bool grouped = x_in.dim() == 3;
  if (grouped) {
    check_shape(weight_in, {x_in.size(1), -1, x_in.size(2)}, "weight", "[groups, features, depth]", kOp);
    if (bias_in) check_shape(*bias_in, {x_in.size(1), weight_in.size(1)}, "bias", "[groups, features]", kOp);
  } else {
    check_shape(x_in, {-1, -1}, "x", "[rows, depth] or [rows, groups, depth]", kOp);
    check_shape(weight_in, {-1, x_in.size(1)}, "weight", "[features, depth]", kOp);
    if (bias_in) check_shape(*bias_in, {weight_in.size(0)}, "bias", "[features]", kOp);
  }
  p.rows = x_in.size(0);
  p.groups = grouped ? x_in.size(1) : 1;
  p.features = weight_in.size(grouped);
  p.depth = weight_in.size(grouped + 1);

  Tensor y = grouped ? make_tensor(x_in, {p.rows, p.groups, p.features}) : make_tensor(x_in, {p.rows, p.features});
  if (y.numel() == 0) return y;
  const ScalarType x_type = on_cuda(x_in) ? x_in.scalar_type() : accumulate_type(p.dtype);
  const Tensor x = to_contiguous(x_type == x_in.scalar_type() ? x_in : torch::stable::to(x_in, x_type));
  const auto dense = [&](int d) { return weight_in.size(d) <= 1 || weight_in.stride(d) == 1; };
  const Tensor weight = dense(grouped) || dense(grouped + 1) ? weight_in : torch::stable::contiguous(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias.emplace(to_contiguous(*bias_in));
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.group_stride = grouped ? weight.stride(0) : 0;
  p.feature_stride = weight.stride(grouped);
  p.depth_stride = p.depth <= 1 ? 1 : weight.stride(grouped + 1);
  p.bias = data_or_null(bias);
  p.y = y.mutable_data_ptr();
  if (on_cuda(x)) {
    VICO_CUDA_CALL(skinny_linear, p, x);
  } else {
    parallel_rows(p.groups * p.blocks(), p.block() * p.depth,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(skinny_linear, p, begin, end); });
  }
  return y;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) { m.impl("skinny_linear", TORCH_BOX(&vico::skinny_linear_op)); }
