// The inverse of a tile index: for each tile of a buffer, the selected tiles that were gathered from it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda_stream.h"

namespace vico {

struct TileMap {
  std::vector<int64_t> offsets;   // [tiles + 1]
  std::vector<int64_t> selected;  // [selected], ascending within each tile: sums over them have one fixed order
};

// tile_index [selected] with values in [0, tiles), or null for the identity (then selected == tiles).
inline TileMap invert_tile_index(const int64_t* tile_index, int64_t selected, int64_t tiles) {
  TileMap map;
  map.offsets.assign(tiles + 1, 0);
  map.selected.resize(selected);
  for (int64_t s = 0; s < selected; ++s) ++map.offsets[(tile_index ? tile_index[s] : s) + 1];
  for (int64_t t = 0; t < tiles; ++t) map.offsets[t + 1] += map.offsets[t];
  std::vector<int64_t> next(map.offsets.begin(), map.offsets.end() - 1);
  for (int64_t s = 0; s < selected; ++s) map.selected[next[tile_index ? tile_index[s] : s]++] = s;
  return map;
}

// The same on the device, for tile indices that live there.
struct DeviceTileMapParams {
  int64_t tiles = 0, count = 0;         // `count` selected tiles
  const int64_t* tile_index = nullptr;  // [count], checked by the kernel
  int64_t* offsets = nullptr;           // [tiles + 1]
  int64_t* selected = nullptr;          // [count], in the order of TileMap
};
void tile_map_cuda(const DeviceTileMapParams& p, cudaStream_t stream);

}  // namespace vico
