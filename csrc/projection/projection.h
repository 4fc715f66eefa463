// projection: one layer of the connectors' projections for both connectors at once, each a group of rows with its own
// weight:
//
//   z = A W^T + bias,  out = z, or gelu(z) * keep  with exact GELU and keep 0 or 1 / (1 - p)
//
// A is rows of memory, or the ViT's tokens read through their pixel-shuffled view. With LayerNorm folded in, W is the
// layer's weight times the norm's gain, and z = rstd (A W^T - mean gain_sum) + bias.
#pragma once

#include "bias_gelu/bias_gelu.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"
#include "common/shuffle.h"

namespace vico {

struct ProjectionGroup {
  int64_t rows = 0;     // M; 0: the group is empty, and nothing of it is touched
  int64_t columns = 0;  // N
  int64_t depth = 0;    // K

  const void* a = nullptr;  // row m at a + m * a_stride; or, if `shuffled`, the ViT's buffer as `shape` describes it
  int64_t a_stride = 0;     // elements
  bool shuffled = false;    // rows = shape.selected * shape.out_tokens(), depth = shape.out_channels()
  ShuffleShape shape;

  const void* weight = nullptr;  // [columns, depth], contiguous
  const float* bias = nullptr;   // [columns]; null: none

  // LayerNorm folded in; all three or none.
  const float* mean = nullptr;      // [rows]
  const float* rstd = nullptr;      // [rows]
  const float* gain_sum = nullptr;  // [columns], sums of the rows of `weight`

  bool gelu = false;
  DropoutMask mask;  // element (m, n) is number m * columns + n, as in bias_gelu of this group's [rows, columns]

  // Row m is number m % tile_rows of tile t = m / tile_rows. It is written to row out_row[out_tile[t]] + m % tile_rows
  // of `out`, or, if out_tile is null, out_row[t] + m % tile_rows; if both are null, to row m. No two to one place.
  void* out = nullptr;                // must not alias any input
  int64_t out_stride = 0;             // elements
  int64_t out_rows = 0;               // rows of `out`; places outside end the kernel with a message
  const int64_t* out_row = nullptr;   // [out_tiles], first row of each tile
  const int64_t* out_tile = nullptr;  // [rows / tile_rows]
  int64_t out_tiles = 0;
  int64_t tile_rows = 1;
};

struct ProjectionParams {
  Dtype dtype = Dtype::kBFloat16;  // of A, W and out: bfloat16 or float16
  ProjectionGroup group[2];
};

// On the current device, for bfloat16 and float16 alone; launches nothing where there are no rows.
void projection_cuda(const ProjectionParams& p, cudaStream_t stream);

}  // namespace vico
