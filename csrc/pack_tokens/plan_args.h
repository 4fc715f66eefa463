// The plan arguments of ops that write the packed order, checked.
#pragma once

#include <utility>
#include <vector>

#include "door/door.h"
#include "pack_tokens/pack_tokens.h"

namespace vico {

// Checks that `order` and `cu_tokens` are a plan of just these tiles and tokens, and puts them into the shape: what
// passes here can address nothing outside the tensors. On CUDA the kernels check the values. `like`, called
// `like_name`, is a tensor of the call.
inline void check_plan(const Tensor& cu_tokens, const Tensor& order, const Tensor& like, const char* like_name,
                       PackShape& s, const char* op) {
  const int64_t tiles = s.full_tiles + s.compressed_tiles;
  for (const auto& [t, name] : {std::pair{&cu_tokens, "cu_tokens"}, std::pair{&order, "order"}}) {
    check_device(*t, like, name, like_name, op);
    check_dtype(*t, ScalarType::Long, name, "int64", op);
  }
  check_shape(cu_tokens, {tiles + 1}, "cu_tokens", "[full tiles + compressed tiles + 1]", op);
  check_shape(order, {tiles}, "order", "[full tiles + compressed tiles]", op);
  VICO_CHECK(cu_tokens.is_contiguous() && order.is_contiguous(), op, "cu_tokens and order must be contiguous");
  s.cu_tokens = cu_tokens.const_data_ptr<int64_t>();
  s.order = order.const_data_ptr<int64_t>();
  if (on_cuda(like)) return;
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

}  // namespace vico
