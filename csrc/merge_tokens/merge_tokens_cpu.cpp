// CPU kernels of merge_tokens.
#include <cstring>

#include "common/vec.h"
#include "merge_tokens/merge_tokens.h"

namespace vico::VICO_CPU_ARCH {
namespace {

// NOTE: memcpy moves rows of a few kilobytes with one string instruction: the best there is within a buffer in use (it
// need not read what it overwrites), and a quarter slower than vectors on pages that the first write brings in.
VICO_INLINE void copy_row(char* out, const char* in, int64_t bytes, bool new_pages) {
  if (!new_pages) {
    std::memcpy(out, in, bytes);
    return;
  }
  constexpr int64_t kStep = 4 * kVecBytes;
  const auto load_at = [&](int64_t i) { return load(reinterpret_cast<const float*>(in + i)); };
  const auto store_at = [&](int64_t i, VecF v) { store(reinterpret_cast<float*>(out + i), v); };
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    const VecF a = load_at(i), b = load_at(i + kVecBytes), c = load_at(i + 2 * kVecBytes),
               d = load_at(i + 3 * kVecBytes);
    store_at(i, a);
    store_at(i + kVecBytes, b);
    store_at(i + 2 * kVecBytes, c);
    store_at(i + 3 * kVecBytes, d);
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
      copy_row(out, p.embeds + s * embed_stride, row_bytes, p.new_pages);
    } else if (p.tokens) {
      copy_row(out, p.tokens + (s - p.embed_rows) * token_stride, row_bytes, p.new_pages);
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
    copy_row(reinterpret_cast<char*>(grad), reinterpret_cast<const char*>(use(first)), p.hidden * sizeof(T),
             p.new_pages);
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
    std::memcpy(p.embeds + p.index[i] * p.embed_stride, p.tokens + i * p.token_stride, p.row_bytes);
  }
}

}  // namespace vico::VICO_CPU_ARCH
