// Table of contents: every op of vico_ext, schemas only. Implementations register in csrc/<op>/<op>_op.cpp; fake
// kernels and gradients in vico_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vico, m) {
  // pixel shuffle: ViT tokens [tiles, skip + grid_h * grid_w, V] -> [selected, tokens / rate^2, rate^2 * V]
  m.def(
      "pixel_shuffle(Tensor tokens, int grid_h, int grid_w, int rate, Tensor? tile_index=None, int skip=0, "
      "bool transposed=False) -> Tensor");
  m.def(
      "pixel_shuffle_backward(Tensor grad_out, SymInt tiles, int grid_h, int grid_w, int rate, Tensor? "
      "tile_index=None, "
      "int skip=0, bool transposed=False) -> Tensor");

  // the same with LayerNorm over the shuffled channels in one pass; mean and rstd are per output token
  m.def(
      "normalized_shuffle(Tensor tokens, Tensor weight, Tensor bias, float eps, int grid_h, int grid_w, int rate, "
      "Tensor? tile_index=None, int skip=0, bool transposed=False) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "normalized_shuffle_backward(Tensor grad_out, Tensor tokens, Tensor weight, Tensor mean, Tensor rstd, "
      "int grid_h, int grid_w, int rate, Tensor? tile_index, int skip, bool transposed, bool need_grad_tokens) -> "
      "(Tensor grad_tokens, Tensor grad_weight, Tensor grad_bias)");

  // those statistics alone, and the layer that they are for: rstd (shuffled weight^T - mean gain_sum) + bias, or gelu
  // of it, with the tokens read through their shuffled view, LayerNorm's gain in `weight`, gain_sum [N] the sums of its
  // rows, and LayerNorm's bias in `bias`. Beside it, in the same launch, a layer of rows x, as `projection` has it;
  // left out, its output is empty.
  m.def(
      "shuffle_statistics(Tensor tokens, float eps, int grid_h, int grid_w, int rate, Tensor? tile_index=None, "
      "int skip=0, bool transposed=False) -> (Tensor mean, Tensor rstd)");
  m.def(
      "shuffled_projection(Tensor tokens, Tensor mean, Tensor rstd, Tensor weight, Tensor gain_sum, Tensor? bias, "
      "int grid_h, int grid_w, int rate, Tensor? tile_index, int skip, bool transposed, bool gelu, Tensor? x=None, "
      "Tensor? x_weight=None, Tensor? x_bias=None) -> (Tensor, Tensor)");

  // the projection's epilogue: dropout(gelu(x + bias)), exact GELU; the dropout mask is a function of `seed`
  m.def("bias_gelu(Tensor x, Tensor? bias=None, Tensor? seed=None, float dropout=0.0) -> Tensor");
  m.def("bias_gelu_(Tensor(a!) x, Tensor? bias=None, Tensor? seed=None, float dropout=0.0) -> ()");
  m.def(
      "bias_gelu_backward(Tensor grad_out, Tensor x, Tensor? bias, Tensor? seed, float dropout) -> "
      "(Tensor grad_x, Tensor grad_bias)");

  // both connectors' tokens [full tiles, n, H], [compressed tiles, m, H], plus bias -> packed [T, H] in tile order
  m.def(
      "pack_tokens(Tensor full, Tensor compressed, Tensor? full_bias, Tensor? compressed_bias, Tensor cu_tokens, "
      "Tensor order) -> Tensor");
  // the same, tile t's rows to rows first_row[t] .. of `out` [rows, H], whose other rows stay as they are
  m.def(
      "pack_tokens_(Tensor(a!) out, Tensor full, Tensor compressed, Tensor? full_bias, Tensor? compressed_bias, "
      "Tensor first_row, Tensor order) -> ()");
  m.def(
      "pack_tokens_backward(Tensor grad_out, Tensor cu_tokens, Tensor order, SymInt full_tiles, int full_tokens, "
      "int compressed_tokens) -> (Tensor grad_full, Tensor grad_compressed, Tensor grad_full_bias, "
      "Tensor grad_compressed_bias)");

  // one layer of both connectors: x weight^T + bias, or dropout(gelu of it), dropout for `compressed` alone. A
  // connector that takes no part is left out, and its output is empty. The second op is the last layer, written in
  // packed order; the third writes it into `out` as pack_tokens_ does.
  m.def(
      "projection(Tensor? full, Tensor? full_weight, Tensor? full_bias, Tensor? compressed, Tensor? compressed_weight, "
      "Tensor? compressed_bias, bool gelu, Tensor? seed=None, float dropout=0.0) -> (Tensor, Tensor)");
  m.def(
      "packed_projection(Tensor full, Tensor full_weight, Tensor? full_bias, Tensor compressed, "
      "Tensor compressed_weight, Tensor? compressed_bias, Tensor cu_tokens, Tensor order) -> Tensor");
  m.def(
      "packed_projection_(Tensor(a!) out, Tensor full, Tensor full_weight, Tensor? full_bias, Tensor compressed, "
      "Tensor compressed_weight, Tensor? compressed_bias, Tensor first_row, Tensor order) -> ()");

  // absorbed attention pooling: softmax over a tile's tokens of query . token, and the tokens' mean under it
  m.def("attention_pool(Tensor tokens, Tensor query, int skip=0) -> (Tensor context, Tensor lse)");
  m.def(
      "attention_pool_backward(Tensor grad_context, Tensor tokens, Tensor query, Tensor context, Tensor lse, int skip, "
      "bool need_grad_tokens) -> (Tensor grad_tokens, Tensor grad_query)");

  // x weight^T + bias for few rows of x, bound by reading the weight once: x [rows, K], weight [N, K] -> [rows, N], or
  // one linear map per group: x [rows, groups, K], weight [groups, N, K] -> [rows, groups, N]
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");

  // the router's two halves as one call each, without gradients, for CUDA. first, later: in_proj weight and bias,
  // out_proj weight and bias, norm weight and bias of round 1 and of rounds 2 to 4. blocks: of each the two layers'
  // weights and biases and its norm's; gate: the last norm's and the classifier's. router_gate gives the logits [P, 2],
  // or the probability of class 0, [P] float32 (float64 for float64).
  m.def(
      "router_pool(Tensor tokens, Tensor query_token, Tensor[] first, Tensor[] later, int heads, int skip, float eps) "
      "-> Tensor");
  m.def("router_gate(Tensor pooled, Tensor[] blocks, Tensor[] gate, float eps, bool probability=False) -> Tensor");

  // routing: which tiles are compressed, and where each tile's tokens go
  m.def("checked_probabilities(Tensor p) -> Tensor");
  m.def("quantile_route(Tensor p, Tensor? cu_tiles, float relative, float absolute) -> Tensor compress");
  m.def("budget_route(Tensor p, SymInt count) -> Tensor compress");
  m.def("plan_tokens(Tensor compress, int full_tokens, int compressed_tokens) -> (Tensor cu_tokens, Tensor order)");

  // rows of `embeds` and `tokens` laid out by `source`: -1 zero row, [0, R) a row of embeds, [R, R + T) a row of tokens
  m.def("merge_tokens(Tensor embeds, Tensor tokens, Tensor source) -> Tensor");
  // the same without the tokens, T = token_rows: their rows are left for others to write
  m.def("text_rows(Tensor embeds, Tensor source, SymInt token_rows) -> Tensor");
  m.def(
      "merge_tokens_backward(Tensor grad_out, Tensor source, SymInt embed_rows, SymInt token_rows, "
      "bool need_embeds, bool need_tokens) -> (Tensor grad_embeds, Tensor grad_tokens)");
  m.def("scatter_tokens_(Tensor(a!) embeds, Tensor index, Tensor tokens) -> ()");

  // sequence compression: which positions stay, and where each position of the shorter sequence comes from
  m.def(
      "keep_placeholders(Tensor input_ids, Tensor? attention_mask, Tensor compress, int placeholder, int full_tokens, "
      "int compressed_tokens) -> (Tensor keep, Tensor counts)");
  m.def(
      "compress_sequence(Tensor input_ids, Tensor keep, int placeholder, SymInt length, bool pad_left) -> "
      "(Tensor position, Tensor source)");
  // of each tile the row i with source[i] == embed_rows + cu_tokens[t], where its tokens begin
  m.def("tile_rows(Tensor source, Tensor cu_tokens, SymInt embed_rows) -> Tensor");
  m.def("renumber_positions(Tensor position_ids, Tensor position) -> Tensor");

  // divergence of a policy's next-token distribution from a reference's, per token, from hidden states [T, H], [T,
  // H_ref] and heads [V, H], [V, H_ref]; beta 0: forward KL, 1: reverse KL, between: JSD. The gradients come with it:
  // per token for the hidden states, weighted and summed for the head. Composed of the kernels below
  // (vico_ext/ops/consistency.py).
  m.def(
      "consistency_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
      "Tensor? ref_bias, Tensor? token_weights, float temperature, float beta, bool need_hidden, bool need_weight, "
      "bool need_bias, int block_tokens=0) -> (Tensor total, Tensor loss, Tensor lse, Tensor ref_lse, "
      "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // its kernels on one chunk of the vocabulary: logits [rows, words] of both models, running state [rows, 6]. The
  // gradient takes the place of `policy`, or, on CUDA, goes to a 16-bit `out`.
  m.def(
      "consistency_statistics_(Tensor(a!) policy, Tensor(b!) reference, Tensor(c!) state, Tensor? policy_bias, "
      "Tensor? reference_bias, float beta, float temperature) -> ()");
  m.def("consistency_mixture_(Tensor policy, Tensor reference, Tensor(a!) state, float beta) -> ()");
  m.def(
      "consistency_gradient_(Tensor(a!) policy, Tensor reference, Tensor state, float beta, float temperature, "
      "Tensor(b!)? out=None) -> ()");
  m.def("consistency_result(Tensor state, float beta) -> (Tensor loss, Tensor lse, Tensor ref_lse)");
}
