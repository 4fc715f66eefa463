// The door of bias_gelu: checks, allocation, threads or launch.
#include "bias_gelu/bias_gelu.h"
#include "bias_gelu/dropout_args.h"
#include "door/parameter.h"

namespace vico {
namespace {

// An element's cost in units of parallel_rows: its arithmetic outweighs its memory traffic.
constexpr int64_t kElementCost = 4;

Dtype checked_dtype(const Tensor& x, const std::optional<Tensor>& bias, const char* op) {
  check_kernels(x, op);
  const Dtype dtype = float_dtype(x, "x", op);
  VICO_CHECK(x.dim() >= 1, op, "x must have shape [..., features], got []");
  if (bias) check_parameter(*bias, x, x.size(x.dim() - 1), "bias", "x", "[features]", op);
  return dtype;
}

void run_forward(const Tensor& x, const std::optional<Tensor>& bias_in, const std::optional<Tensor>& seed,
                 double dropout, Tensor& out, const char* op) {
  BiasGeluParams p;
  p.dtype = checked_dtype(x, bias_in, op);
  p.mask = dropout_mask(x, "x", seed, dropout, op);
  if (x.numel() == 0) return;
  const std::optional<Tensor> bias = as_parameter(bias_in, p.dtype, p.element_bias);
  p.columns = x.size(x.dim() - 1);
  p.elements = x.numel();
  p.x = x.const_data_ptr();
  p.bias = data_or_null(bias);
  p.out = out.mutable_data_ptr();
  if (on_cuda(x)) {
    VICO_CUDA_CALL(bias_gelu, p, x);
  } else {
    parallel_rows(p.elements, kElementCost,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(bias_gelu, p, begin, end); });
  }
}

Tensor bias_gelu_op(const Tensor& x_in, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
                    double dropout) {
  checked_dtype(x_in, bias, "bias_gelu");
  const Tensor x = to_contiguous(x_in);
  Tensor out = torch::stable::empty_like(x);
  run_forward(x, bias, seed, dropout, out, "bias_gelu");
  return out;
}

void bias_gelu_inplace_op(Tensor x, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
                          double dropout) {
  checked_dtype(x, bias, "bias_gelu_");
  VICO_CHECK(x.is_contiguous(), "bias_gelu_", "x must be contiguous to be changed in place: use bias_gelu");
  run_forward(x, bias, seed, dropout, x, "bias_gelu_");
}

std::tuple<Tensor, Tensor> bias_gelu_backward_op(const Tensor& grad_out_in, const Tensor& x_in,
                                                 const std::optional<Tensor>& bias_in,
                                                 const std::optional<Tensor>& seed, double dropout) {
  constexpr const char* kOp = "bias_gelu_backward";
  BiasGeluBackwardParams p;
  p.dtype = checked_dtype(x_in, bias_in, kOp);
  check_device(grad_out_in, x_in, "grad_out", "x", kOp);
  check_same_dtype(grad_out_in, x_in, "grad_out", "x", kOp);
  VICO_CHECK(shape_string(grad_out_in) == shape_string(x_in), kOp, "grad_out must have the shape of x, ",
             shape_string(x_in), ", got ", shape_string(grad_out_in));
  p.mask = dropout_mask(x_in, "x", seed, dropout, kOp);
  const Tensor grad_out = to_contiguous(grad_out_in), x = to_contiguous(x_in);
  const std::optional<Tensor> bias = as_parameter(bias_in, p.dtype, p.element_bias);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_bias = bias_in ? make_tensor(*bias_in, {bias_in->numel()}) : make_tensor(x, {0});
  p.elements = x.numel();
  // Without a bias rows mean nothing: any length will do that splits the elements well.
  p.columns = bias ? x.size(x.dim() - 1) : 512;
  const int64_t rows = (p.elements + p.columns - 1) / std::max<int64_t>(1, p.columns);
  if (on_cuda(x)) p.chunk_rows = cuda_chunk_rows(rows, p.columns, p.dtype, kCudaBackwardRows);
  const int64_t chunks = chunk_count(rows, p.chunk_rows);
  Tensor partials = make_partials(x, p.dtype, bias ? chunks : 0, p.columns);
  p.grad_out = grad_out.const_data_ptr();
  p.x = x.const_data_ptr();
  p.bias = data_or_null(bias);
  p.grad_x = grad_x.mutable_data_ptr();
  p.partials = bias ? partials.mutable_data_ptr() : nullptr;
  if (on_cuda(x)) {
    VICO_CUDA_CALL(bias_gelu_backward, p, x);
  } else {
    parallel_rows(chunks, kChunkRows * p.columns * kElementCost,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(bias_gelu_backward, p, begin, end); });
  }
  if (bias) combine_partials(partials, 0, grad_bias);
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("bias_gelu", TORCH_BOX(&vico::bias_gelu_op));
  m.impl("bias_gelu_", TORCH_BOX(&vico::bias_gelu_inplace_op));
  m.impl("bias_gelu_backward", TORCH_BOX(&vico::bias_gelu_backward_op));
}
