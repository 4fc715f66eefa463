// Sums over the rows of a matrix (gradients of biases and gains) in an order that no thread can change: rows are cut
// into chunks of a fixed size, each chunk is summed into a row of partial sums, and these are added in order.
// Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// Rows per chunk: enough that partial sums are small beside the data, few enough to feed many threads.
constexpr int64_t kChunkRows = 64;

VICO_INLINE int64_t chunk_count(int64_t rows, int64_t chunk_rows = kChunkRows) {
  return (rows + chunk_rows - 1) / chunk_rows;
}

// Rows per chunk of the CUDA kernels that work in row chunks (common/row_chunks.cuh): at most `most`, fewer where that
// would not fill a large GPU, but enough to have several in flight. A function of the problem alone, like the sums that
// depend on it. Small chunks end evenly and leave little for a last wave, larger ones leave fewer partial sums.
constexpr int64_t kCudaForwardRows = 8, kCudaBackwardRows = 16;
VICO_INLINE int64_t cuda_chunk_rows(int64_t rows, int64_t columns, Dtype dtype, int64_t most) {
  constexpr int64_t kSlabBytes = 128 * 16, kBlocks = 8 * 132, kLeast = 4;
  const int64_t slabs = (columns * element_size(dtype) + kSlabBytes - 1) / kSlabBytes;
  const int64_t wanted = (rows * slabs + kBlocks - 1) / kBlocks;
  return wanted < kLeast ? kLeast : wanted > most ? most : wanted;
}

struct ColumnSumParams {
  Dtype dtype = Dtype::kFloat;  // of `out`; partial sums are float, or double where `out` is double
  int64_t columns = 0;
  int64_t chunks = 0;              // 0 gives a sum of zero
  int64_t chunk_stride = 0;        // in elements, between the partial sums of neighbouring chunks
  const void* partials = nullptr;  // [chunks, columns], columns next to each other
  void* out = nullptr;             // [columns]
};

// Columns [begin, end) of `out`: the partial sums of all chunks, added in order.
VICO_CPU_KERNEL(combine_chunks, const ColumnSumParams&, int64_t begin, int64_t end)
void combine_chunks_cuda(const ColumnSumParams& p, cudaStream_t stream);

}  // namespace vico
