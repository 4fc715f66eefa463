// How the CUDA backward kernels of normalized_shuffle go about a problem: a function of its shapes and alignments,
// which the door needs to allocate. Torch-free.
#pragma once

#include "normalized_shuffle/normalized_shuffle.h"

namespace vico {

constexpr unsigned kBackwardThreads = 512;
constexpr int64_t kMaxRowsPerChunk = 64;

struct NormalizedShuffleBackwardPlan {
  int units = 0;  // packs per thread of the resident kernel; 0: the streaming kernels
  bool wide = false;
  int64_t rows_per_chunk = 1;
  int64_t chunks = 0;     // partials [chunks, 2, out_channels]
  int64_t row_means = 0;  // elements of `row_means`, sum type
  size_t shared_bytes = 0;
};

inline NormalizedShuffleBackwardPlan plan_normalized_shuffle_backward(const NormalizedShuffleBackwardParams& p) {
  constexpr int64_t kEnoughChunks = 2 * 132;  // two for each multiprocessor of an H100
  const ShuffleShape& s = p.shape;
  NormalizedShuffleBackwardPlan plan;
  const int64_t blocks = s.tiles * s.out_tokens(), bytes = element_size(p.dtype);
  if (blocks == 0 || s.channels == 0) return plan;
  plan.wide = has_aligned_tokens(s, bytes, p.tokens) && is_aligned16(p.grad_out) && is_aligned16(p.grad_tokens) &&
              is_aligned16(p.weight);
  plan.rows_per_chunk = (blocks + kEnoughChunks - 1) / kEnoughChunks;
  if (plan.rows_per_chunk > kMaxRowsPerChunk) plan.rows_per_chunk = kMaxRowsPerChunk;
  plan.chunks = (blocks + plan.rows_per_chunk - 1) / plan.rows_per_chunk;
  const int64_t packs = s.out_channels() * bytes / 16;
  // Where a tile may have been selected twice, sums of grad_tokens wait in shared memory.
  const size_t repeated = p.tile_offsets && p.grad_tokens ? static_cast<size_t>(s.out_channels()) * sizeof(float) : 0;
  if (plan.wide && p.dtype != Dtype::kDouble && repeated <= 200 * 1024) {
    for (int units : {1, 2, 4}) {
      if (plan.units == 0 && packs <= units * int64_t{kBackwardThreads}) plan.units = units;
    }
  }
  if (plan.units) {
    plan.shared_bytes = repeated;
  } else {
    plan.row_means = 2 * s.selected * s.out_tokens();
  }
  return plan;
}

}  // namespace vico
