// merge_tokens: rows of text embeddings and of packed visual tokens laid out as the language model reads them, the
// gradient of that, and visual tokens written into a buffer in place. Pure data movement but for repeated rows'
// gradients.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

struct MergeTokensParams {
  int64_t rows = 0;                 // N
  int64_t embed_rows = 0;           // R
  int64_t token_rows = 0;           // T
  int64_t hidden = 0;               // H
  int64_t embed_stride = 0;         // elements between rows of `embeds`; channels are next to each other
  int64_t token_stride = 0;         // elements between rows of `tokens`
  int64_t element_size = 0;         // bytes
  const char* embeds = nullptr;     // [R, H]
  const char* tokens = nullptr;     // [T, H]; null: their rows of `out` are not written
  const int64_t* source = nullptr;  // [N]: -1 a zero row, [0, R) a row of embeds, [R, R + T) a row of tokens
  char* out = nullptr;              // [N, H], contiguous; aliases neither input
  bool new_pages = false;           // whether `out` is memory that has not been written before: a matter of speed
};

struct MergeTokensBackwardParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;                // N
  int64_t embed_rows = 0;          // R
  int64_t token_rows = 0;          // T
  int64_t hidden = 0;              // H
  int64_t grad_stride = 0;         // elements between rows of grad_out; channels are next to each other
  bool need_embeds = false;        // whether grad_embeds is wanted
  bool need_tokens = false;        // whether grad_tokens is wanted
  const void* grad_out = nullptr;  // [N, H]
  void* grad_embeds = nullptr;     // [R, H], contiguous
  void* grad_tokens = nullptr;     // [T, H], contiguous
  // CPU: the rows of grad_out that were made of row r of embeds, then tokens, are first_use[r], next_use[first_use[r]],
  // ..., ascending, up to -1.
  const int64_t* first_use = nullptr;  // [R + T]
  const int64_t* next_use = nullptr;   // [N]
  bool new_pages = false;              // as above, of both gradients
  // CUDA: the kernel finds them.
  const int64_t* source = nullptr;  // [N], as above
  int64_t* uses = nullptr;          // [3, R + T], workspace

  VICO_INLINE int64_t input_rows() const { return embed_rows + token_rows; }
};

struct ScatterTokensParams {
  int64_t row_bytes = 0;
  int64_t embed_stride = 0;        // bytes between rows of `embeds`
  int64_t token_stride = 0;        // bytes between rows of `tokens`
  int64_t rows = 0;                // T
  int64_t embed_rows = 0;          // R
  const int64_t* index = nullptr;  // [T], no value twice
  const char* tokens = nullptr;    // [T, H]
  char* embeds = nullptr;          // [R, H], does not alias `tokens`
  int64_t* owner = nullptr;        // CUDA: [R], workspace
};

// Output rows [begin, end) of N.
VICO_CPU_KERNEL(merge_tokens, const MergeTokensParams&, int64_t begin, int64_t end)
// Input rows [begin, end) of R + T.
VICO_CPU_KERNEL(merge_tokens_backward, const MergeTokensBackwardParams&, int64_t begin, int64_t end)
// Rows [begin, end) of tokens.
VICO_CPU_KERNEL(scatter_tokens, const ScatterTokensParams&, int64_t begin, int64_t end)

void merge_tokens_cuda(const MergeTokensParams& p, cudaStream_t stream);
void merge_tokens_backward_cuda(const MergeTokensBackwardParams& p, cudaStream_t stream);
void scatter_tokens_cuda(const ScatterTokensParams& p, cudaStream_t stream);

}  // namespace vico
