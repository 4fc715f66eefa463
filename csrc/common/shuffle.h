// The geometry that pixel_shuffle and normalized_shuffle share: which ViT tokens make up which output token.
// Torch-free, for host and device code alike.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vico {

// ViT tokens seen as a grid per tile, shuffled at rate x rate. All strides are in elements.
//
// Output token (h', w') of a tile is the concatenation over (i, j) in [0, rate)^2, row-major, of
// x[(rate * h' + i), (rate * w' + j), :]; its channel index is (i * rate + j) * channels + c.
struct ShuffleShape {
  int64_t tiles = 0;                    // tiles in the ViT's buffer
  int64_t grid_h = 0;                   // token rows per tile, divisible by rate
  int64_t grid_w = 0;                   // token columns per tile, divisible by rate
  int64_t channels = 0;                 // V
  int64_t rate = 2;                     // r
  int64_t skip = 0;                     // leading tokens of each tile left out (the CLS token)
  int64_t tile_stride = 0;              // of the ViT's buffer
  int64_t token_stride = 0;             // of the ViT's buffer; channels are next to each other
  bool transposed = false;              // ps_version v1: the output grid is left transposed
  int64_t selected = 0;                 // tiles in the output
  const int64_t* tile_index = nullptr;  // [selected], the buffer's tile of each output tile; null: the identity

  VICO_INLINE int64_t out_h() const { return grid_h / rate; }
  VICO_INLINE int64_t out_w() const { return grid_w / rate; }
  VICO_INLINE int64_t out_tokens() const { return out_h() * out_w(); }
  VICO_INLINE int64_t out_channels() const { return rate * rate * channels; }

  VICO_INLINE int64_t source_tile(int64_t selected_tile) const {
    return tile_index ? tile_index[selected_tile] : selected_tile;
  }

  // Offset of the first ViT token of output token `t` (of out_tokens()) within its tile's buffer.
  VICO_INLINE int64_t block_offset(int64_t t) const {
    const int64_t h = transposed ? t % out_h() : t / out_w();
    const int64_t w = transposed ? t / out_h() : t % out_w();
    return (skip + h * rate * grid_w + w * rate) * token_stride;
  }
  // Offset of row i of the block from the block's first token; its tokens are `token_stride` apart.
  VICO_INLINE int64_t row_offset(int64_t i) const { return i * grid_w * token_stride; }
};

// The geometry of a contiguous buffer [tiles, skip + grid_h * grid_w, channels], such as a gradient.
VICO_INLINE ShuffleShape contiguous(ShuffleShape s) {
  s.token_stride = s.channels;
  s.tile_stride = (s.skip + s.grid_h * s.grid_w) * s.channels;
  return s;
}

// Whether the tokens of a block are so near each other that packs between them can be counted in 32 bits.
VICO_INLINE bool has_near_tokens(const ShuffleShape& s, int64_t pack_width) {
  return s.row_offset(s.rate) / pack_width <= UINT32_MAX;
}

// Whether all tokens begin at multiples of 16 bytes.
VICO_INLINE bool has_aligned_tokens(const ShuffleShape& s, int64_t element_bytes, const void* tokens) {
  return is_aligned16(tokens) && s.channels * element_bytes % 16 == 0 && s.token_stride * element_bytes % 16 == 0 &&
         s.tile_stride * element_bytes % 16 == 0;
}

}  // namespace vico
