// CPU kernel of the chunked column sums.
#include "common/column_sum.h"
#include "common/vec.h"

namespace vico::VICO_CPU_ARCH {

void combine_chunks(const ColumnSumParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    for (int64_t c = begin; c < end; c += kWidth<A>) {
      vec_t<A> total{};
      for (int64_t k = 0; k < p.chunks; ++k) {
        total += load_n(static_cast<const A*>(p.partials) + k * p.chunk_stride + c, end - c);
      }
      store_n(static_cast<T*>(p.out) + c, total, end - c);
    }
  });
}

}  // namespace vico::VICO_CPU_ARCH
