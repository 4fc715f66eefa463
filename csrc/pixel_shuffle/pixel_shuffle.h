// pixel_shuffle: space-to-depth on the ViT's token grid, gathered by tile. Pure data movement, any element type.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/shuffle.h"

namespace vico {

struct PixelShuffleParams {
  ShuffleShape shape;
  int64_t element_size = 0;      // bytes
  const char* tokens = nullptr;  // ViT buffer, strides as in `shape`
  char* out = nullptr;           // [selected, out_tokens, out_channels], contiguous; must not alias `tokens`
};

struct PixelShuffleBackwardParams {
  ShuffleShape shape;  // tile_index unused: see tile_offsets
  Dtype dtype = Dtype::kFloat;
  const void* grad_out = nullptr;  // [selected, out_tokens, out_channels], contiguous
  void* grad_tokens = nullptr;     // [tiles, skip + grid_h * grid_w, channels], contiguous
  // The output tiles made of buffer tile t are selected_tiles[tile_offsets[t] .. tile_offsets[t + 1]).
  // CUDA: both null where every tile was selected once, in order.
  const int64_t* tile_offsets = nullptr;    // [tiles + 1]
  const int64_t* selected_tiles = nullptr;  // [selected]
};

// Output tokens [begin, end) of all selected * out_tokens.
VICO_CPU_KERNEL(pixel_shuffle, const PixelShuffleParams&, int64_t begin, int64_t end)
void pixel_shuffle_cuda(const PixelShuffleParams& p, cudaStream_t stream);
// Token rows [begin, end) of all tiles * (1 + grid_h): row 0 of a tile stands for its skipped tokens.
VICO_CPU_KERNEL(pixel_shuffle_backward, const PixelShuffleBackwardParams&, int64_t begin, int64_t end)
void pixel_shuffle_backward_cuda(const PixelShuffleBackwardParams& p, cudaStream_t stream);

}  // namespace vico
