// CUDA kernels of merge_tokens: one block per row, each byte read once and written once, in accesses of 16 bytes where
// all addresses allow it.
#include "common/copy_row.cuh"
#include "merge_tokens/merge_tokens.h"

namespace vico {
namespace {

using Long = long long;  // of formats and atomics

constexpr unsigned kIndexThreads = 256;

inline unsigned index_blocks(int64_t count) { return row_blocks((count + kIndexThreads - 1) / kIndexThreads); }

VICO_DEVICE void check_index(int64_t value, int64_t low, int64_t high, const char* name, int64_t position) {
  VICO_DEVICE_CHECK(value >= low && value < high, "%s must lie in [%lld, %lld), got %lld at position %lld", name,
                    static_cast<Long>(low), static_cast<Long>(high), static_cast<Long>(value),
                    static_cast<Long>(position));
}

// Calls fn(T{}, constant kN) with the widest pack that divides `bits`, the addresses, strides and lengths of rows in
// bytes, or'ed.
template <class Fn>
void dispatch_packs(uint64_t bits, const Fn& fn) {
  if (bits % 16 == 0) {
    fn(uint64_t{}, std::integral_constant<int, 2>{});
  } else if (bits % 8 == 0) {
    fn(uint64_t{}, std::integral_constant<int, 1>{});
  } else if (bits % 4 == 0) {
    fn(uint32_t{}, std::integral_constant<int, 1>{});
  } else if (bits % 2 == 0) {
    fn(uint16_t{}, std::integral_constant<int, 1>{});
  } else {
    fn(uint8_t{}, std::integral_constant<int, 1>{});
  }
}
inline uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// out[i] = row source[i] of embeds, then tokens, or zeros; i = blockIdx.x. Without tokens their rows stay as they are.
template <class T, int kN>
__global__ void __launch_bounds__(kCopyThreads) merge_tokens_kernel(const __grid_constant__ MergeTokensParams p) {
  const int64_t i = blockIdx.x, s = p.source[i], row_bytes = p.hidden * p.element_size;
  const int64_t packs = row_bytes / static_cast<int64_t>(sizeof(T) * kN);
  check_index(s, -1, p.embed_rows + p.token_rows, "source", i);
  T* out = reinterpret_cast<T*>(p.out + i * row_bytes);
  if (s < 0) return clear_row<T, kN>(out, packs);
  if (s >= p.embed_rows && !p.tokens) return;
  const char* from = s < p.embed_rows ? p.embeds + s * p.embed_stride * p.element_size
                                      : p.tokens + (s - p.embed_rows) * p.token_stride * p.element_size;
  copy_row<T, kN>(out, reinterpret_cast<const T*>(from), packs);
}

// Where the uses of each input row r begin, end, and how many there are: uses [3, R + T].
__global__ void __launch_bounds__(kIndexThreads)
    clear_uses_kernel(const __grid_constant__ MergeTokensBackwardParams p) {
  const int64_t r = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x, rows = p.input_rows();
  if (r >= rows) return;
  p.uses[r] = p.rows;
  p.uses[rows + r] = -1;
  p.uses[2 * rows + r] = 0;
}
// One thread per output row. The atomics are of integers: their order changes nothing.
__global__ void __launch_bounds__(kIndexThreads) find_uses_kernel(const __grid_constant__ MergeTokensBackwardParams p) {
  const int64_t i = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x, rows = p.input_rows();
  if (i >= p.rows) return;
  const int64_t s = p.source[i];
  check_index(s, -1, rows, "source", i);
  if (s < 0) return;
  atomicMin(reinterpret_cast<Long*>(p.uses + s), static_cast<Long>(i));
  atomicMax(reinterpret_cast<Long*>(p.uses + rows + s), static_cast<Long>(i));
  atomicAdd(reinterpret_cast<unsigned long long*>(p.uses + 2 * rows + s), 1ull);
}

// fn(i) for the `count` output rows i in [first, last] made of input row r, ascending; by whole warps. Only from three
// uses on has the source to be searched.
template <class Fn>
VICO_DEVICE void for_uses(const int64_t* source, int64_t r, int64_t first, int64_t last, int64_t count, const Fn& fn) {
  fn(first);
  int64_t between = count - 2;
  for (int64_t base = first + 1; between > 0; base += 32) {
    const int64_t own = base + threadIdx.x % 32;
    for (unsigned found = __ballot_sync(~0u, own < last && source[own] == r); found; found &= found - 1) {
      fn(base + __ffs(static_cast<int>(found)) - 1);
      --between;
    }
  }
  if (count > 1) fn(last);
}

// grad[r] = sum of the rows of grad_out made of input row r, in ascending order; r = first_row + blockIdx.x.
template <class T, int kN>
__global__ void __launch_bounds__(kCopyThreads)
    merge_tokens_backward_kernel(const __grid_constant__ MergeTokensBackwardParams p, int64_t first_row) {
  using A = accumulate_t<T>;
  const int64_t r = first_row + blockIdx.x, packs = p.hidden / kN;
  T* grad = r < p.embed_rows ? static_cast<T*>(p.grad_embeds) + r * p.hidden
                             : static_cast<T*>(p.grad_tokens) + (r - p.embed_rows) * p.hidden;
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const int64_t first = p.uses[r], last = p.uses[p.input_rows() + r], count = p.uses[2 * p.input_rows() + r];
  if (count == 0) return clear_row<T, kN>(grad, packs);
  if (count == 1) return copy_row<T, kN>(grad, grad_out + first * p.grad_stride, packs);
  for (int64_t base = 0; base < packs; base += blockDim.x) {
    const int64_t u = base + threadIdx.x;
    A total[kN] = {};
    for_uses(p.source, r, first, last, count, [&](int64_t i) {
      if (u >= packs) return;
      const auto next = load_pack<T, kN>(grad_out + i * p.grad_stride + u * kN);
      for (int c = 0; c < kN; ++c) total[c] = i == first ? value_of(next.at[c]) : total[c] + value_of(next.at[c]);
    });
    if (u < packs) store_pack(grad + u * kN, pack_of<T, kN>(total));
  }
}

// owner[index[i]] = i: of a row that is named twice, one of the two finds another owner.
__global__ void __launch_bounds__(kIndexThreads) claim_rows_kernel(const __grid_constant__ ScatterTokensParams p) {
  const int64_t i = int64_t{blockIdx.x} * kIndexThreads + threadIdx.x;
  if (i >= p.rows) return;
  check_index(p.index[i], 0, p.embed_rows, "index", i);
  atomicExch(reinterpret_cast<unsigned long long*>(p.owner + p.index[i]), static_cast<unsigned long long>(i));
}

// embeds[index[i]] = tokens[i]; i = blockIdx.x.
template <class T, int kN>
__global__ void __launch_bounds__(kCopyThreads) scatter_tokens_kernel(const __grid_constant__ ScatterTokensParams p) {
  const int64_t i = blockIdx.x, row = p.index[i];
  VICO_DEVICE_CHECK(p.owner[row] == i, "index must not name a row twice, got %lld again at position %lld",
                    static_cast<Long>(row), static_cast<Long>(max(p.owner[row], i)));
  copy_row<T, kN>(reinterpret_cast<T*>(p.embeds + row * p.embed_stride),
                  reinterpret_cast<const T*>(p.tokens + i * p.token_stride),
                  p.row_bytes / static_cast<int64_t>(sizeof(T) * kN));
}

}  // namespace

void merge_tokens_cuda(const MergeTokensParams& p, cudaStream_t stream) {
  const int64_t row_bytes = p.hidden * p.element_size;
  if (p.rows == 0 || row_bytes == 0) return;
  const int64_t strides = (p.embed_stride | p.token_stride) * p.element_size;
  dispatch_packs(address(p.embeds) | address(p.tokens) | address(p.out) | static_cast<uint64_t>(strides | row_bytes),
                 [&](auto element, auto width) {
                   using T = decltype(element);
                   constexpr int kN = decltype(width)::value;
                   launch(merge_tokens_kernel<T, kN>, dim3(row_blocks(p.rows)),
                          dim3(copy_threads(row_bytes / static_cast<int64_t>(sizeof(T) * kN))), 0, stream, p);
                 });
}

void merge_tokens_backward_cuda(const MergeTokensBackwardParams& p, cudaStream_t stream) {
  const int64_t first_row = p.need_embeds ? 0 : p.embed_rows;
  const int64_t rows = p.embed_rows + (p.need_tokens ? p.token_rows : 0) - first_row;
  if (rows == 0 || p.hidden == 0) return;
  launch(clear_uses_kernel, dim3(index_blocks(p.input_rows())), dim3(kIndexThreads), 0, stream, p);
  if (p.rows > 0) launch(find_uses_kernel, dim3(index_blocks(p.rows)), dim3(kIndexThreads), 0, stream, p);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const uint64_t strides = static_cast<uint64_t>(p.grad_stride | p.hidden) * sizeof(T);
    const bool wide = (address(p.grad_out) | address(p.grad_embeds) | address(p.grad_tokens) | strides) % 16 == 0;
    const int64_t packs = p.hidden / (wide ? kPackWidth<T> : 1);
    launch(wide ? merge_tokens_backward_kernel<T, kPackWidth<T>> : merge_tokens_backward_kernel<T, 1>,
           dim3(row_blocks(rows)), dim3(copy_threads(packs)), 0, stream, p, first_row);
  });
}

void scatter_tokens_cuda(const ScatterTokensParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.row_bytes == 0) return;
  launch(claim_rows_kernel, dim3(index_blocks(p.rows)), dim3(kIndexThreads), 0, stream, p);
  dispatch_packs(
      address(p.embeds) | address(p.tokens) | static_cast<uint64_t>(p.embed_stride | p.token_stride | p.row_bytes),
      [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int kN = decltype(width)::value;
        launch(scatter_tokens_kernel<T, kN>, dim3(row_blocks(p.rows)),
               dim3(copy_threads(p.row_bytes / static_cast<int64_t>(sizeof(T) * kN))), 0, stream, p);
      });
}

}  // namespace vico
