// How the CUDA backward kernels of normalized_shuffle go about a problem: a function of its shapes and alignments,
// which the door needs to allocate. Torch-free.
#pragma once

#include "normalized_shuffle/normalized_shuffle.h"

namespace vico {

constexpr unsigned kBackwardThreads = 512;
constexpr int64_t kMaxRowsPerChunk = 64;

struct NormalizedShuffleBackwardPlan {
  int units = 0;  // packs per thread of the resident kernel, where the device has room; 0: the streaming kernels
  bool wide = false;
  int64_t rows_per_chunk = 1;
  int64_t chunks = 0;         // partials [chunks, 2, out_channels]
  int64_t row_means = 0;      // elements of `row_means`, sum type
  size_t repeated_bytes = 0;  // of shared memory
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
  const int64_t packs = s.out_channels() * bytes / 16, width = 16 / bytes;
  if (plan.wide && p.dtype != Dtype::kDouble && has_near_tokens(s, width) && has_near_tokens(contiguous(s), width)) {
    plan.units = packs <= 512 ? 1 : packs <= 2048 ? 2 : 0;
  }
  // Where a tile may have been selected twice, sums of grad_tokens wait in shared memory.
  if (p.tile_offsets && p.grad_tokens) plan.repeated_bytes = static_cast<size_t>(s.out_channels()) * sizeof(float);
  plan.row_means = 2 * s.selected * s.out_tokens();
  return plan;
}

}  // namespace vico
