// CUDA kernels of compress_sequence: one block per row of the batch scans it in chunks (common/block_scan.cuh), thread
// t of a chunk the kScanItems positions from t * kScanItems on.
#include "common/block_scan.cuh"
#include "common/copy_row.cuh"
#include "compress_sequence/compress_sequence.h"

namespace vico {
namespace {

using Long = long long;  // for formats

// fn(k, i) for the positions i = base + k, ascending, of this thread.
template <class Fn>
VICO_DEVICE void for_own_items(int64_t base, int64_t length, const Fn& fn) {
  const int64_t first = base + threadIdx.x * kScanItems;
#pragma unroll
  for (int k = 0; k < kScanItems; ++k) {
    if (first + k < length) fn(k, first + k);
  }
}

// begin, end and placeholders of row blockIdx.x.
__global__ void __launch_bounds__(kScanThreads)
    count_placeholders_kernel(const __grid_constant__ KeepPlaceholdersParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x;
  const int64_t* ids = p.input_ids + b * p.length;
  int64_t begin = 0, end = p.length;
  if (p.mask) {
    const unsigned char* mask = p.mask + b * p.length;
    int64_t last = -1, first = p.length;
    for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
      if (!mask[i]) continue;
      first = min(first, i);
      last = i;
    }
    block_scan(first, p.length, [](int64_t x, int64_t y) { return x < y ? x : y; }, scratch, begin);
    block_scan(last, int64_t{-1}, [](int64_t x, int64_t y) { return x > y ? x : y; }, scratch, end);
    ++end;
    // As on the CPU where all is padding: an empty range at the end.
    if (begin == p.length) end = p.length;
  }
  const int64_t count =
      block_sum_over(end - begin, scratch, [&](int64_t i) { return ids[begin + i] == p.placeholder; });
  if (threadIdx.x != 0) return;
  p.begin[b] = begin;
  p.end[b] = end;
  p.placeholders[b] = count;
}

// keep and counts of row blockIdx.x. Placeholder number c of a row belongs to the row's tile c / full_tokens.
__global__ void __launch_bounds__(kScanThreads)
    keep_placeholders_kernel(const __grid_constant__ KeepPlaceholdersParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x, begin = p.begin[b], end = p.end[b];
  const int64_t* ids = p.input_ids + b * p.length;
  unsigned char* keep = p.keep + b * p.length;
  const int64_t earlier = block_sum_over(b, scratch, [&](int64_t row) { return p.placeholders[row]; });
  const int64_t total =
      earlier + block_sum_over(p.rows - b, scratch, [&](int64_t row) { return p.placeholders[b + row]; });
  VICO_DEVICE_CHECK(
      total == p.tiles * p.full_tokens,
      "input_ids must hold %lld placeholders (id %lld) in the whole batch, padding left out: %lld tiles of "
      "the plan times %lld, got %lld. Is the plan that of this batch, and are the ids not compressed yet?",
      static_cast<Long>(p.tiles * p.full_tokens), static_cast<Long>(p.placeholder), static_cast<Long>(p.tiles),
      static_cast<Long>(p.full_tokens), static_cast<Long>(total));
  const int64_t first_tile = earlier / p.full_tokens;
  int64_t seen = 0, kept = 0;
  for (int64_t base = 0; base < p.length; base += kScanChunk) {
    int64_t own = 0, all;
    unsigned visual = 0;  // bit k: position k of this thread is a placeholder
    for_own_items(base, p.length, [&](int k, int64_t i) {
      const unsigned is_visual = i >= begin && i < end && ids[i] == p.placeholder;
      visual |= is_visual << k;
      own += is_visual;
    });
    int64_t c = seen + block_prefix_sum(own, scratch, all);
    for_own_items(base, p.length, [&](int k, int64_t i) {
      bool stays = i >= begin && i < end;
      if (visual >> k & 1) {
        const int64_t offset = c % p.full_tokens;
        stays = offset < p.compressed_tokens || !p.compress[first_tile + c / p.full_tokens];
        ++c;
        if (offset + 1 < p.full_tokens) {
          VICO_DEVICE_CHECK(i + 1 < end && ids[i + 1] == p.placeholder,
                            "every tile must own %lld consecutive placeholders (id %lld) of one row, got only %lld at "
                            "row %lld, position %lld%s",
                            static_cast<Long>(p.full_tokens), static_cast<Long>(p.placeholder),
                            static_cast<Long>(offset + 1), static_cast<Long>(b), static_cast<Long>(i - offset),
                            i + 1 == end ? ", where the row ends" : ", before another token");
        }
      }
      keep[i] = stays;
      kept += stays;
    });
    seen += all;
  }
  int64_t count;
  block_prefix_sum(kept, scratch, count);
  if (threadIdx.x == 0) p.counts[b] = count;
}

// counts and visual of row blockIdx.x.
__global__ void __launch_bounds__(kScanThreads) count_kept_kernel(const __grid_constant__ CompressSequenceParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t* ids = p.input_ids + blockIdx.x * p.length;
  const unsigned char* keep = p.keep + blockIdx.x * p.length;
  const int64_t kept = block_sum_over(p.length, scratch, [&](int64_t i) { return keep[i]; });
  const int64_t visual =
      block_sum_over(p.length, scratch, [&](int64_t i) { return keep[i] & (ids[i] == p.placeholder); });
  if (threadIdx.x != 0) return;
  p.counts[blockIdx.x] = kept;
  p.visual[blockIdx.x] = visual;
}

// position and source of row blockIdx.x, by prefix sums over the positions and the placeholders that stay.
__global__ void __launch_bounds__(kScanThreads)
    compress_sequence_kernel(const __grid_constant__ CompressSequenceParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x, count = p.counts[b];
  const int64_t* ids = p.input_ids + b * p.length;
  const unsigned char* keep = p.keep + b * p.length;
  VICO_DEVICE_CHECK(count <= p.out_length, "length must be at least the %lld positions that row %lld keeps, got %lld",
                    static_cast<Long>(count), static_cast<Long>(b), static_cast<Long>(p.out_length));
  const int64_t padding = p.out_length - count, first_column = p.pad_left ? padding : 0;
  int64_t* position = p.position + b * p.out_length;
  int64_t* source = p.source + b * p.out_length;
  for (int64_t i = threadIdx.x; i < padding; i += blockDim.x) {
    const int64_t column = p.pad_left ? i : count + i;
    position[column] = source[column] = -1;
  }
  int64_t column = first_column;
  int64_t visual = p.rows * p.length + block_sum_over(b, scratch, [&](int64_t row) { return p.visual[row]; });
  for (int64_t base = 0; base < p.length; base += kScanChunk) {
    constexpr int64_t kVisual = int64_t{1} << 32;  // both counts in one number: at most kScanChunk each
    int64_t own = 0, all;
    for_own_items(base, p.length, [&](int, int64_t i) {
      if (keep[i]) own += ids[i] == p.placeholder ? 1 + kVisual : 1;
    });
    const int64_t before = block_prefix_sum(own, scratch, all);
    int64_t out = column + before % kVisual, number = visual + before / kVisual;
    for_own_items(base, p.length, [&](int, int64_t i) {
      if (!keep[i]) return;
      position[out] = b * p.length + i;
      source[out++] = ids[i] == p.placeholder ? number++ : b * p.length + i;
    });
    column += all % kVisual;
    visual += all / kVisual;
  }
}

// out of row blockIdx.x. With rank(i) the kept positions before position i, i - rank(i) were dropped before it, and
//   out = position_ids[i] - ((i - rank(i)) - (r - rank(r))),  r the last reset up to i, or the first kept position.
// i - rank(i) never falls, so that the last r is that of the largest r - rank(r).
__global__ void __launch_bounds__(kScanThreads)
    renumber_positions_kernel(const __grid_constant__ RenumberPositionsParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const auto larger = [](int64_t x, int64_t y) { return x > y ? x : y; };
  const int64_t b = blockIdx.x;
  const int64_t* ids = p.position_ids + b * p.row_stride;
  const int64_t* position = p.position + b * p.out_length;
  int64_t* out = p.out + b * p.out_length;
  int64_t* column = p.column + b * p.length;  // of the output that position i becomes, or -1
  for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) column[i] = -1;
  __syncthreads();
  int64_t last = -1;
  for (int64_t base = 0; base < p.out_length; base += kScanChunk) {
    int64_t own = -1, all;
    for_own_items(base, p.out_length, [&](int, int64_t j) {
      if (position[j] >= 0) own = position[j] - b * p.length;
    });
    int64_t before = larger(last, block_scan(own, int64_t{-1}, larger, scratch, all));
    for_own_items(base, p.out_length, [&](int, int64_t j) {
      if (position[j] < 0) {
        out[j] = 0;
        return;
      }
      const int64_t kept = position[j] - b * p.length;
      VICO_DEVICE_CHECK(kept > before && kept < p.length,
                        "position must hold flat positions of its own row, ascending, or -1: row %lld has %lld at "
                        "position %lld for a length of %lld",
                        static_cast<Long>(b), static_cast<Long>(position[j]), static_cast<Long>(j),
                        static_cast<Long>(p.length));
      column[kept] = j;
      before = kept;
    });
    last = larger(last, all);
  }
  __syncthreads();
  int64_t rank = 0, origin = 0;  // origin: the largest r - rank(r) so far
  for (int64_t base = 0; base < p.length; base += kScanChunk) {
    int64_t own = 0, kept_in_chunk, chunk_origin;
    for_own_items(base, p.length, [&](int, int64_t i) { own += column[i] >= 0; });
    const int64_t own_rank = rank + block_prefix_sum(own, scratch, kept_in_chunk);
    // Before the first kept position resets are no larger than it, so that it may count as one.
    const auto walk = [&](int64_t own_origin, const auto& fn) {
      int64_t r = own_rank;
      for_own_items(base, p.length, [&](int, int64_t i) {
        const bool is_kept = column[i] >= 0;
        if ((is_kept && r == 0) || (i > 0 && ids[i] != ids[i - 1] + 1)) own_origin = larger(own_origin, i - r);
        if (is_kept) fn(i, i - r - own_origin);
        r += is_kept;
      });
      return own_origin;
    };
    const int64_t reached = walk(0, [](int64_t, int64_t) {});
    const int64_t own_origin = larger(origin, block_scan(reached, int64_t{0}, larger, scratch, chunk_origin));
    walk(own_origin, [&](int64_t i, int64_t dropped) { out[column[i]] = ids[i] - dropped; });
    rank += kept_in_chunk;
    origin = larger(origin, chunk_origin);
  }
}

}  // namespace

void count_placeholders_cuda(const KeepPlaceholdersParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch(count_placeholders_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

void keep_placeholders_cuda(const KeepPlaceholdersParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch(keep_placeholders_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

void count_kept_cuda(const CompressSequenceParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch(count_kept_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

void compress_sequence_cuda(const CompressSequenceParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch(compress_sequence_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

void renumber_positions_cuda(const RenumberPositionsParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.out_length == 0) return;
  launch(renumber_positions_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

}  // namespace vico
