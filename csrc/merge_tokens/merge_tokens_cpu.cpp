// CPU kernels of merge_tokens.
#include <cstring>

#include "common/vec.h"
#include "merge_tokens/merge_tokens.h"

namespace vico::VICO_CPU_ARCH {
namespace {

// NOTE: not memcpy, which moves rows of a few kilobytes with one string instruction: a quarter slower than this where
// the output is freshly allocated memory, and a third where the data is in cache.
void copy_row(char* out, const char* in, int64_t bytes) {
  constexpr int64_t kStep = 4 * kVecBytes;
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    VecI32 v[4];
    for (int k = 0; k < 4; ++k) std::memcpy(&v[k], in + i + k * kVecBytes, kVecBytes);
    for (int k = 0; k < 4; ++k) std::memcpy(out + i + k * kVecBytes, &v[k], kVecBytes);
  }
  if (i < bytes) std::memcpy(out + i, in + i, bytes - i);
}

}  // namespace

void merge_tokens(const MergeTokensParams& p, int64_t begin, int64_t end) {
  const int64_t row_bytes = p.hidden * p.element_size;
  const int64_t embed_stride = p.embed_stride * p.element_size, token_stride = p.token_stride * p.element_size;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t s = p.source[i];
    char* out = p.out + i * row_bytes;
    if (s < 0) {
      std::memset(out, 0, row_bytes);
    } else if (s < p.embed_rows) {
      copy_row(out, p.embeds + s * embed_stride, row_bytes);
    } else {
      copy_row(out, p.tokens + (s - p.embed_rows) * token_stride, row_bytes);
    }
  }
}

namespace {

// grad[r] = sum of the rows of grad_out that were made of row r, in ascending order.
template <class T>
void backward_row(const MergeTokensBackwardParams& p, int64_t r) {
  T* grad = r < p.embed_rows ? static_cast<T*>(p.grad_embeds) + r * p.hidden
                             : static_cast<T*>(p.grad_tokens) + (r - p.embed_rows) * p.hidden;
  const auto use = [&](int64_t i) { return static_cast<const T*>(p.grad_out) + i * p.grad_stride; };
  const int64_t first = p.first_use[r];
  if (first < 0) {
    std::memset(grad, 0, p.hidden * sizeof(T));
  } else if (p.next_use[first] < 0) {
    copy_row(reinterpret_cast<char*>(grad), reinterpret_cast<const char*>(use(first)), p.hidden * sizeof(T));
  } else {
    for (int64_t c = 0; c < p.hidden; c += kWidth<T>) {
      auto total = load_n(use(first) + c, p.hidden - c);
      for (int64_t i = p.next_use[first]; i >= 0; i = p.next_use[i]) total += load_n(use(i) + c, p.hidden - c);
      store_n(grad + c, total, p.hidden - c);
    }
  }
}

}  // namespace

void merge_tokens_backward(const MergeTokensBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    for (int64_t r = begin; r < end; ++r) backward_row<decltype(element)>(p, r);
  });
}

void scatter_tokens(const ScatterTokensParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    copy_row(p.embeds + p.index[i] * p.embed_stride, p.tokens + i * p.token_stride, p.row_bytes);
  }
}

}  // namespace vico::VICO_CPU_ARCH
