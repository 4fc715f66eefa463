// The door of compress_sequence: checks, allocation, threads or launch.
#include "compress_sequence/compress_sequence.h"
#include "door/door.h"

namespace vico {
namespace {

const unsigned char* bool_data(const Tensor& t) { return static_cast<const unsigned char*>(t.const_data_ptr()); }

// input_ids [rows, length] int64, contiguous.
Tensor checked_ids(const Tensor& input_ids, const char* op) {
  check_kernels(input_ids, op);
  check_dtype(input_ids, ScalarType::Long, "input_ids", "int64", op);
  check_shape(input_ids, {-1, -1}, "input_ids", "[rows, length]", op);
  return to_contiguous(input_ids);
}

// A bool tensor of the shape of input_ids, contiguous.
Tensor checked_bool_like(const Tensor& t, const Tensor& input_ids, const char* name, const char* op) {
  check_device(t, input_ids, name, "input_ids", op);
  check_dtype(t, ScalarType::Bool, name, "bool", op);
  check_shape(t, {input_ids.size(0), input_ids.size(1)}, name, "that of input_ids", op);
  return to_contiguous(t);
}

// Where a tile lacks placeholders: the first such row says where, and how many there are.
void check_unbroken(const KeepPlaceholdersParams& p, int64_t rows, const char* op) {
  for (int64_t b = 0; b < rows; ++b) {
    if (p.broken[b] < 0) continue;
    const int64_t* ids = p.input_ids + b * p.length;
    int64_t stop = p.broken[b];
    while (stop < p.end[b] && ids[stop] == p.placeholder) ++stop;
    const int64_t found = stop - p.broken[b];
    detail::fail(op, "every tile must own ", p.full_tokens, " consecutive placeholders (id ", p.placeholder,
                 ") of one row, got only ", found, " at row ", b, ", position ", p.broken[b],
                 stop == p.end[b] ? ", where the row ends" : ", before another token");
  }
}

std::tuple<Tensor, Tensor> keep_placeholders_op(const Tensor& input_ids_in, const std::optional<Tensor>& mask_in,
                                                const Tensor& compress_in, int64_t placeholder, int64_t full_tokens,
                                                int64_t compressed_tokens) {
  constexpr const char* kOp = "keep_placeholders";
  const Tensor input_ids = checked_ids(input_ids_in, kOp);
  std::optional<Tensor> mask;
  if (mask_in) mask = checked_bool_like(*mask_in, input_ids, "attention_mask", kOp);
  check_device(compress_in, input_ids, "compress", "input_ids", kOp);
  check_dtype(compress_in, ScalarType::Bool, "compress", "bool", kOp);
  check_shape(compress_in, {-1}, "compress", "[tiles]", kOp);
  check_tile_tokens(full_tokens, compressed_tokens, compress_in.numel(), kOp);
  const Tensor compress = to_contiguous(compress_in);
  const int64_t rows = input_ids.size(0), length = input_ids.size(1), tiles = compress.numel();
  Tensor keep = make_tensor(input_ids, {rows, length}, ScalarType::Bool);
  Tensor counts = make_tensor(input_ids, {rows});
  KeepPlaceholdersParams p;
  p.rows = rows;
  p.length = length;
  p.tiles = tiles;
  p.placeholder = placeholder;
  p.full_tokens = full_tokens;
  p.compressed_tokens = compressed_tokens;
  p.input_ids = input_ids.const_data_ptr<int64_t>();
  p.mask = mask ? bool_data(*mask) : nullptr;
  p.compress = bool_data(compress);
  p.keep = static_cast<unsigned char*>(keep.mutable_data_ptr());
  p.counts = counts.mutable_data_ptr<int64_t>();
  const auto check_total = [&](int64_t total) {
    VICO_CHECK(total == tiles * full_tokens, kOp, "input_ids must hold ", tiles * full_tokens, " placeholders (id ",
               placeholder, ") in the whole batch, padding left out: ", tiles, " tiles of the plan times ", full_tokens,
               ", got ", total, ". Is the plan that of this batch, and are the ids not compressed yet?");
  };
  if (on_cuda(input_ids)) {
    if (rows == 0) check_total(0);
    Tensor row_facts = make_tensor(input_ids, {3, rows});
    p.begin = row_facts.mutable_data_ptr<int64_t>();
    p.end = p.begin + rows;
    p.placeholders = p.end + rows;
    VICO_CUDA_CALL(keep_placeholders, p, input_ids);
    return {keep, counts};
  }
  std::vector<int64_t> begin(rows), end(rows), placeholders(rows), first_tile(rows), broken(rows);
  p.begin = begin.data();
  p.end = end.data();
  p.placeholders = placeholders.data();
  p.first_tile = first_tile.data();
  p.broken = broken.data();
  parallel_rows(rows, length, [&](int64_t b, int64_t e) { VICO_CPU_CALL(count_placeholders, p, b, e); });
  int64_t total = 0;
  for (int64_t b = 0; b < rows; ++b) {
    first_tile[b] = total / full_tokens;
    total += placeholders[b];
  }
  check_total(total);
  parallel_rows(rows, length, [&](int64_t b, int64_t e) { VICO_CPU_CALL(keep_placeholders, p, b, e); });
  check_unbroken(p, rows, kOp);
  return {keep, counts};
}

std::tuple<Tensor, Tensor> compress_sequence_op(const Tensor& input_ids_in, const Tensor& keep_in, int64_t placeholder,
                                                int64_t length, bool pad_left) {
  constexpr const char* kOp = "compress_sequence";
  const Tensor input_ids = checked_ids(input_ids_in, kOp);
  const Tensor keep = checked_bool_like(keep_in, input_ids, "keep", kOp);
  VICO_CHECK(length >= 0, kOp, "length must not be negative, got ", length);
  CompressSequenceParams p;
  p.rows = input_ids.size(0);
  p.length = input_ids.size(1);
  p.out_length = length;
  p.placeholder = placeholder;
  p.pad_left = pad_left;
  p.input_ids = input_ids.const_data_ptr<int64_t>();
  p.keep = bool_data(keep);
  Tensor position = make_tensor(input_ids, {p.rows, length}), source = make_tensor(input_ids, {p.rows, length});
  p.position = position.mutable_data_ptr<int64_t>();
  p.source = source.mutable_data_ptr<int64_t>();
  if (on_cuda(input_ids)) {
    Tensor row_facts = make_tensor(input_ids, {2, p.rows});
    p.counts = row_facts.mutable_data_ptr<int64_t>();
    p.visual = p.counts + p.rows;
    VICO_CUDA_CALL(compress_sequence, p, input_ids);
    return {position, source};
  }
  std::vector<int64_t> counts(p.rows), visual(p.rows), first_visual(p.rows);
  p.counts = counts.data();
  p.visual = visual.data();
  p.first_visual = first_visual.data();
  parallel_rows(p.rows, p.length, [&](int64_t b, int64_t e) { VICO_CPU_CALL(count_kept, p, b, e); });
  int64_t total = 0;
  for (int64_t b = 0; b < p.rows; ++b) {
    VICO_CHECK(counts[b] <= length, kOp, "length must be at least the ", counts[b], " positions that row ", b,
               " keeps, got ", length);
    first_visual[b] = total;
    total += visual[b];
  }
  parallel_rows(p.rows, p.length + length, [&](int64_t b, int64_t e) { VICO_CPU_CALL(compress_sequence, p, b, e); });
  return {position, source};
}

Tensor renumber_positions_op(const Tensor& position_ids_in, const Tensor& position_in) {
  constexpr const char* kOp = "renumber_positions";
  check_kernels(position_ids_in, kOp);
  check_device(position_in, position_ids_in, "position", "position_ids", kOp);
  check_dtype(position_ids_in, ScalarType::Long, "position_ids", "int64", kOp);
  check_dtype(position_in, ScalarType::Long, "position", "int64", kOp);
  check_shape(position_ids_in, {-1, -1}, "position_ids", "[rows, length]", kOp);
  const int64_t rows = position_ids_in.size(0);
  check_shape(position_in, {rows, -1}, "position", "[rows, new length]", kOp);
  const Tensor position_ids = with_dense_last_dim(position_ids_in), position = to_contiguous(position_in);
  Tensor out = make_tensor(position, {rows, position.size(1)});
  if (out.numel() == 0) return out;
  RenumberPositionsParams p;
  p.rows = rows;
  p.length = position_ids.size(1);
  p.out_length = position.size(1);
  p.row_stride = position_ids.stride(0);
  p.position_ids = position_ids.const_data_ptr<int64_t>();
  p.position = position.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr<int64_t>();
  if (on_cuda(position)) {
    Tensor column = make_tensor(position, {rows, p.length});
    p.column = column.mutable_data_ptr<int64_t>();
    VICO_CUDA_CALL(renumber_positions, p, position);
    return out;
  }
  std::vector<int64_t> broken(rows);
  p.broken = broken.data();
  parallel_rows(rows, p.length + p.out_length,
                [&](int64_t b, int64_t e) { VICO_CPU_CALL(renumber_positions, p, b, e); });
  for (int64_t b = 0; b < rows; ++b) {
    VICO_CHECK(broken[b] < 0, kOp, "position must hold flat positions of its own row, ascending, or -1: row ", b,
               " has ", p.position[b * p.out_length + broken[b]], " at position ", broken[b], " for a length of ",
               p.length);
  }
  return out;
}

Tensor tile_rows_op(const Tensor& source_in, const Tensor& cu_tokens_in, int64_t embed_rows) {
  constexpr const char* kOp = "tile_rows";
  check_kernels(source_in, kOp);
  check_device(cu_tokens_in, source_in, "cu_tokens", "source", kOp);
  check_dtype(source_in, ScalarType::Long, "source", "int64", kOp);
  check_dtype(cu_tokens_in, ScalarType::Long, "cu_tokens", "int64", kOp);
  check_shape(source_in, {-1}, "source", "[rows]", kOp);
  check_shape(cu_tokens_in, {-1}, "cu_tokens", "[tiles + 1]", kOp);
  VICO_CHECK(cu_tokens_in.numel() > 0, kOp, "cu_tokens must have shape [tiles + 1], got [0]");
  TileRowsParams p;
  p.rows = source_in.numel();
  p.tiles = cu_tokens_in.numel() - 1;
  p.embed_rows = embed_rows;
  VICO_CHECK(embed_rows >= 0 && embed_rows <= std::numeric_limits<int64_t>::max() - p.rows, kOp,
             "embed_rows must not be negative nor more than can be counted, got ", embed_rows);
  const Tensor source = to_contiguous(source_in), cu_tokens = to_contiguous(cu_tokens_in);
  Tensor out = make_tensor(source, {p.tiles});
  p.source = source.const_data_ptr<int64_t>();
  p.cu_tokens = cu_tokens.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr<int64_t>();
  if (on_cuda(source)) {
    VICO_CUDA_CALL(tile_rows, p, source);
    return out;
  }
  parallel_rows(p.tiles, 2 * p.rows / std::max<int64_t>(1, p.tiles),
                [&](int64_t begin, int64_t end) { VICO_CPU_CALL(tile_rows, p, begin, end); });
  for (int64_t t = 0; t < p.tiles; ++t) {
    VICO_CHECK(p.out[t] >= 0, kOp, "source must hold the tokens of tile ", t, ", ", p.cu_tokens[t], " to ",
               p.cu_tokens[t + 1], " of cu_tokens behind ", embed_rows,
               " rows of embeddings, one after another: is the plan of another batch?");
  }
  return out;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("keep_placeholders", TORCH_BOX(&vico::keep_placeholders_op));
  m.impl("compress_sequence", TORCH_BOX(&vico::compress_sequence_op));
  m.impl("tile_rows", TORCH_BOX(&vico::tile_rows_op));
  m.impl("renumber_positions", TORCH_BOX(&vico::renumber_positions_op));
}
