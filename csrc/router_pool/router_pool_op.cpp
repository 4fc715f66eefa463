// The door of router_pool: checks, work areas, one call. CUDA alone has a kernel: on the CPU the rounds are composed in
// Python (vico_ext/functional/router.py), where a launch costs nothing that would be worth saving.
#include <array>

#include "door/door.h"
#include "router_pool/router_pool.h"

namespace vico {
namespace {

constexpr const char* kOp = "router_pool";

// What a round's six tensors are called in messages, and their shapes in channels.
struct Expected {
  const char *name, *shape;
  int64_t rows, columns;  // 0 columns: a vector
};

using RoundTensors = std::array<Tensor, 6>;

RoundTensors checked_round(const std::vector<Tensor>& round, const char* name, const Tensor& tokens, int64_t channels) {
  VICO_CHECK(round.size() == 6, kOp, name, " must hold 6 tensors (in_proj weight and bias, out_proj weight and bias, ",
             "norm weight and bias), got ", round.size());
  const Expected expected[6] = {{"in_proj_weight", "[3 channels, channels]", 3 * channels, channels},
                                {"in_proj_bias", "[3 channels]", 3 * channels, 0},
                                {"out_proj.weight", "[channels, channels]", channels, channels},
                                {"out_proj.bias", "[channels]", channels, 0},
                                {"norm.weight", "[channels]", channels, 0},
                                {"norm.bias", "[channels]", channels, 0}};
  RoundTensors dense;
  for (size_t i = 0; i < 6; ++i) {
    const Expected& e = expected[i];
    const std::string full = std::string(name) + "'s " + e.name;
    check_device(round[i], tokens, full.c_str(), "tokens", kOp);
    check_same_dtype(round[i], tokens, full.c_str(), "tokens", kOp);
    if (e.columns > 0) {
      check_shape(round[i], {e.rows, e.columns}, full.c_str(), e.shape, kOp);
    } else {
      check_shape(round[i], {e.rows}, full.c_str(), e.shape, kOp);
    }
    dense[i] = to_contiguous(round[i]);
  }
  return dense;
}

RouterAttention attention_of(const RoundTensors& t) {
  return {t[0].const_data_ptr(), t[1].const_data_ptr(), t[2].const_data_ptr(),
          t[3].const_data_ptr(), t[4].const_data_ptr(), t[5].const_data_ptr()};
}

Tensor router_pool_op(const Tensor& tokens_in, const Tensor& query_token_in, const std::vector<Tensor>& first,
                      const std::vector<Tensor>& later, int64_t heads, int64_t skip, double eps) {
  check_kernels(tokens_in, kOp);
  VICO_CHECK(on_cuda(tokens_in), kOp, "there is a kernel for CUDA alone, got tokens on ", device_string(tokens_in),
             ": functional.router_pool computes the same there");
  RouterPoolParams p;
  AttentionPoolShape& s = p.shape;
  s.dtype = float_dtype(tokens_in, "tokens", kOp);
  check_shape(tokens_in, {-1, -1, -1}, "tokens", "[tiles, skip + tokens, channels]", kOp);
  VICO_CHECK(skip >= 0 && tokens_in.size(1) > skip, kOp, "tokens must hold at least one token per tile after the ",
             "first ", skip, ", which are skipped, got shape ", shape_string(tokens_in));
  s.tiles = tokens_in.size(0);
  s.count = tokens_in.size(1) - skip;
  s.channels = tokens_in.size(2);
  s.heads = heads;
  VICO_CHECK(heads > 0 && s.channels > 0 && s.channels % heads == 0, kOp, "heads must divide the channels, got ", heads,
             " heads for ", s.channels, " channels");
  check_device(query_token_in, tokens_in, "query_token", "tokens", kOp);
  check_same_dtype(query_token_in, tokens_in, "query_token", "tokens", kOp);
  check_shape(query_token_in, {1, s.channels}, "query_token", "[1, channels]", kOp);
  const RoundTensors first_dense = checked_round(first, "first", tokens_in, s.channels);
  const RoundTensors later_dense = checked_round(later, "later", tokens_in, s.channels);

  Tensor pooled = make_tensor(tokens_in, {s.tiles, s.channels});
  if (s.tiles == 0) return pooled;
  const Tensor tokens = with_dense_last_dim(tokens_in), query_token = to_contiguous(query_token_in);
  Tensor rows = make_tensor(tokens, {2, s.tiles, s.channels});
  Tensor per_head = make_tensor(tokens, {2, s.tiles, heads, s.channels});
  Tensor lse = make_tensor(tokens, {s.tiles, heads}, accumulate_type(s.dtype));
  Tensor partial = make_tensor(tokens, {s.cuda_forward_workspace()}, accumulate_type(s.dtype));
  const int64_t bytes = element_size(s.dtype);
  p.tokens = static_cast<const char*>(tokens.const_data_ptr()) + skip * tokens.stride(1) * bytes;
  p.tile_stride = tokens.stride(0);
  p.token_stride = tokens.stride(1);
  p.query_token = query_token.const_data_ptr();
  p.first = attention_of(first_dense);
  p.later = attention_of(later_dense);
  p.eps = eps;
  p.pooled = pooled.mutable_data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.rows[i] = static_cast<char*>(rows.mutable_data_ptr()) + i * s.tiles * s.channels * bytes;
    p.heads[i] = static_cast<char*>(per_head.mutable_data_ptr()) + i * s.tiles * heads * s.channels * bytes;
  }
  p.lse = lse.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  VICO_CUDA_CALL(router_pool, p, tokens);
  return pooled;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) { m.impl("router_pool", TORCH_BOX(&vico::router_pool_op)); }
