// The checks of a group of rows, and the group as the kernels read it, for the doors that run projections.
#pragma once

#include <array>

#include "door/parameter.h"
#include "projection/projection.h"

namespace vico {

// One connector's arguments under their names.
struct GroupArgs {
  const std::optional<Tensor>&x, &weight, &bias;
  const char *x_name, *weight_name, *bias_name;
};

// `like`, called `like_name`, is the first tensor of the call.
inline void check_group(const GroupArgs& g, const Tensor& like, const char* like_name, const char* op) {
  const Tensor& x = *g.x;
  check_device(x, like, g.x_name, like_name, op);
  float_dtype(x, g.x_name, op);
  check_same_dtype(x, like, g.x_name, like_name, op);
  VICO_CHECK(x.dim() >= 2, op, g.x_name, " must have shape [..., rows, in features], got ", shape_string(x));
  VICO_CHECK(g.weight.has_value(), op, g.x_name, " needs ", g.weight_name, ", got None");
  check_device(*g.weight, like, g.weight_name, like_name, op);
  check_same_dtype(*g.weight, x, g.weight_name, g.x_name, op);
  check_shape(*g.weight, {-1, x.size(x.dim() - 1)}, g.weight_name, "[out features, in features]", op);
  if (g.bias) check_parameter(*g.bias, x, g.weight->size(0), g.bias_name, g.x_name, "[out features]", op);
}

inline bool has_kernel(const Tensor& x) {
  return on_cuda(x) && (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half);
}

template <class... Args>
std::array<StableIValue, sizeof...(Args)> dispatch_op(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

template <class... Args>
Tensor call_op(const char* name, const Args&... args) {
  return torch::stable::detail::to<Tensor>(dispatch_op(name, args...)[0]);
}

inline Tensor torch_linear(const GroupArgs& g, bool add_bias) {
  std::optional<Tensor> bias;
  if (add_bias && g.bias) bias = torch::stable::to(*g.bias, g.x->scalar_type());
  return call_op("aten::linear", *g.x, *g.weight, bias);
}

// A group as the kernels read it, with the tensors that its pointers point into.
struct KernelGroup {
  Tensor x, weight;
  std::optional<Tensor> bias;
  ProjectionGroup group;

  explicit KernelGroup(const GroupArgs& g)
      : x(to_contiguous(*g.x)), weight(to_contiguous(*g.weight)), bias(as_accumulate(g.bias, Dtype::kFloat)) {
    group.rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) group.rows *= x.size(d);
    group.depth = weight.size(1);
    group.columns = weight.size(0);
    group.a = x.const_data_ptr();
    group.a_stride = group.depth;
    group.weight = weight.const_data_ptr();
    group.bias = static_cast<const float*>(data_or_null(bias));
    group.out_stride = group.columns;
  }
};

inline Dtype kernel_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? Dtype::kHalf : Dtype::kBFloat16;
}

}  // namespace vico
