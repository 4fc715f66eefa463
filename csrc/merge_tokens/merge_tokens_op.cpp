// The door of merge_tokens: checks, allocation, threads or launch.
#include "door/door.h"
#include "merge_tokens/merge_tokens.h"

namespace vico {
namespace {

// Allocations of this size and more come fresh from the system each time (glibc keeps smaller ones for the next call).
bool is_new_pages(const Tensor& t) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  return t.numel() * static_cast<int64_t>(t.element_size()) >= kBytes;
}

// tokens [T, H] beside embeds [R, H].
void check_tokens(const Tensor& tokens, const Tensor& embeds, const char* op) {
  check_device(tokens, embeds, "tokens", "embeds", op);
  check_same_dtype(tokens, embeds, "tokens", "embeds", op);
  check_shape(tokens, {-1, -1}, "tokens", "[tokens, hidden]", op);
  VICO_CHECK(tokens.size(1) == embeds.size(1), op, "tokens must have the hidden size of embeds (", embeds.size(1),
             "), got shape ", shape_string(tokens));
}

void check_row_counts(int64_t embed_rows, int64_t token_rows, const char* op) {
  VICO_CHECK(embed_rows >= 0 && token_rows >= 0, op, "embed_rows and token_rows must not be negative, got ", embed_rows,
             " and ", token_rows);
  VICO_CHECK(embed_rows <= std::numeric_limits<int64_t>::max() - token_rows, op,
             "embed_rows and token_rows are more rows than can be counted, got ", embed_rows, " and ", token_rows);
}

// Checks an int64 vector on the device of `like` with values in [low, high), and gives it contiguous. On CUDA the
// kernel checks the values.
Tensor checked_index(const Tensor& index_in, const Tensor& like, const char* like_name, int64_t low, int64_t high,
                     const char* name, const char* wanted, const char* op) {
  check_device(index_in, like, name, like_name, op);
  check_dtype(index_in, ScalarType::Long, name, "int64", op);
  check_shape(index_in, {-1}, name, wanted, op);
  const Tensor index = to_contiguous(index_in);
  if (on_cuda(index)) return index;
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    VICO_CHECK(values[i] >= low && values[i] < high, op, name, " must lie in [", low, ", ", high, "), got ", values[i],
               " at position ", i);
  }
  return index;
}

// merge_tokens, or text_rows where there are no `tokens_in`.
Tensor lay_out(const Tensor& embeds_in, const std::optional<Tensor>& tokens_in, int64_t token_rows,
               const Tensor& source_in, const char* op) {
  check_kernels(embeds_in, op);
  MergeTokensParams p;
  p.element_size = element_size(float_dtype(embeds_in, "embeds", op));
  check_shape(embeds_in, {-1, -1}, "embeds", "[rows, hidden]", op);
  if (tokens_in) check_tokens(*tokens_in, embeds_in, op);
  check_row_counts(embeds_in.size(0), token_rows, op);
  const Tensor source =
      checked_index(source_in, embeds_in, "embeds", -1, embeds_in.size(0) + token_rows, "source", "[output rows]", op);
  const Tensor embeds = with_dense_last_dim(embeds_in);
  std::optional<Tensor> tokens;
  if (tokens_in) tokens = with_dense_last_dim(*tokens_in);
  p.rows = source.numel();
  p.embed_rows = embeds.size(0);
  p.token_rows = token_rows;
  p.hidden = embeds.size(1);
  Tensor out = make_tensor(embeds, {source.numel(), p.hidden});
  if (out.numel() == 0) return out;
  p.embed_stride = embeds.stride(0);
  p.embeds = static_cast<const char*>(embeds.const_data_ptr());
  if (tokens) {
    p.token_stride = tokens->stride(0);
    p.tokens = static_cast<const char*>(tokens->const_data_ptr());
  }
  p.source = source.const_data_ptr<int64_t>();
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (on_cuda(out)) {
    VICO_CUDA_CALL(merge_tokens, p, out);
    return out;
  }
  p.new_pages = is_new_pages(out);
  parallel_rows(source.numel(), p.hidden,
                [&](int64_t begin, int64_t end) { VICO_CPU_CALL(merge_tokens, p, begin, end); });
  return out;
}

Tensor merge_tokens_op(const Tensor& embeds, const Tensor& tokens, const Tensor& source) {
  return lay_out(embeds, tokens, tokens.dim() > 0 ? tokens.size(0) : 0, source, "merge_tokens");
}

Tensor text_rows_op(const Tensor& embeds, const Tensor& source, int64_t token_rows) {
  return lay_out(embeds, std::nullopt, token_rows, source, "text_rows");
}

