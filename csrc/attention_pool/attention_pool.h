// attention_pool: each head's softmax over a tile's tokens of query . token, and the tokens' mean under it.
//
//   s[h, t] = query[h, :] . tokens[t, :]      lse[h] = log sum_t exp s[h, t]
//   p[h, t] = exp(s[h, t] - lse[h])           context[h, :] = sum_t p[h, t] tokens[t, :]
//
// and backward, with g = grad_context:
//
//   ds[h, t] = p[h, t] (g[h, :] . tokens[t, :] - g[h, :] . context[h, :])
//   grad_query[h, :] = sum_t ds[h, t] tokens[t, :]
//   grad_tokens[t, :] = sum_h p[h, t] g[h, :] + ds[h, t] query[h, :]
//
// The tokens of a tile are cut into chunks of fixed size whose results are combined in order: one tile alone keeps
// several threads busy, and neither their number nor the other tiles of the call changes a bit of the result.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

// All strides are in elements.
struct AttentionPoolShape {
  Dtype dtype = Dtype::kFloat;
  int64_t tiles = 0;     // P
  int64_t count = 0;     // N, tokens that are pooled, at least 1
  int64_t channels = 0;  // V
  int64_t heads = 0;     // h

  static constexpr int64_t kChunk = 256;        // tokens per chunk
  static constexpr int64_t kCombineRows = 128;  // channels per item of the combine kernel
  static constexpr int64_t kHeadMultiple = 16;  // lanes of the widest vector: partial results are padded to it
  static constexpr int64_t kStatistics = 2;     // rows of a partial result besides the channels: maximum and sum

  VICO_INLINE int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
  VICO_INLINE int64_t padded_heads() const { return (heads + kHeadMultiple - 1) / kHeadMultiple * kHeadMultiple; }
  VICO_INLINE int64_t combine_items() const { return (channels + kCombineRows - 1) / kCombineRows; }
  VICO_INLINE int64_t partial_rows() const { return channels + kStatistics; }

  // CUDA: heads go in groups of kCudaHeads, and 16-bit tokens of up to kFusedChannels channels through one kernel that
  // reads them once, in chunks of cuda_chunk tokens.
  static constexpr int64_t kCudaHeads = 16, kFusedChannels = 3200;
  int64_t cuda_chunk = 128;
  VICO_INLINE int64_t cuda_chunks() const { return (count + cuda_chunk - 1) / cuda_chunk; }
  VICO_INLINE int64_t cuda_head_groups() const { return (heads + kCudaHeads - 1) / kCudaHeads; }
  VICO_INLINE bool may_fuse() const { return element_size(dtype) == 2 && channels <= kFusedChannels; }
  // What one head group of a chunk leaves to combine, in floats: 16-bit means [kCudaHeads, padded channels] and three
  // floats for each head (PoolPartial).
  VICO_INLINE int64_t cuda_padded_channels() const { return (channels + 7) / 8 * 8; }
  VICO_INLINE int64_t cuda_partial_size() const { return kCudaHeads * (cuda_padded_channels() / 2 + 3); }
  // Weights of all tokens, [tiles, head groups, count, kCudaHeads].
  VICO_INLINE int64_t cuda_weights_size() const { return tiles * cuda_head_groups() * count * kCudaHeads; }
  // Elements of `partial`.
  VICO_INLINE int64_t cuda_forward_workspace() const {
    const int64_t fused = may_fuse() ? tiles * cuda_head_groups() * cuda_chunks() * cuda_partial_size() : 0;
    return fused > cuda_weights_size() ? fused : cuda_weights_size();
  }
  VICO_INLINE int64_t cuda_backward_workspace() const { return 2 * cuda_weights_size(); }
};

// Tokens and queries, which forward and backward read alike.
struct AttentionPoolInputs {
  const void* tokens = nullptr;               // [tiles, count, channels], from the first token that is pooled
  int64_t tile_stride = 0, token_stride = 0;  // channels are next to each other
  const void* query = nullptr;                // [tiles, heads, channels]; a stride of 0 is one query for all tiles
  int64_t query_stride = 0, query_head_stride = 0;  // channels are next to each other
};

struct AttentionPoolParams {
  AttentionPoolShape shape;
  AttentionPoolInputs in;
  void* context = nullptr;  // [tiles, heads, channels], contiguous
  void* lse = nullptr;      // [tiles, heads], accumulate type, contiguous
  // Accumulate type, [tiles, chunks, channels + kStatistics, padded_heads]: what the chunks kernel leaves to combine.
  // On CUDA shape.cuda_forward_workspace() elements, aligned to 16 bytes.
  void* partial = nullptr;
  bool chained = false;  // as in SkinnyLinearParams, of the tokens
};

struct AttentionPoolBackwardParams {
  AttentionPoolShape shape;
  AttentionPoolInputs in;
  const void* grad_context = nullptr;  // [tiles, heads, channels], contiguous
  const void* context = nullptr;       // [tiles, heads, channels], contiguous
  const void* lse = nullptr;           // [tiles, heads], accumulate type, contiguous
  void* grad_tokens = nullptr;         // [tiles, skip + count, channels], contiguous; null where not wanted
  int64_t skip = 0;                    // leading tokens of a tile, whose gradient is zero
  void* grad_query = nullptr;          // [tiles, heads, channels], contiguous
  // Accumulate type, [tiles, chunks, channels, padded_heads]; on CUDA shape.cuda_backward_workspace() elements, aligned
  // to 16 bytes.
  void* partial = nullptr;
};

// Chunks [begin, end) of all tiles * chunks().
VICO_CPU_KERNEL(attention_pool_chunks, const AttentionPoolParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(attention_pool_backward_chunks, const AttentionPoolBackwardParams&, int64_t begin, int64_t end)
// Items [begin, end) of all tiles * combine_items(): kCombineRows channels of one tile each. After the chunks kernel.
VICO_CPU_KERNEL(attention_pool_combine, const AttentionPoolParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(attention_pool_backward_combine, const AttentionPoolBackwardParams&, int64_t begin, int64_t end)

void attention_pool_cuda(const AttentionPoolParams& params, cudaStream_t stream);
void attention_pool_backward_cuda(const AttentionPoolBackwardParams& params, cudaStream_t stream);

}  // namespace vico
