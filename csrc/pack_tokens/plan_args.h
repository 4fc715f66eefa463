// The plan arguments of ops that write tiles' rows to their places, checked.
#pragma once

#include <utility>
#include <vector>

#include "door/door.h"
#include "pack_tokens/pack_tokens.h"

namespace vico {

namespace detail {

// Checks an int64 vector [size] beside `like`, and gives its values.
inline const int64_t* plan_data(const Tensor& t, int64_t size, const char* name, const char* wanted, const Tensor& like,
                                const char* like_name, const char* op) {
  check_device(t, like, name, like_name, op);
  check_dtype(t, ScalarType::Long, name, "int64", op);
  check_shape(t, {size}, name, wanted, op);
  VICO_CHECK(t.is_contiguous(), op, name, " must be contiguous");
  return t.const_data_ptr<int64_t>();
}

// fn(i, tile) for the tile that source tile i is, once it has turned out to be one that was not there before.
template <class Fn>
void for_checked_order(const PackShape& s, const char* op, const Fn& fn) {
  std::vector<bool> seen(s.tiles());
  for (int64_t i = 0; i < s.tiles(); ++i) {
    const int64_t tile = s.order[i];
    VICO_CHECK(tile >= 0 && tile < s.tiles() && !seen[tile], op, "order must hold each tile of [0, ", s.tiles(),
               ") once, got ", tile, " at position ", i);
    seen[tile] = true;
    fn(i, tile);
  }
}

}  // namespace detail

// Checks that `order` and `cu_tokens` are a plan of just these tiles and tokens, and puts them into the shape: what
// passes here can address nothing outside the tensors. On CUDA the kernels check the values. `like`, called
// `like_name`, is a tensor of the call.
inline void check_plan(const Tensor& cu_tokens, const Tensor& order, const Tensor& like, const char* like_name,
                       PackShape& s, const char* op) {
  s.first_row = detail::plan_data(cu_tokens, s.tiles() + 1, "cu_tokens", "[full tiles + compressed tiles + 1]", like,
                                  like_name, op);
  s.order = detail::plan_data(order, s.tiles(), "order", "[full tiles + compressed tiles]", like, like_name, op);
  if (on_cuda(like)) return;
  VICO_CHECK(s.first_row[0] == 0, op, "cu_tokens must begin with 0, got ", s.first_row[0]);
  detail::for_checked_order(s, op, [&](int64_t i, int64_t tile) {
    const int64_t tokens = s.tile_tokens(i);
    // By subtraction of checked signs, so that hostile offsets cannot overflow.
    const int64_t from = s.first_row[tile], to = s.first_row[tile + 1];
    VICO_CHECK(from >= 0 && to >= 0 && to - from == tokens, op, "cu_tokens gives tile ", tile, " rows ", from, " to ",
               to, ", but it is a ", i < s.full_tiles ? "full" : "compressed", " tile of ", tokens,
               " tokens: is the plan of another batch?");
  });
}

// The same for a buffer: checks that `first_row` gives these tiles rows of `out` [rows, hidden] that no two share.
inline void check_places(const Tensor& first_row, const Tensor& order, const Tensor& out, const Tensor& like,
                         const char* like_name, PackShape& s, const char* op) {
  s.packed = false;
  s.buffer_rows = out.size(0);
  s.first_row =
      detail::plan_data(first_row, s.tiles(), "first_row", "[full tiles + compressed tiles]", like, like_name, op);
  s.order = detail::plan_data(order, s.tiles(), "order", "[full tiles + compressed tiles]", like, like_name, op);
  if (on_cuda(like)) return;
  std::vector<int64_t> by_place(s.tiles());  // source tiles
  detail::for_checked_order(s, op, [&](int64_t i, int64_t tile) {
    const int64_t tokens = s.tile_tokens(i), from = s.first_row[tile];
    VICO_CHECK(from >= 0 && from <= s.buffer_rows - tokens, op, "first_row gives tile ", tile, " rows from ", from,
               " on, but it has ", tokens, " tokens, and out ", s.buffer_rows, " rows");
    by_place[i] = i;
  });
  const auto from = [&](int64_t i) { return s.first_row[s.order[i]]; };
  const auto place = [&](int64_t i) { return std::pair{from(i), s.tile_tokens(i)}; };  // tiles of no rows go first
  std::sort(by_place.begin(), by_place.end(), [&](int64_t a, int64_t b) { return place(a) < place(b); });
  for (int64_t k = 0; k + 1 < s.tiles(); ++k) {
    const int64_t i = by_place[k], to = from(i) + s.tile_tokens(i);
    VICO_CHECK(to <= from(by_place[k + 1]), op, "first_row gives tile ", s.order[i], " rows ", from(i), " to ", to,
               ", and some of them to another tile too");
  }
}

// Checks the buffer [rows, hidden] that rows like those of `like` are written into.
inline void check_out(const Tensor& out, int64_t hidden, const Tensor& like, const char* like_name, const char* op) {
  check_device(out, like, "out", like_name, op);
  check_same_dtype(out, like, "out", like_name, op);
  check_shape(out, {-1, hidden}, "out", "[rows, hidden]", op);
  check_rows_in_place(out, "out", op);
}

// Checks that the buffer has no memory in common with what is read meanwhile.
inline void check_apart(const Tensor& out,
                        std::initializer_list<std::pair<const std::optional<Tensor>, const char*>> inputs,
                        const char* op) {
  for (const auto& [t, name] : inputs) {
    VICO_CHECK(!t || !may_share_memory(out, *t), op, name,
               " must not share memory with out, which is written in place: pass ", name, ".clone()");
  }
}

}  // namespace vico