std::tuple<Tensor, Tensor> merge_tokens_backward_op(const Tensor& grad_out_in, const Tensor& source_in,
                                                    int64_t embed_rows, int64_t token_rows, bool need_embeds,
                                                    bool need_tokens) {
  constexpr const char* kOp = "merge_tokens_backward";
  check_kernels(grad_out_in, kOp);
  MergeTokensBackwardParams p;
  p.dtype = float_dtype(grad_out_in, "grad_out", kOp);
  check_shape(grad_out_in, {-1, -1}, "grad_out", "[output rows, hidden]", kOp);
  check_row_counts(embed_rows, token_rows, kOp);
  const Tensor source =
      checked_index(source_in, grad_out_in, "grad_out", -1, embed_rows + token_rows, "source", "[output rows]", kOp);
  VICO_CHECK(source.numel() == grad_out_in.size(0), kOp, "source must have one entry per row of grad_out (",
             grad_out_in.size(0), "), got ", source.numel());
  const Tensor grad_out = with_dense_last_dim(grad_out_in);
  p.rows = source.numel();
  p.embed_rows = embed_rows;
  p.token_rows = token_rows;
  p.hidden = grad_out.size(1);
  p.need_embeds = need_embeds;
  p.need_tokens = need_tokens;
  Tensor grad_embeds = make_tensor(grad_out, {need_embeds ? embed_rows : 0, p.hidden});
  Tensor grad_tokens = make_tensor(grad_out, {need_tokens ? token_rows : 0, p.hidden});
  if (grad_embeds.numel() + grad_tokens.numel() == 0) return {grad_embeds, grad_tokens};
  p.grad_stride = grad_out.stride(0);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_embeds = grad_embeds.mutable_data_ptr();
  p.grad_tokens = grad_tokens.mutable_data_ptr();
  if (on_cuda(grad_out)) {
    Tensor uses = make_tensor(source, {3, p.input_rows()});
    p.source = source.const_data_ptr<int64_t>();
    p.uses = uses.mutable_data_ptr<int64_t>();
    VICO_CUDA_CALL(merge_tokens_backward, p, grad_out);
    return {grad_embeds, grad_tokens};
  }
  std::vector<int64_t> first_use(p.input_rows(), -1), next_use(p.rows);
  const int64_t* s = source.const_data_ptr<int64_t>();
  for (int64_t i = source.numel() - 1; i >= 0; --i) {
    if (s[i] < 0) continue;
    next_use[i] = first_use[s[i]];
    first_use[s[i]] = i;
  }
  p.first_use = first_use.data();
  p.next_use = next_use.data();
  p.new_pages = is_new_pages(grad_embeds) || is_new_pages(grad_tokens);
  const int64_t first_row = need_embeds ? 0 : embed_rows, last_row = embed_rows + (need_tokens ? token_rows : 0);
  parallel_rows(last_row - first_row, p.hidden, [&](int64_t begin, int64_t end) {
    VICO_CPU_CALL(merge_tokens_backward, p, first_row + begin, first_row + end);
  });
  return {grad_embeds, grad_tokens};
}

// Rows written twice would hold whichever thread came last. On CUDA the kernel checks.
void check_distinct(const Tensor& index, int64_t rows, const char* op) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  int64_t ascending = 1;
  while (ascending < index.numel() && values[ascending] > values[ascending - 1]) ++ascending;
  if (ascending >= index.numel()) return;
  std::vector<bool> seen(rows);
  for (int64_t i = 0; i < index.numel(); ++i) {
    VICO_CHECK(!seen[values[i]], op, "index must not name a row twice, got ", values[i], " again at position ", i);
    seen[values[i]] = true;
  }
}

void scatter_tokens_op(Tensor embeds, const Tensor& index_in, const Tensor& tokens_in) {
  constexpr const char* kOp = "scatter_tokens_";
  check_kernels(embeds, kOp);
  check_shape(embeds, {-1, -1}, "embeds", "[rows, hidden]", kOp);
  check_tokens(tokens_in, embeds, kOp);
  const Tensor index = checked_index(index_in, embeds, "embeds", 0, embeds.size(0), "index", "[tokens]", kOp);
  VICO_CHECK(index.numel() == tokens_in.size(0), kOp, "index must have one entry per row of tokens (",
             tokens_in.size(0), "), got ", index.numel());
  if (!on_cuda(index)) check_distinct(index, embeds.size(0), kOp);
  check_rows_in_place(embeds, "embeds", kOp);
  const Tensor tokens = with_dense_last_dim(tokens_in);
  if (tokens.numel() == 0) return;
  const int64_t bytes = static_cast<int64_t>(tokens.element_size());
  ScatterTokensParams p;
  p.rows = index.numel();
  p.embed_rows = embeds.size(0);
  p.row_bytes = tokens.size(1) * bytes;
  p.embed_stride = embeds.stride(0) * bytes;
  p.token_stride = tokens.stride(0) * bytes;
  p.index = index.const_data_ptr<int64_t>();
  p.tokens = static_cast<const char*>(tokens.const_data_ptr());
  p.embeds = static_cast<char*>(embeds.mutable_data_ptr());
  VICO_CHECK(!may_share_memory(embeds, tokens), kOp,
             "tokens must not share memory with embeds, which is written in place: pass tokens.clone()");
  if (on_cuda(embeds)) {
    Tensor owner = make_tensor(index, {p.embed_rows});
    p.owner = owner.mutable_data_ptr<int64_t>();
    VICO_CUDA_CALL(scatter_tokens, p, embeds);
    return;
  }
  parallel_rows(index.numel(), tokens.size(1),
                [&](int64_t begin, int64_t end) { VICO_CPU_CALL(scatter_tokens, p, begin, end); });
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("merge_tokens", TORCH_BOX(&vico::merge_tokens_op));
  m.impl("text_rows", TORCH_BOX(&vico::text_rows_op));
  m.impl("merge_tokens_backward", TORCH_BOX(&vico::merge_tokens_backward_op));
  m.impl("scatter_tokens_", TORCH_BOX(&vico::scatter_tokens_op));
}
