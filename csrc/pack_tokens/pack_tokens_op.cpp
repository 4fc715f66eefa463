// The door of pack_tokens: checks, allocation, threads or launch.
#include "door/parameter.h"
#include "pack_tokens/plan_args.h"

namespace vico {
namespace {

// The rows and biases of both ops.
struct PackArgs {
  const Tensor &full, &compressed;
  const std::optional<Tensor>&full_bias, &compressed_bias;
};

PackTokensParams check_rows(const PackArgs& a, const char* op) {
  check_kernels(a.full, op);
  check_device(a.compressed, a.full, "compressed", "full", op);
  PackTokensParams p;
  p.dtype = float_dtype(a.full, "full", op);
  check_same_dtype(a.compressed, a.full, "compressed", "full", op);
  check_shape(a.full, {-1, -1, -1}, "full", "[full tiles, tokens, hidden]", op);
  check_shape(a.compressed, {-1, -1, a.full.size(2)}, "compressed", "[compressed tiles, tokens, hidden]", op);
  PackShape& s = p.shape;
  s.full_tiles = a.full.size(0);
  s.full_tokens = a.full.size(1);
  s.compressed_tiles = a.compressed.size(0);
  s.compressed_tokens = a.compressed.size(1);
  s.hidden = a.full.size(2);
  if (a.full_bias) check_parameter(*a.full_bias, a.full, s.hidden, "full_bias", "full", "[hidden]", op);
  if (a.compressed_bias)
    check_parameter(*a.compressed_bias, a.full, s.hidden, "compressed_bias", "full", "[hidden]", op);
  return p;
}

// With the plan and its shape checked.
void write_rows(PackTokensParams p, const PackArgs& a, Tensor& out) {
  const PackShape& s = p.shape;
  if (s.rows() == 0 || s.hidden == 0) return;
  const Tensor full = to_contiguous(a.full), compressed = to_contiguous(a.compressed);
  const std::optional<Tensor> full_bias = as_parameter(a.full_bias, p.dtype, p.element_full_bias);
  const std::optional<Tensor> compressed_bias = as_parameter(a.compressed_bias, p.dtype, p.element_compressed_bias);
  p.full = full.const_data_ptr();
  p.compressed = compressed.const_data_ptr();
  p.full_bias = data_or_null(full_bias);
  p.compressed_bias = data_or_null(compressed_bias);
  p.out = out.mutable_data_ptr();
  p.out_stride = out.stride(0);
  if (on_cuda(full)) {
    VICO_CUDA_CALL(pack_tokens, p, full);
  } else {
    parallel_rows(s.rows(), s.hidden, [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pack_tokens, p, begin, end); });
  }
}

Tensor pack_tokens_op(const Tensor& full, const Tensor& compressed, const std::optional<Tensor>& full_bias,
                      const std::optional<Tensor>& compressed_bias, const Tensor& cu_tokens, const Tensor& order) {
  constexpr const char* kOp = "pack_tokens";
  const PackArgs a{full, compressed, full_bias, compressed_bias};
  PackTokensParams p = check_rows(a, kOp);
  check_plan(cu_tokens, order, full, "full", p.shape, kOp);
  Tensor out = make_tensor(full, {p.shape.rows(), p.shape.hidden});
  write_rows(p, a, out);
  return out;
}

void pack_tokens_in_place_op(Tensor out, const Tensor& full, const Tensor& compressed,
                             const std::optional<Tensor>& full_bias, const std::optional<Tensor>& compressed_bias,
                             const Tensor& first_row, const Tensor& order) {
  constexpr const char* kOp = "pack_tokens_";
  const PackArgs a{full, compressed, full_bias, compressed_bias};
  PackTokensParams p = check_rows(a, kOp);
  check_out(out, p.shape.hidden, full, "full", kOp);
  check_apart(
      out, {{full, "full"}, {compressed, "compressed"}, {full_bias, "full_bias"}, {compressed_bias, "compressed_bias"}},
      kOp);
  check_places(first_row, order, out, full, "full", p.shape, kOp);
  write_rows(p, a, out);
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
  m.impl("pack_tokens_", TORCH_BOX(&vico::pack_tokens_in_place_op));
  m.impl("pack_tokens_backward", TORCH_BOX(&vico::pack_tokens_backward_op));
}
