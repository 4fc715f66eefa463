// What the CUDA kernels of pixel_shuffle and normalized_shuffle share: a shuffled row as packs, launch sizes.
#pragma once

#include <stdexcept>
#include <string>

#include "common/divide.h"
#include "common/pack.cuh"
#include "common/shuffle.h"

namespace vico {

// The packs of one output token, and where in its block of ViT tokens each comes from.
struct ShuffleRow {
  unsigned packs_per_token, packs;

  VICO_INLINE ShuffleRow(const ShuffleShape& s, int pack_width)
      : packs_per_token(static_cast<unsigned>(s.channels / pack_width)),
        packs(static_cast<unsigned>(s.out_channels() / pack_width)) {}

  // Offset in elements of a pack of `pack_width` from the block's first token.
  VICO_INLINE int64_t source(const ShuffleShape& s, unsigned pack, int pack_width) const {
    const unsigned token = pack / packs_per_token, rate = static_cast<unsigned>(s.rate);
    return s.row_offset(token / rate) + token % rate * s.token_stride + pack % packs_per_token * pack_width;
  }
};

// Where the ViT tokens of output tokens are, for kernels that go from row to row: 64-bit divisions for each would cost
// more than the row. At most 2^31 - 1 rows.
class TokenBlocks {
 public:
  TokenBlocks() = default;
  explicit TokenBlocks(const ShuffleShape& s)
      : per_tile_(s.out_tokens()),
        per_line_(s.transposed ? s.out_h() : s.out_w()),
        first_(s.skip * s.token_stride),
        line_stride_((s.transposed ? 1 : s.grid_w) * s.rate * s.token_stride),
        block_stride_((s.transposed ? s.grid_w : 1) * s.rate * s.token_stride) {}

  VICO_INLINE uint32_t tile(uint32_t row) const { return per_tile_.quotient(row); }
  VICO_INLINE uint32_t token(uint32_t row, uint32_t tile) const { return per_tile_.remainder(row, tile); }
  // ShuffleShape::block_offset of output token `token` of a tile.
  VICO_INLINE int64_t offset(uint32_t token) const {
    const uint32_t line = per_line_.quotient(token);
    return first_ + line * line_stride_ + per_line_.remainder(token, line) * block_stride_;
  }

 private:
  Divisor per_tile_, per_line_;
  int64_t first_ = 0, line_stride_ = 0, block_stride_ = 0;
};

// The buffer's tile of an output tile, checked: the host does not see the device's tile index.
VICO_DEVICE int64_t checked_source_tile(const ShuffleShape& s, int64_t selected) {
  const int64_t tile = s.source_tile(selected);
  VICO_DEVICE_CHECK(tile >= 0 && tile < s.tiles, "tile_index must lie in [0, %lld), got %lld at position %lld",
                    static_cast<long long>(s.tiles), static_cast<long long>(tile), static_cast<long long>(selected));
  return tile;
}

// The output tiles made of one tile of the buffer: entries [first, last) of selected_tiles, or, without a map, itself.
struct Selection {
  int64_t first, last;
  const int64_t* selected_tiles;

  VICO_INLINE Selection(int64_t tile, const int64_t* tile_offsets, const int64_t* selected)
      : first(tile_offsets ? tile_offsets[tile] : tile),
        last(tile_offsets ? tile_offsets[tile + 1] : tile + 1),
        selected_tiles(selected) {}
  VICO_INLINE int64_t tile(int64_t k) const { return selected_tiles ? selected_tiles[k] : k; }
};

inline void check_shuffle_launch(const ShuffleShape& s, int64_t blocks) {
  constexpr int64_t kMax = INT32_MAX;
  if (s.out_channels() > kMax || blocks > kMax) {
    throw std::runtime_error("a pixel shuffle with rows of " + std::to_string(s.out_channels()) + " channels in " +
                             std::to_string(blocks) + " blocks: CUDA kernels take up to 2^31 - 1 of each");
  }
}

constexpr unsigned round_up(unsigned n, unsigned to) { return (n + to - 1) / to * to; }

}  // namespace vico
