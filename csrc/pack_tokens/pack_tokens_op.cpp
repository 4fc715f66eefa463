// The door of pack_tokens: checks, allocation, threads.
#include <torch/csrc/stable/library.h>

#include "common/parameter.h"
#include "pack_tokens/pack_tokens.h"

namespace vico {
namespace {

// Checks that `order` and `cu_tokens` are a plan of just these tiles and tokens, and puts them into the shape: what
// passes here can address nothing outside the tensors.
void check_plan(const Tensor& cu_tokens, const Tensor& order, PackShape& s, const char* op) {
  const int64_t tiles = s.full_tiles + s.compressed_tiles;
  for (const auto& [t, name] : {std::pair{&cu_tokens, "cu_tokens"}, std::pair{&order, "order"}}) {
    check_cpu(*t, name, op);
    check_dtype(*t, ScalarType::Long, name, "int64", op);
  }
  check_shape(cu_tokens, {tiles + 1}, "cu_tokens", "[full tiles + compressed tiles + 1]", op);
  check_shape(order, {tiles}, "order", "[full tiles + compressed tiles]", op);
  VICO_CHECK(cu_tokens.is_contiguous() && order.is_contiguous(), op, "cu_tokens and order must be contiguous");
  s.cu_tokens = cu_tokens.const_data_ptr<int64_t>();
  s.order = order.const_data_ptr<int64_t>();
  VICO_CHECK(s.cu_tokens[0] == 0, op, "cu_tokens must begin with 0, got ", s.cu_tokens[0]);
  std::vector<bool> seen(tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t tile = s.order[i];
    VICO_CHECK(tile >= 0 && tile < tiles && !seen[tile], op, "order must hold each tile of [0, ", tiles, ") once, got ",
               tile, " at position ", i);
    seen[tile] = true;
    const bool is_full = i < s.full_tiles;
    const int64_t tokens = is_full ? s.full_tokens : s.compressed_tokens;
    // By subtraction of checked signs, so that hostile offsets cannot overflow.
    const int64_t from = s.cu_tokens[tile], to = s.cu_tokens[tile + 1];
    VICO_CHECK(from >= 0 && to >= 0 && to - from == tokens, op, "cu_tokens gives tile ", tile, " rows ", from, " to ",
               to, ", but it is a ", is_full ? "full" : "compressed", " tile of ", tokens,
               " tokens: is the plan of another batch?");
  }
}

Tensor pack_tokens_op(const Tensor& full_in, const Tensor& compressed_in, const std::optional<Tensor>& full_bias_in,
                      const std::optional<Tensor>& compressed_bias_in, const Tensor& cu_tokens, const Tensor& order) {
  constexpr const char* kOp = "pack_tokens";
  check_cpu(full_in, "full", kOp);
  check_cpu(compressed_in, "compressed", kOp);
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
  check_plan(cu_tokens, order, s, kOp);

  Tensor out = make_tensor(full_in, {s.rows(), s.hidden});
  if (out.numel() == 0) return out;
  const Tensor full = to_contiguous(full_in), compressed = to_contiguous(compressed_in);
  const std::optional<Tensor> full_bias = as_accumulate(full_bias_in, p.dtype);
  const std::optional<Tensor> compressed_bias = as_accumulate(compressed_bias_in, p.dtype);
  p.full = full.const_data_ptr();
  p.compressed = compressed.const_data_ptr();
  p.full_bias = data_or_null(full_bias);
  p.compressed_bias = data_or_null(compressed_bias);
  p.out = out.mutable_data_ptr();
  parallel_rows(s.rows(), s.hidden, [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pack_tokens, p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_tokens_backward_op(const Tensor& grad_out_in, const Tensor& cu_tokens,
                                                                   const Tensor& order, int64_t full_tiles,
                                                                   int64_t full_tokens, int64_t compressed_tokens) {
  constexpr const char* kOp = "pack_tokens_backward";
  check_cpu(grad_out_in, "grad_out", kOp);
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
  check_plan(cu_tokens, order, s, kOp);

  const ScalarType sum_type = accumulate_type(p.dtype);
  Tensor grad_full = make_tensor(grad_out_in, {s.full_tiles, s.full_tokens, s.hidden});
  Tensor grad_compressed = make_tensor(grad_out_in, {s.compressed_tiles, s.compressed_tokens, s.hidden});
  Tensor grad_full_bias = make_tensor(grad_out_in, {s.hidden}, sum_type);
  Tensor grad_compressed_bias = make_tensor(grad_out_in, {s.hidden}, sum_type);
  const Tensor grad_out = to_contiguous(grad_out_in);
  const int64_t full_chunks = chunk_count(s.full_rows()), compressed_chunks = chunk_count(s.compressed_rows());
  Tensor partials = make_partials(grad_out, p.dtype, full_chunks + compressed_chunks, s.hidden);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_full = grad_full.mutable_data_ptr();
  p.grad_compressed = grad_compressed.mutable_data_ptr();
  p.partials = partials.mutable_data_ptr();
  if (grad_out.numel()) {
    parallel_rows(full_chunks + compressed_chunks, kChunkRows * s.hidden,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pack_tokens_backward, p, begin, end); });
  }
  combine_partials(torch::stable::narrow(partials, 0, 0, full_chunks), 0, grad_full_bias);
  combine_partials(torch::stable::narrow(partials, 0, full_chunks, compressed_chunks), 0, grad_compressed_bias);
  return {grad_full, grad_compressed, grad_full_bias, grad_compressed_bias};
}

}  // namespace
}  // namespace vico

STABLE_TORCH_LIBRARY_IMPL(vico, CPU, m) {
  m.impl("pack_tokens", TORCH_BOX(&vico::pack_tokens_op));
  m.impl("pack_tokens_backward", TORCH_BOX(&vico::pack_tokens_backward_op));
}
