// normalized_shuffle: gather by tile, pixel shuffle and LayerNorm over the shuffled channels in one pass.
//
// With x the row of C = rate^2 * V channels that pixel_shuffle gives for an output token:
//   mean = sum(x) / C,  rstd = 1 / sqrt(sum((x - mean)^2) / C + eps),  out = (x - mean) * rstd * weight + bias.
//
// shuffle_statistics is mean and rstd alone, by the same kernels.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/shuffle.h"

namespace vico {

// "Sum type" below is float, or double where the tokens are double.
struct NormalizedShuffleParams {
  ShuffleShape shape;
  Dtype dtype = Dtype::kFloat;  // of `tokens` and `out`
  double eps = 0;
  const void* tokens = nullptr;     // ViT buffer, strides as in `shape`
  const void* weight = nullptr;     // [out_channels], sum type
  const void* bias = nullptr;       // [out_channels], sum type
  bool element_parameters = false;  // CUDA: weight and bias are of type `dtype` instead
  // [selected, out_tokens, out_channels], contiguous; must not alias `tokens`. Null: the statistics alone, and weight
  // and bias are not read.
  void* out = nullptr;
  void* mean = nullptr;  // [selected, out_tokens], sum type
  void* rstd = nullptr;  // [selected, out_tokens], sum type
};

// Work is ordered by block: block b is output token b % out_tokens of the buffer tile used_tiles[b / out_tokens], for
// all output tiles that were gathered from it. With h = (x - mean) * rstd and g = grad_out * weight:
//   grad_x = rstd * (g - sum(g) / C - h * sum(g * h) / C),  grad_weight = sum of grad_out * h,  grad_bias = of
//   grad_out.
struct NormalizedShuffleBackwardParams {
  ShuffleShape shape;  // CPU: tile_index unused, see used_tiles
  Dtype dtype = Dtype::kFloat;
  const void* grad_out = nullptr;   // [selected, out_tokens, out_channels], contiguous
  const void* tokens = nullptr;     // ViT buffer, strides as in `shape`
  const void* weight = nullptr;     // [out_channels], sum type
  bool element_parameters = false;  // CUDA: weight is of type `dtype` instead
  const void* mean = nullptr;       // [selected, out_tokens], sum type
  const void* rstd = nullptr;       // [selected, out_tokens], sum type
  // The output tiles made of buffer tile t are selected_tiles[tile_offsets[t] .. tile_offsets[t + 1]).
  // CUDA: both null where every tile was selected once, in order; used_tiles is not needed.
  const int64_t* tile_offsets = nullptr;    // [tiles + 1]
  const int64_t* selected_tiles = nullptr;  // [selected]
  const int64_t* used_tiles = nullptr;      // [used], ascending: the buffer tiles with any output tile
  int64_t used = 0;
  void* grad_tokens = nullptr;  // [tiles, skip + grid_h * grid_w, channels], contiguous; null: not wanted
  void* partials = nullptr;  // [chunks, 2, out_channels], sum type: grad_weight and grad_bias of each chunk of blocks
  // CUDA: workspace of as many elements as plan_normalized_shuffle_backward says, sum type; like `partials`, whose
  // chunks it says too, aligned to 16 bytes.
  void* row_means = nullptr;
};

// Output tokens [begin, end) of all selected * out_tokens.
VICO_CPU_KERNEL(normalized_shuffle, const NormalizedShuffleParams&, int64_t begin, int64_t end)
void normalized_shuffle_cuda(const NormalizedShuffleParams& p, cudaStream_t stream);
// Chunks [begin, end) of kChunkRows blocks each (common/column_sum.h), of all used * out_tokens blocks.
VICO_CPU_KERNEL(normalized_shuffle_backward, const NormalizedShuffleBackwardParams&, int64_t begin, int64_t end)
// All of it, grad_tokens of unused tiles and skipped tokens included.
void normalized_shuffle_backward_cuda(const NormalizedShuffleBackwardParams& p, cudaStream_t stream);
// Tiles [begin, end): zeros for the skipped tokens, and for all tokens of tiles that are not used.
VICO_CPU_KERNEL(normalized_shuffle_zero_rest, const NormalizedShuffleBackwardParams&, int64_t begin, int64_t end)

}  // namespace vico
