// The door of pack_tokens: checks, allocation, threads or launch.
#include "door/parameter.h"
#include "pack_tokens/plan_args.h"

namespace vico {
namespace {

Tensor pack_tokens_op(const Tensor& full_in, const Tensor& compressed_in, const std::optional<Tensor>& full_bias_in,
                      const std::optional<Tensor>& compressed_bias_in, const Tensor& cu_tokens, const Tensor& order) {
  constexpr const char* kOp = "pack_tokens";
  check_kernels(full_in, kOp);
  check_device(compressed_in, full_in, "compressed", "full", kOp);
  PackTokensParams p;
  p.dtype = float_dtype(full_in, "full", kOp);
  check_same_dtype(compressed_in, full_in, "compressed", "full", kOp);
  check_shape(full_in, {-1, -1, -1}, "full", "[full tiles, tokens, hidden]", kOp);
  check_shape(compressed_in, {-1, -1, full_in.size(2)}, "compressed", "[compressed tiles, tokens, hidden]", kOp);
  PackShape& s = p.shape;
  s.full_tiles = full_in.size(0);
  s.full_tokens = full_in.size(1);
  s.compressed_tiles = compressed_in.size(0);
  s.compressed_tokens = compressed_in.size(1);
  s.hidden = full_in.size(2);
  if (full_bias_in) check_parameter(*full_bias_in, full_in, s.hidden, "full_bias", "full", "[hidden]", kOp);
  if (compressed_bias_in)
    check_parameter(*compressed_bias_in, full_in, s.hidden, "compressed_bias", "full", "[hidden]", kOp);
  check_plan(cu_tokens, order, full_in, "full", s, kOp);

  Tensor out = make_tensor(full_in, {s.rows(), s.hidden});
  if (out.numel() == 0) return out;
  const Tensor full = to_contiguous(full_in), compressed = to_contiguous(compressed_in);
  const std::optional<Tensor> full_bias = as_parameter(full_bias_in, p.dtype, p.element_full_bias);
  const std::optional<Tensor> compressed_bias = as_parameter(compressed_bias_in, p.dtype, p.element_compressed_bias);
  p.full = full.const_data_ptr();
  p.compressed = compressed.const_data_ptr();
  p.full_bias = data_or_null(full_bias);
  p.compressed_bias = data_or_null(compressed_bias);
  p.out = out.mutable_data_ptr();
  if (on_cuda(full)) {
    VICO_CUDA_CALL(pack_tokens, p, full);
  } else {
    parallel_rows(s.rows(), s.hidden, [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pack_tokens, p, begin, end); });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_tokens_backward_op(const Tensor& grad_out_in, const Tensor& cu_tokens,
                                                                   const Tensor& order, int64_t full_tiles,
                                                                   int64_t full_tokens, int64_t compressed_tokens) {
  constexpr const char* kOp = "pack_tokens_backward";
  check_kernels(grad_out_in, kOp);
  PackTokensBackwardParams p;
  p.dtype = float_dtype(grad_out_in, "grad_out", kOp);
  VICO_CHECK(order.dim() == 1 && full_tiles >= 0 && full_tiles <= order.numel(), kOp,
             "order must have shape [tiles] with at least full_tiles = ", full_tiles, " tiles, got ",
             shape_string(order));
  PackShape& s = p.shape;
  s.full_tiles = full_tiles;
  s.full_tokens = full_tokens;
  s.compressed_tiles = order.numel() - full_tiles;
  s.compressed_tokens = compressed_tokens;
  check_shape(grad_out_in, {s.rows(), -1}, "grad_out", "[packed tokens, hidden]", kOp);
  s.hidden = grad_out_in.size(1);
  check_plan(cu_tokens, order, grad_out_in, "grad_out", s, kOp);

  const ScalarType sum_type = accumulate_type(p.dtype);
  Tensor grad_full = make_tensor(grad_out_in, {s.full_tiles, s.full_tokens, s.hidden});
  Tensor grad_compressed = make_tensor(grad_out_in, {s.compressed_tiles, s.compressed_tokens, s.hidden});
  Tensor grad_full_bias = make_tensor(grad_out_in, {s.hidden}, sum_type);
  Tensor grad_compressed_bias = make_tensor(grad_out_in, {s.hidden}, sum_type);
  const Tensor grad_out = to_contiguous(grad_out_in);
  if (on_cuda(grad_out)) p.chunk_rows = cuda_chunk_rows(s.rows(), s.hidden, p.dtype, kCudaBackwardRows);
  const int64_t full_chunks = chunk_count(s.full_rows(), p.chunk_rows);
  const int64_t compressed_chunks = chunk_count(s.compressed_rows(), p.chunk_rows);
  Tensor partials = make_partials(grad_out, p.dtype, full_chunks + compressed_chunks, s.hidden);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_full = grad_full.mutable_data_ptr();
  p.grad_compressed = grad_compressed.mutable_data_ptr();
  p.partials = partials.mutable_data_ptr();
  if (grad_out.numel() == 0) {
    // There is nothing to move; the biases' gradients are sums of no rows.
  } else if (on_cuda(grad_out)) {
    VICO_CUDA_CALL(pack_tokens_backward, p, grad_out);
  } else {
    parallel_rows(full_chunks + compressed_chunks, kChunkRows * s.hidden,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pack_tokens_backward, p, begin, end); });
  }
  combine_partials(torch::stable::narrow(partials, 0, 0, full_chunks), 0, grad_full_bias);
  combine_partials(torch::stable::narrow(partials, 0, full_chunks, compressed_chunks), 0, grad_compressed_bias);
  return {grad_full, grad_compressed, grad_full_bias, grad_compressed_bias};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("pack_tokens", TORCH_BOX(&vico::pack_tokens_op));
  m.impl("pack_tokens_backward", TORCH_BOX(&vico::pack_tokens_backward_op));
}
