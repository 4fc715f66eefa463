// How kernels that work on the columns of a matrix, with something of each column kept in registers (a bias, a sum of
// gradients), share it out: a block takes a slab of neighbouring packs, one per thread, and a chunk of rows, several of
// which are in flight at a time. Block b has slab b % slabs of chunk b / slabs.
#pragma once

#include <stdexcept>
#include <string>

#include "common/pack.cuh"

namespace vico {

constexpr unsigned kSlabThreads = 128;

struct RowChunks {
  int64_t rows, packs, chunk_rows;
  unsigned slabs;

  // The rows and the pack of this thread. Threads past the last pack are in no column, but take part in shuffles.
  VICO_DEVICE int64_t first_row() const { return blockIdx.x / slabs * chunk_rows; }
  VICO_DEVICE int64_t last_row() const {
    const int64_t last = first_row() + chunk_rows;
    return last < rows ? last : rows;
  }
  VICO_DEVICE int64_t pack() const { return first_pack() + threadIdx.x; }
  // How many threads of the block have a pack: those with the lowest numbers.
  VICO_DEVICE unsigned active_threads() const {
    const int64_t rest = packs - first_pack();
    return rest < blockDim.x ? static_cast<unsigned>(rest) : blockDim.x;
  }
  VICO_DEVICE int64_t first_pack() const { return int64_t{blockIdx.x % slabs} * blockDim.x; }
};

// `columns` in packs of `width`.
inline RowChunks row_chunks(int64_t rows, int64_t columns, int width, int64_t chunk_rows) {
  const int64_t packs = columns / width, slabs = (packs + kSlabThreads - 1) / kSlabThreads;
  return {rows, packs, chunk_rows, static_cast<unsigned>(slabs)};
}

template <class... Params, class... Args>
void launch_row_chunks(void (*kernel)(Params...), const RowChunks& at, cudaStream_t stream, const Args&... args) {
  const int64_t blocks = (at.rows + at.chunk_rows - 1) / at.chunk_rows * at.slabs;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::to_string(blocks) + " blocks of threads: CUDA kernels take up to 2^31 - 1");
  }
  const unsigned threads = at.packs < kSlabThreads ? static_cast<unsigned>((at.packs + 31) / 32 * 32) : kSlabThreads;
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, args..., at);
}

}  // namespace vico
