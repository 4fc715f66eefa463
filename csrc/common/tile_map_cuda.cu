// CUDA kernel of the inverse of a tile index.
//
// One thread for each number that is wanted: thread t <= tiles counts the entries below t, which is offsets[t]; the
// thread of entry s counts those that come before it in the map, which is its place. Nothing but comparisons with the
// whole index, which passes through shared memory: no atomics, one fixed result, and for the tens of tiles of a call
// the time of a launch.
#include "common/device.cuh"
#include "common/tile_map.h"

namespace vico {

constexpr unsigned kTileMapThreads = 256;

__global__ void __launch_bounds__(kTileMapThreads) tile_map_kernel(const __grid_constant__ DeviceTileMapParams p) {
  VICO_SHARED(int64_t, entries, [kTileMapThreads]);
  const int64_t thread = int64_t{blockIdx.x} * kTileMapThreads + threadIdx.x;
  const bool is_entry = thread > p.tiles;
  const int64_t s = thread - p.tiles - 1;
  int64_t tile = thread;
  if (is_entry && s < p.count) {
    tile = p.tile_index[s];
    VICO_DEVICE_CHECK(tile >= 0 && tile < p.tiles, "tile_index must lie in [0, %lld), got %lld at position %lld",
                      static_cast<long long>(p.tiles), static_cast<long long>(tile), static_cast<long long>(s));
  }
  int64_t before = 0;
  for (int64_t first = 0; first < p.count; first += kTileMapThreads) {
    const int64_t rest = p.count - first, here = rest < kTileMapThreads ? rest : kTileMapThreads;
    if (threadIdx.x < here) entries[threadIdx.x] = p.tile_index[first + threadIdx.x];
    __syncthreads();
    for (int64_t i = 0; i < here; ++i) before += entries[i] < tile || (is_entry && entries[i] == tile && first + i < s);
    __syncthreads();
  }
  if (!is_entry) {
    p.offsets[tile] = before;
  } else if (s < p.count) {
    p.selected[before] = s;
  }
}

void tile_map_cuda(const DeviceTileMapParams& p, cudaStream_t stream) {
  const int64_t wanted = p.tiles + 1 + p.count;
  launch(tile_map_kernel, dim3(static_cast<unsigned>((wanted + kTileMapThreads - 1) / kTileMapThreads)),
         dim3(kTileMapThreads), 0, stream, p);
}

}  // namespace vico
