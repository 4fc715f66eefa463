// compress_sequence: which positions of a batch of token ids stay when tiles are compressed, where each position of the
// shorter batch comes from, its position ids, and where tiles begin in it. Integers only; one thread per row of the
// batch (or tile), or one block.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// A tile owns `full_tokens` consecutive placeholders of one row, tiles in reading order; a compressed one keeps its
// first `compressed_tokens`. Padding is what the mask leaves out at the two ends of a row.
struct KeepPlaceholdersParams {
  int64_t rows = 0;         // B
  int64_t length = 0;       // L
  int64_t tiles = 0;        // P
  int64_t placeholder = 0;  // token id
  int64_t full_tokens = 0;
  int64_t compressed_tokens = 0;            // <= full_tokens
  const int64_t* input_ids = nullptr;       // [B, L], contiguous
  const unsigned char* mask = nullptr;      // [B, L], contiguous, 0 or 1; null: no padding
  const unsigned char* compress = nullptr;  // [tiles], 0 or 1
  int64_t* begin = nullptr;                 // [B], first position of the row that is no padding
  int64_t* end = nullptr;                   // [B], one past the last such position
  int64_t* placeholders = nullptr;          // [B], placeholders in [begin, end)
  const int64_t* first_tile = nullptr;      // CPU: [B], tiles before the row
  unsigned char* keep = nullptr;            // [B, L], 0 or 1
  int64_t* counts = nullptr;                // [B], positions kept
  int64_t* broken = nullptr;                // CPU: [B], where a tile begins that lacks placeholders; -1: nowhere
};

struct CompressSequenceParams {
  int64_t rows = 0;        // B
  int64_t length = 0;      // L
  int64_t out_length = 0;  // L'
  int64_t placeholder = 0;
  bool pad_left = false;
  const int64_t* input_ids = nullptr;     // [B, L], contiguous
  const unsigned char* keep = nullptr;    // [B, L], contiguous, 0 or 1
  int64_t* counts = nullptr;              // [B], positions kept, <= out_length
  int64_t* visual = nullptr;              // [B], placeholders kept
  const int64_t* first_visual = nullptr;  // CPU: [B], placeholders kept before the row
  int64_t* position = nullptr;            // [B, L']: the flat position it comes from, -1 for padding
  int64_t* source = nullptr;              // [B, L']: -1 padding, flat position of text, B * L + running placeholder
};

struct RenumberPositionsParams {
  int64_t rows = 0;                       // B
  int64_t length = 0;                     // L
  int64_t out_length = 0;                 // L'
  int64_t row_stride = 0;                 // of position_ids; 0 where all rows share one
  const int64_t* position_ids = nullptr;  // [B, L], elements of a row next to each other
  const int64_t* position = nullptr;      // [B, L'], contiguous: flat positions ascending within a row, -1 for padding
  int64_t* out = nullptr;                 // [B, L']
  int64_t* broken = nullptr;              // CPU: [B], first output position whose `position` is wrong; -1: none
  int64_t* column = nullptr;              // CUDA: [B, L], workspace
};

// Tile t's tokens are numbers embed_rows + cu_tokens[t] .. embed_rows + cu_tokens[t + 1] of `source`, in rows one after
// another: out[t] is the first. Numbers of tokens ascend, so that number embed_rows + k is in row k or later.
struct TileRowsParams {
  int64_t rows = 0;                    // N
  int64_t tiles = 0;                   // P
  int64_t embed_rows = 0;              // R; R + N can be counted
  const int64_t* source = nullptr;     // [N], contiguous; as of CompressSequenceParams, in one row
  const int64_t* cu_tokens = nullptr;  // [P + 1], contiguous
  int64_t* out = nullptr;              // [P]; CPU: -1 where the tile's tokens are not there
};

// All over rows [begin, end) of B; tile_rows over tiles [begin, end).
VICO_CPU_KERNEL(count_placeholders, const KeepPlaceholdersParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(keep_placeholders, const KeepPlaceholdersParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(count_kept, const CompressSequenceParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(compress_sequence, const CompressSequenceParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(renumber_positions, const RenumberPositionsParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(tile_rows, const TileRowsParams&, int64_t begin, int64_t end)

void keep_placeholders_cuda(const KeepPlaceholdersParams& p, cudaStream_t stream);
void compress_sequence_cuda(const CompressSequenceParams& p, cudaStream_t stream);
void renumber_positions_cuda(const RenumberPositionsParams& p, cudaStream_t stream);
void tile_rows_cuda(const TileRowsParams& p, cudaStream_t stream);

}  // namespace vico
