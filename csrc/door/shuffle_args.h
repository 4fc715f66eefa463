// The checks and the geometry that the doors of pixel_shuffle and normalized_shuffle share.
#pragma once

#include <limits>

#include "common/shuffle.h"
#include "common/tile_map.h"
#include "door/door.h"

namespace vico {

// The grid arguments of both ops, as their schemas have them.
struct GridArgs {
  int64_t grid_h, grid_w, rate, skip;
  bool transposed;
};

// What passes here can be multiplied and added without overflow: skip + grid_h * grid_w is the number it looks like.
inline void check_grid(const GridArgs& g, const char* op) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  VICO_CHECK(g.rate >= 1, op, "rate must be at least 1, got ", g.rate);
  VICO_CHECK(g.skip >= 0 && g.skip <= kLargest, op, "skip must lie in [0, ", kLargest, "], got ", g.skip);
  VICO_CHECK(g.grid_h <= kLargest && g.grid_w <= kLargest, op, "the grid must have at most ", kLargest,
             " rows and columns, got ", g.grid_h, " x ", g.grid_w);
  VICO_CHECK(g.grid_h > 0 && g.grid_w > 0 && g.grid_h % g.rate == 0 && g.grid_w % g.rate == 0, op,
             "the grid must be divisible by the rate, got a grid of ", g.grid_h, " x ", g.grid_w, " tokens at rate ",
             g.rate);
}

// `like`, called `like_name`, is a tensor of the call. On CUDA the kernels check the values.
inline void check_tile_index(const std::optional<Tensor>& tile_index, int64_t tiles, const Tensor& like,
                             const char* like_name, const char* op) {
  if (!tile_index) return;
  check_device(*tile_index, like, "tile_index", like_name, op);
  check_dtype(*tile_index, ScalarType::Long, "tile_index", "int64", op);
  check_shape(*tile_index, {-1}, "tile_index", "[selected]", op);
  VICO_CHECK(tile_index->is_contiguous(), op, "tile_index must be contiguous");
  if (on_cuda(*tile_index)) return;
  const int64_t* index = tile_index->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tile_index->numel(); ++i) {
    VICO_CHECK(index[i] >= 0 && index[i] < tiles, op, "tile_index must lie in [0, ", tiles, "), got ", index[i],
               " at position ", i);
  }
}

// The inverse of a tile index on its device, [tiles + 1 + selected]: TileMap's offsets, then its selected tiles.
inline std::optional<Tensor> device_tile_map(const std::optional<Tensor>& tile_index, int64_t tiles) {
  if (!tile_index) return std::nullopt;
  Tensor map = make_tensor(*tile_index, {tiles + 1 + tile_index->numel()});
  DeviceTileMapParams p;
  p.tiles = tiles;
  p.count = tile_index->numel();
  p.tile_index = tile_index->const_data_ptr<int64_t>();
  p.offsets = map.mutable_data_ptr<int64_t>();
  p.selected = p.offsets + tiles + 1;
  VICO_CUDA_CALL(tile_map, p, map);
  return map;
}

// Geometry without strides: tiles of `channels` channels, gathered by tile_index.
inline ShuffleShape shuffle_shape(const GridArgs& g, int64_t tiles, int64_t channels,
                                  const std::optional<Tensor>& tile_index) {
  ShuffleShape s;
  s.tiles = tiles;
  s.grid_h = g.grid_h;
  s.grid_w = g.grid_w;
  s.channels = channels;
  s.rate = g.rate;
  s.skip = g.skip;
  s.transposed = g.transposed;
  s.selected = tile_index ? tile_index->numel() : tiles;
  s.tile_index = tile_index ? tile_index->const_data_ptr<int64_t>() : nullptr;
  return s;
}

// Checks `tokens` [tiles, skip + grid_h * grid_w, channels], any strides with dense channels, and gives its geometry.
inline ShuffleShape checked_shuffle_shape(const Tensor& tokens, const GridArgs& g,
                                          const std::optional<Tensor>& tile_index, const char* op) {
  check_kernels(tokens, op);
  float_dtype(tokens, "tokens", op);
  check_grid(g, op);
  check_shape(tokens, {-1, g.skip + g.grid_h * g.grid_w, -1}, "tokens", "[tiles, skip + grid_h * grid_w, channels]",
              op);
  check_tile_index(tile_index, tokens.size(0), tokens, "tokens", op);
  ShuffleShape s = shuffle_shape(g, tokens.size(0), tokens.size(2), tile_index);
  s.tile_stride = tokens.stride(0);
  s.token_stride = tokens.stride(1);
  return s;
}

}  // namespace vico
