// pack_tokens: the rows of both connectors, each plus its bias, written to their places: in the packed order, or in a
// buffer that holds other rows too.
#pragma once

#include "common/column_sum.h"
#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// The source rows are those of `full` [full_tiles, full_tokens, hidden], then of `compressed` [compressed_tiles,
// compressed_tokens, hidden]. Row j of source tile i goes to row first_row[order[i]] + j of the output.
struct PackShape {
  int64_t full_tiles = 0, full_tokens = 0;
  int64_t compressed_tiles = 0, compressed_tokens = 0;
  int64_t hidden = 0;
  // Packed: tiles follow each other, and the output has just their rows. Else no two tiles may share a row.
  bool packed = true;
  int64_t buffer_rows = 0;             // not packed: rows of the output
  const int64_t* first_row = nullptr;  // [tiles], tiles = full_tiles + compressed_tiles; packed: cu_tokens [tiles + 1]
  const int64_t* order = nullptr;      // [tiles], a permutation

  VICO_INLINE int64_t tiles() const { return full_tiles + compressed_tiles; }
  VICO_INLINE int64_t tile_tokens(int64_t i) const { return i < full_tiles ? full_tokens : compressed_tokens; }
  VICO_INLINE int64_t full_rows() const { return full_tiles * full_tokens; }
  VICO_INLINE int64_t compressed_rows() const { return compressed_tiles * compressed_tokens; }
  VICO_INLINE int64_t rows() const { return full_rows() + compressed_rows(); }

  // The output's row for source row r of `full`, or of `compressed`.
  VICO_INLINE int64_t out_row(bool is_full, int64_t r) const {
    const int64_t tokens = is_full ? full_tokens : compressed_tokens;
    return first_row[order[(is_full ? 0 : full_tiles) + r / tokens]] + r % tokens;
  }
};

struct PackTokensParams {
  PackShape shape;
  Dtype dtype = Dtype::kFloat;
  const void* full = nullptr;             // contiguous
  const void* compressed = nullptr;       // contiguous
  const void* full_bias = nullptr;        // [hidden], float, or double where the tokens are double; null: none
  const void* compressed_bias = nullptr;  // likewise
  bool element_full_bias = false;         // CUDA: the bias is of type `dtype` instead
  bool element_compressed_bias = false;
  void* out = nullptr;     // [rows or buffer_rows, hidden]; must not alias any input
  int64_t out_stride = 0;  // elements between its rows; channels are next to each other
};

struct PackTokensBackwardParams {
  PackShape shape;  // packed
  Dtype dtype = Dtype::kFloat;
  const void* grad_out = nullptr;   // [rows, hidden], contiguous
  void* grad_full = nullptr;        // contiguous
  void* grad_compressed = nullptr;  // contiguous
  // [full chunks + compressed chunks, hidden], type of the biases: sums over the rows of each chunk
  void* partials = nullptr;
  int64_t chunk_rows = kChunkRows;  // CUDA: rows per chunk
};

// Source rows [begin, end).
VICO_CPU_KERNEL(pack_tokens, const PackTokensParams&, int64_t begin, int64_t end)
void pack_tokens_cuda(const PackTokensParams& p, cudaStream_t stream);
// Chunks [begin, end) of kChunkRows rows each (common/column_sum.h), those of `full` first.
VICO_CPU_KERNEL(pack_tokens_backward, const PackTokensBackwardParams&, int64_t begin, int64_t end)
void pack_tokens_backward_cuda(const PackTokensBackwardParams& p, cudaStream_t stream);

}  // namespace vico
