// The door of attention_pool: checks, allocation, threads or launch.
#include <tuple>

#include "attention_pool/attention_pool.h"
#include "door/door.h"

namespace vico {
namespace {

// Checks tokens [tiles, skip + count, channels] and query [tiles, heads, channels], which forward and backward share.
AttentionPoolShape checked_attention_shape(const Tensor& tokens, const Tensor& query, int64_t skip, const char* op) {
  check_kernels(tokens, op);
  check_device(query, tokens, "query", "tokens", op);
  AttentionPoolShape s;
  s.dtype = float_dtype(tokens, "tokens", op);
  check_same_dtype(query, tokens, "query", "tokens", op);
  VICO_CHECK(skip >= 0, op, "skip must not be negative, got ", skip);
  check_shape(tokens, {-1, -1, -1}, "tokens", "[tiles, skip + tokens, channels]", op);
  check_shape(query, {tokens.size(0), -1, tokens.size(2)}, "query", "[tiles, heads, channels]", op);
  VICO_CHECK(tokens.size(1) > skip, op, "tokens must hold at least one token per tile after the first ", skip,
             ", which are skipped, got shape ", shape_string(tokens));
  VICO_CHECK(tokens.size(2) > 0, op, "tokens must have at least one channel, got shape ", shape_string(tokens));
  s.tiles = tokens.size(0);
  s.count = tokens.size(1) - skip;
  s.channels = tokens.size(2);
  s.heads = query.size(1);
  return s;
}

AttentionPoolInputs attention_inputs(const AttentionPoolShape& s, const Tensor& tokens, const Tensor& query,
                                     int64_t skip) {
  AttentionPoolInputs in;
  in.tokens = static_cast<const char*>(tokens.const_data_ptr()) + skip * tokens.stride(1) * element_size(s.dtype);
  in.tile_stride = tokens.stride(0);
  in.token_stride = tokens.stride(1);
  in.query = query.const_data_ptr();
  in.query_stride = query.stride(0);
  in.query_head_stride = query.stride(1);
  return in;
}

std::tuple<Tensor, Tensor> attention_pool_op(const Tensor& tokens_in, const Tensor& query_in, int64_t skip) {
  AttentionPoolParams p;
  p.shape = checked_attention_shape(tokens_in, query_in, skip, "attention_pool");
  const AttentionPoolShape& s = p.shape;
  Tensor context = make_tensor(tokens_in, {s.tiles, s.heads, s.channels});
  Tensor lse = make_tensor(tokens_in, {s.tiles, s.heads}, accumulate_type(s.dtype));
  if (lse.numel() == 0) return {context, lse};
  const Tensor tokens = with_dense_last_dim(tokens_in), query = with_dense_last_dim(query_in);
  const int64_t room =
      on_cuda(tokens) ? s.cuda_forward_workspace() : s.tiles * s.chunks() * s.partial_rows() * s.padded_heads();
  Tensor partial = make_tensor(tokens, {room}, accumulate_type(s.dtype));
  p.in = attention_inputs(s, tokens, query, skip);
  p.context = context.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  if (on_cuda(tokens)) {
    VICO_CUDA_CALL(attention_pool, p, tokens);
  } else {
    parallel_rows(s.tiles * s.chunks(), AttentionPoolShape::kChunk * s.channels,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(attention_pool_chunks, p, begin, end); });
    parallel_rows(s.tiles * s.combine_items(), AttentionPoolShape::kCombineRows * s.heads * s.chunks(),
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(attention_pool_combine, p, begin, end); });
  }
  return {context, lse};
}

std::tuple<Tensor, Tensor> attention_pool_backward_op(const Tensor& grad_context_in, const Tensor& tokens_in,
                                                      const Tensor& query_in, const Tensor& context_in,
                                                      const Tensor& lse_in, int64_t skip, bool need_grad_tokens) {
  constexpr const char* kOp = "attention_pool_backward";
  AttentionPoolBackwardParams p;
  p.shape = checked_attention_shape(tokens_in, query_in, skip, kOp);
  const AttentionPoolShape& s = p.shape;
  check_device(grad_context_in, tokens_in, "grad_context", "tokens", kOp);
  check_device(context_in, tokens_in, "context", "tokens", kOp);
  check_device(lse_in, tokens_in, "lse", "tokens", kOp);
  check_same_dtype(grad_context_in, tokens_in, "grad_context", "tokens", kOp);
  check_same_dtype(context_in, tokens_in, "context", "tokens", kOp);
  check_dtype(lse_in, accumulate_type(s.dtype), "lse", s.dtype == Dtype::kDouble ? "float64" : "float32", kOp);
  check_shape(grad_context_in, {s.tiles, s.heads, s.channels}, "grad_context", "[tiles, heads, channels]", kOp);
  check_shape(context_in, {s.tiles, s.heads, s.channels}, "context", "[tiles, heads, channels]", kOp);
  check_shape(lse_in, {s.tiles, s.heads}, "lse", "[tiles, heads]", kOp);
  Tensor grad_query = make_tensor(query_in, {s.tiles, s.heads, s.channels});
  Tensor grad_tokens =
      need_grad_tokens ? make_tensor(tokens_in, {s.tiles, skip + s.count, s.channels}) : make_tensor(tokens_in, {0});
  if (grad_query.numel() == 0) {
    if (grad_tokens.numel() > 0) torch::stable::zero_(grad_tokens);
    return {grad_tokens, grad_query};
  }
  const Tensor tokens = with_dense_last_dim(tokens_in), query = with_dense_last_dim(query_in);
  const Tensor grad_context = to_contiguous(grad_context_in), context = to_contiguous(context_in);
  const Tensor lse = to_contiguous(lse_in);
  const int64_t room =
      on_cuda(tokens) ? s.cuda_backward_workspace() : s.tiles * s.chunks() * s.channels * s.padded_heads();
  Tensor partial = make_tensor(tokens, {room}, accumulate_type(s.dtype));
  p.in = attention_inputs(s, tokens, query, skip);
  p.grad_context = grad_context.const_data_ptr();
  p.context = context.const_data_ptr();
  p.lse = lse.const_data_ptr();
  p.grad_tokens = need_grad_tokens ? grad_tokens.mutable_data_ptr() : nullptr;
  p.skip = skip;
  p.grad_query = grad_query.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  if (on_cuda(tokens)) {
    VICO_CUDA_CALL(attention_pool_backward, p, tokens);
  } else {
    parallel_rows(s.tiles * s.chunks(), AttentionPoolShape::kChunk * s.channels,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(attention_pool_backward_chunks, p, begin, end); });
    parallel_rows(s.tiles * s.combine_items(), AttentionPoolShape::kCombineRows * s.heads * s.chunks(),
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(attention_pool_backward_combine, p, begin, end); });
  }
  return {grad_tokens, grad_query};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("attention_pool", TORCH_BOX(&vico::attention_pool_op));
  m.impl("attention_pool_backward", TORCH_BOX(&vico::attention_pool_backward_op));
}
