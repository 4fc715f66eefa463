// CPU kernels of pack_tokens: rows are copied whole, with the bias added on the way.
#include <cstring>

#include "common/column_sum.h"
#include "common/vec.h"
#include "pack_tokens/pack_tokens.h"

namespace vico::VICO_CPU_ARCH {

void pack_tokens(const PackTokensParams& p, int64_t begin, int64_t end) {
  const PackShape& s = p.shape;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    for (int64_t row = begin; row < end; ++row) {
      const bool is_full = row < s.full_rows();
      const int64_t r = is_full ? row : row - s.full_rows();
      const T* in = static_cast<const T*>(is_full ? p.full : p.compressed) + r * s.hidden;
      const A* bias = static_cast<const A*>(is_full ? p.full_bias : p.compressed_bias);
      T* out = static_cast<T*>(p.out) + s.out_row(is_full, r) * p.out_stride;
      if (!bias) {
        std::memcpy(out, in, s.hidden * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < s.hidden; c += kWidth<T>) {
        const int64_t n = s.hidden - c;
        store_n(out + c, load_n(in + c, n) + load_n(bias + c, n), n);
      }
    }
  });
}

void pack_tokens_backward(const PackTokensBackwardParams& p, int64_t begin, int64_t end) {
  const PackShape& s = p.shape;
  const int64_t full_chunks = chunk_count(s.full_rows());
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const bool is_full = chunk < full_chunks;
      const int64_t first = (is_full ? chunk : chunk - full_chunks) * kChunkRows;
      const int64_t rows = is_full ? s.full_rows() : s.compressed_rows();
      const int64_t last = first + kChunkRows < rows ? first + kChunkRows : rows;
      A* partial = static_cast<A*>(p.partials) + chunk * s.hidden;
      std::memset(partial, 0, s.hidden * sizeof(A));
      for (int64_t r = first; r < last; ++r) {
        const T* grad_out = static_cast<const T*>(p.grad_out) + s.out_row(is_full, r) * s.hidden;
        T* grad = static_cast<T*>(is_full ? p.grad_full : p.grad_compressed) + r * s.hidden;
        for (int64_t c = 0; c < s.hidden; c += kWidth<T>) {
          const int64_t n = s.hidden - c;
          const auto g = load_n(grad_out + c, n);
          store_n(grad + c, g, n);  // exact: the 16-bit types convert to float and back
          store_n(partial + c, load_n(partial + c, n) + g, n);
        }
      }
    }
  });
}

}  // namespace vico::VICO_CPU_ARCH
