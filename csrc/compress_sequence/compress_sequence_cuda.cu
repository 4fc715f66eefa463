// CUDA kernels of compress_sequence: one block per row of the batch scans it in chunks. Several rows are counted by a
// launch of their own first, because each begins where those before it end; a row by itself counts in passing.
#include <string>

#include "common/block_scan.cuh"
#include "common/copy_row.cuh"
#include "common/divide.h"
#include "compress_sequence/compress_sequence.h"

namespace vico {
namespace {

using Long = long long;  // for formats

// fn(k, i) for the positions i = base + k, ascending, of this thread in a chunk as common/block_scan.cuh has them.
template <class Fn>
VICO_DEVICE void for_own_items(int64_t base, int64_t length, const Fn& fn) {
  const int64_t first = base + threadIdx.x * kScanItems;
#pragma unroll
  for (int k = 0; k < kScanItems; ++k) {
    if (first + k < length) fn(k, first + k);
  }
}

// What the two ways of a row have in common: positions in chunks, each warp the 32 * items that follow those of the
// warp before, lane l its positions l, l + 32, ... So loads are coalesced, all of a chunk's are on their way at once,
// and what comes before a position is counted in the bits of votes.
constexpr int kRowThreads = 1024, kRowItems = 10;

struct RowVotes {
  uint32_t length, items;

  VICO_DEVICE explicit RowVotes(int64_t row_length)
      : length(static_cast<uint32_t>(row_length)),
        items(min((length + kRowThreads - 1) / kRowThreads, uint32_t{kRowItems})) {}
  VICO_DEVICE uint32_t chunk() const { return items * kRowThreads; }
  // Position k of this lane.
  VICO_DEVICE uint32_t position(uint32_t base, int k) const {
    return base + threadIdx.x / 32 * 32 * items + 32 * static_cast<uint32_t>(k) + threadIdx.x % 32;
  }
  VICO_DEVICE bool has(uint32_t base, int k) const {
    return static_cast<uint32_t>(k) < items && position(base, k) < length;
  }
  template <class T>
  VICO_DEVICE void load(T (&to)[kRowItems], const T* from, uint32_t base) const {
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) to[k] = from[has(base, k) ? position(base, k) : length - 1];
  }
  // votes[k], bit l: fn(k, i) of the position i that lane l has as its k-th.
  template <class Fn>
  VICO_DEVICE void vote(uint32_t (&votes)[kRowItems], uint32_t base, const Fn& fn) const {
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) votes[k] = __ballot_sync(~0u, has(base, k) && fn(k, position(base, k)));
  }
};

VICO_DEVICE uint32_t lanes_before() { return (1u << threadIdx.x % 32) - 1; }

VICO_DEVICE uint32_t count_bits(const uint32_t (&votes)[kRowItems]) {
  uint32_t count = 0;
#pragma unroll
  for (int k = 0; k < kRowItems; ++k) count += static_cast<uint32_t>(__popc(votes[k]));
  return count;
}

// The sum over all warps before this one, and over all.
template <class T>
VICO_DEVICE T sum_of_warps(T value, T* scratch, T& total) {
  return scan_of_warps(value, T{0}, [](T x, T y) { return x + y; }, scratch, total);
}

VICO_DEVICE void vote_visual(uint32_t (&votes)[kRowItems], const RowVotes& row, const int64_t* ids, int64_t placeholder,
                             uint32_t base) {
  int64_t id[kRowItems];
  row.load(id, ids, base);
  row.vote(votes, base, [&](int k, uint32_t) { return id[k] == placeholder; });
}

// The positions of a row that are no padding, and the placeholders in them.
struct RowRange {
  uint32_t begin, end, placeholders;

  VICO_DEVICE bool has(uint32_t i) const { return i >= begin && i < end; }
};

VICO_DEVICE void vote_in_range(uint32_t (&votes)[kRowItems], const RowVotes& row, const RowRange& range,
                               uint32_t base) {
  uint32_t inside[kRowItems];
  row.vote(inside, base, [&](int, uint32_t i) { return range.has(i); });
#pragma unroll
  for (int k = 0; k < kRowItems; ++k) votes[k] &= inside[k];
}

// By the whole block. `first_votes` are the placeholders of the first chunk.
VICO_DEVICE RowRange find_range(const KeepPlaceholdersParams& p, int64_t b, const RowVotes& row,
                                const uint32_t (&first_votes)[kRowItems], uint32_t* scratch) {
  RowRange range{0, row.length, 0};
  if (p.mask) {
    uint32_t first = row.length, past = 0;
    for (uint32_t base = 0; base < row.length; base += row.chunk()) {
      unsigned char is_token[kRowItems];
      uint32_t votes[kRowItems];
      row.load(is_token, p.mask + b * p.length, base);
      row.vote(votes, base, [&](int k, uint32_t) { return is_token[k] != 0; });
#pragma unroll
      for (int k = 0; k < kRowItems; ++k) {
        if (votes[k] == 0) continue;
        const uint32_t at = row.position(base, k) - threadIdx.x % 32;
        first = min(first, at + static_cast<uint32_t>(__ffs(static_cast<int>(votes[k]))) - 1);
        past = at + 32 - static_cast<uint32_t>(__clz(static_cast<int>(votes[k])));
      }
    }
    scan_of_warps(first, row.length, [](uint32_t x, uint32_t y) { return x < y ? x : y; }, scratch, range.begin);
    scan_of_warps(past, 0u, [](uint32_t x, uint32_t y) { return x > y ? x : y; }, scratch, range.end);
    // As on the CPU where all is padding: an empty range at the end.
    if (range.begin == row.length) range.end = row.length;
  }
  uint32_t own = 0;
  for (uint32_t base = 0; base < row.length; base += row.chunk()) {
    uint32_t votes[kRowItems];
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) votes[k] = first_votes[k];
    if (base > 0) vote_visual(votes, row, p.input_ids + b * p.length, p.placeholder, base);
    vote_in_range(votes, row, range, base);
    own += count_bits(votes);
  }
  sum_of_warps(own, scratch, range.placeholders);
  return range;
}

// begin, end and placeholders of row blockIdx.x.
__global__ void __launch_bounds__(kRowThreads)
    count_placeholders_kernel(const __grid_constant__ KeepPlaceholdersParams p) {
  VICO_SHARED(uint32_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x;
  const RowVotes row(p.length);
  uint32_t visual[kRowItems] = {};
  if (row.length > 0) vote_visual(visual, row, p.input_ids + b * p.length, p.placeholder, 0);
  const RowRange range = find_range(p, b, row, visual, scratch);
  if (threadIdx.x != 0) return;
  p.begin[b] = range.begin;
  p.end[b] = range.end;
  p.placeholders[b] = range.placeholders;
}

// keep and counts of row blockIdx.x, which the kernel above has counted, or of the only row. Placeholder number c of a
// row belongs to the row's tile c / full_tokens.
template <bool kCounted>
__global__ void __launch_bounds__(kRowThreads)
    keep_placeholders_kernel(const __grid_constant__ KeepPlaceholdersParams p,
                             const __grid_constant__ Divisor full_tokens) {
  VICO_SHARED(uint32_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x;
  const int64_t* ids = p.input_ids + b * p.length;
  unsigned char* keep = p.keep + b * p.length;
  const RowVotes row(p.length);
  const uint32_t lane = threadIdx.x % 32;
  uint32_t visual[kRowItems] = {};
  if (row.length > 0) vote_visual(visual, row, ids, p.placeholder, 0);
  RowRange range;
  int64_t earlier = 0, total;
  if constexpr (kCounted) {
    VICO_SHARED(int64_t, sums, [kMaxWarps]);
    range = {static_cast<uint32_t>(p.begin[b]), static_cast<uint32_t>(p.end[b]), 0};
    earlier = block_sum_over(b, sums, [&](int64_t other) { return p.placeholders[other]; });
    total = earlier + block_sum_over(p.rows - b, sums, [&](int64_t other) { return p.placeholders[b + other]; });
  } else {
    range = find_range(p, b, row, visual, scratch);
    total = range.placeholders;
  }
  VICO_DEVICE_CHECK(
      total == p.tiles * p.full_tokens,
      "input_ids must hold %lld placeholders (id %lld) in the whole batch, padding left out: %lld tiles of "
      "the plan times %lld, got %lld. Is the plan that of this batch, and are the ids not compressed yet?",
      static_cast<Long>(p.tiles * p.full_tokens), static_cast<Long>(p.placeholder), static_cast<Long>(p.tiles),
      static_cast<Long>(p.full_tokens), static_cast<Long>(total));
  const unsigned char* compress = p.compress + (kCounted ? earlier / p.full_tokens : 0);
  uint32_t seen = 0, kept = 0;
  for (uint32_t base = 0; base < row.length; base += row.chunk()) {
    if (base > 0) vote_visual(visual, row, ids, p.placeholder, base);
    vote_in_range(visual, row, range, base);
    uint32_t all, c = seen + sum_of_warps(count_bits(visual), scratch, all);
    uint32_t dropped = 0, offsets[kRowItems];  // bit k: position k of this lane is
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const uint32_t number = c + static_cast<uint32_t>(__popc(visual[k] & lanes_before()));
      const uint32_t tile = full_tokens.quotient(number);
      offsets[k] = full_tokens.remainder(number, tile);
      if (visual[k] >> lane & 1 && offsets[k] >= p.compressed_tokens) dropped |= uint32_t{compress[tile] != 0} << k;
      c += static_cast<uint32_t>(__popc(visual[k]));
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const uint32_t i = row.position(base, k);
      const bool stays = row.has(base, k) && range.has(i) && !(dropped >> k & 1);
      if (row.has(base, k)) keep[i] = stays;
      kept += static_cast<uint32_t>(__popc(__ballot_sync(~0u, stays)));
      if (!(visual[k] >> lane & 1) || offsets[k] + 1 >= p.full_tokens) continue;
      bool goes_on = false;  // at the next position
      if (lane < 31) {
        goes_on = visual[k] >> (lane + 1) & 1;
      } else if (row.has(base, k + 1)) {
        goes_on = visual[k + 1 < kRowItems ? k + 1 : k] & 1;
      } else {
        goes_on = i + 1 < range.end && ids[i + 1] == p.placeholder;
      }
      VICO_DEVICE_CHECK(goes_on,
                        "every tile must own %lld consecutive placeholders (id %lld) of one row, got only %lld at "
                        "row %lld, position %lld%s",
                        static_cast<Long>(p.full_tokens), static_cast<Long>(p.placeholder),
                        static_cast<Long>(offsets[k] + 1), static_cast<Long>(b), static_cast<Long>(i - offsets[k]),
                        i + 1 == range.end ? ", where the row ends" : ", before another token");
    }
    seen += all;
  }
  sum_of_warps(kept, scratch, kept);
  if (threadIdx.x == 0) p.counts[b] = kept;
}

// What stays of a chunk, and which of that is placeholders.
VICO_DEVICE void vote_kept(uint32_t (&kept)[kRowItems], uint32_t (&visual)[kRowItems], const RowVotes& row,
                           const CompressSequenceParams& p, uint32_t base) {
  unsigned char keep[kRowItems];
  row.load(keep, p.keep + blockIdx.x * p.length, base);
  vote_visual(visual, row, p.input_ids + blockIdx.x * p.length, p.placeholder, base);
  row.vote(kept, base, [&](int k, uint32_t) { return keep[k] != 0; });
#pragma unroll
  for (int k = 0; k < kRowItems; ++k) visual[k] &= kept[k];
}

constexpr int64_t kVisual = int64_t{1} << 32;  // two counts in one number: positions, and placeholders times this

VICO_DEVICE int64_t count_both(const uint32_t (&kept)[kRowItems], const uint32_t (&visual)[kRowItems]) {
  return count_bits(kept) + count_bits(visual) * kVisual;
}

// By the whole block; `first_kept` and `first_visual` are those of the first chunk.
VICO_DEVICE int64_t count_row(const RowVotes& row, const CompressSequenceParams& p,
                              const uint32_t (&first_kept)[kRowItems], const uint32_t (&first_visual)[kRowItems],
                              int64_t* scratch) {
  int64_t own = count_both(first_kept, first_visual), total;
  for (uint32_t base = row.chunk(); base < row.length; base += row.chunk()) {
    uint32_t kept[kRowItems], visual[kRowItems];
    vote_kept(kept, visual, row, p, base);
    own += count_both(kept, visual);
  }
  sum_of_warps(own, scratch, total);
  return total;
}

// counts and visual of row blockIdx.x.
__global__ void __launch_bounds__(kRowThreads) count_kept_kernel(const __grid_constant__ CompressSequenceParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const RowVotes row(p.length);
  uint32_t kept[kRowItems] = {}, visual[kRowItems] = {};
  if (row.length > 0) vote_kept(kept, visual, row, p, 0);
  const int64_t total = count_row(row, p, kept, visual, scratch);
  if (threadIdx.x != 0) return;
  p.counts[blockIdx.x] = total % kVisual;
  p.visual[blockIdx.x] = total / kVisual;
}

// position and source of row blockIdx.x, which the kernel above has counted, or of the only row, by prefix sums over
// the positions and the placeholders that stay.
template <bool kCounted>
__global__ void __launch_bounds__(kRowThreads)
    compress_sequence_kernel(const __grid_constant__ CompressSequenceParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t b = blockIdx.x;
  const RowVotes row(p.length);
  const uint32_t lane = threadIdx.x % 32;
  uint32_t kept[kRowItems] = {}, visual[kRowItems] = {};
  if (row.length > 0) vote_kept(kept, visual, row, p, 0);
  int64_t count, number = p.rows * p.length;
  if constexpr (kCounted) {
    count = p.counts[b];
    number += block_sum_over(b, scratch, [&](int64_t other) { return p.visual[other]; });
  } else {
    count = count_row(row, p, kept, visual, scratch) % kVisual;
  }
  VICO_DEVICE_CHECK(count <= p.out_length, "length must be at least the %lld positions that row %lld keeps, got %lld",
                    static_cast<Long>(count), static_cast<Long>(b), static_cast<Long>(p.out_length));
  const int64_t padding = p.out_length - count;
  int64_t* position = p.position + b * p.out_length;
  int64_t* source = p.source + b * p.out_length;
  for (int64_t i = threadIdx.x; i < padding; i += blockDim.x) {
    const int64_t column = p.pad_left ? i : count + i;
    position[column] = source[column] = -1;
  }
  int64_t column = p.pad_left ? padding : 0;
  for (uint32_t base = 0; base < row.length; base += row.chunk()) {
    if (base > 0) vote_kept(kept, visual, row, p, base);
    int64_t all;
    const int64_t before = sum_of_warps(count_both(kept, visual), scratch, all);
    int64_t out = column + before % kVisual, own_number = number + before / kVisual;
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      if (kept[k] >> lane & 1) {
        const int64_t to = out + __popc(kept[k] & lanes_before()), from = b * p.length + row.position(base, k);
        position[to] = from;
        source[to] = visual[k] >> lane & 1 ? own_number + __popc(visual[k] & lanes_before()) : from;
      }
      out += __popc(kept[k]);
      own_number += __popc(visual[k]);
    }
    column += all % kVisual;
    number += all / kVisual;
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

// out[t] of tile t = blockIdx.x. Each block finds its own tile, so that no output waits for another block's and a tile
// that is nowhere is noticed. It begins where the tile would be without text before it, and stops where it is: few
// chunks for a prompt of images.
__global__ void __launch_bounds__(kScanThreads) tile_rows_kernel(const __grid_constant__ TileRowsParams p) {
  VICO_SHARED(int64_t, scratch, [kMaxWarps]);
  const int64_t t = blockIdx.x, first = p.cu_tokens[t], last = p.cu_tokens[t + 1];
  const bool is_range = first >= 0 && last > first && last <= p.rows;
  const int64_t number = is_range ? p.embed_rows + first : 0, tokens = is_range ? last - first : 0;
  int64_t row = p.rows;
  for (int64_t base = is_range ? first : p.rows; base < p.rows && row == p.rows; base += kScanChunk) {
    int64_t own = p.rows;
#pragma unroll
    for (int k = kScanItems - 1; k >= 0; --k) {
      const int64_t i = base + k * kScanThreads + threadIdx.x;
      if (i < p.rows && p.source[i] == number) own = i;
    }
    block_scan(own, p.rows, [](int64_t x, int64_t y) { return x < y ? x : y; }, scratch, row);
  }
  bool is_there = is_range && row <= p.rows - tokens;
  for (int64_t j = threadIdx.x; is_there && j < tokens; j += kScanThreads) is_there = p.source[row + j] == number + j;
  VICO_DEVICE_CHECK(is_there,
                    "source must hold the tokens of tile %lld, %lld to %lld of cu_tokens behind %lld rows of "
                    "embeddings, one after another: is the plan of another batch?",
                    static_cast<Long>(t), static_cast<Long>(first), static_cast<Long>(last),
                    static_cast<Long>(p.embed_rows));
  if (threadIdx.x == 0) p.out[t] = row;
}

// Positions of a row are counted in 32 bits.
void check_row_length(int64_t length) {
  if (length >= INT32_MAX) {
    throw std::runtime_error("rows of " + std::to_string(length) + " token ids: CUDA kernels take up to 2^31 - 2");
  }
}

}  // namespace

void keep_placeholders_cuda(const KeepPlaceholdersParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  check_row_length(p.length);
  // Numbers of placeholders are below 2^31 - 1, so that greater divisors make no difference.
  const Divisor full_tokens(p.full_tokens < INT32_MAX ? p.full_tokens : INT32_MAX);
  const dim3 grid(row_blocks(p.rows)), block(kRowThreads);
  if (p.rows > 1) launch(count_placeholders_kernel, grid, block, 0, stream, p);
  launch(p.rows > 1 ? keep_placeholders_kernel<true> : keep_placeholders_kernel<false>, grid, block, 0, stream, p,
         full_tokens);
}

void compress_sequence_cuda(const CompressSequenceParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  check_row_length(p.length);
  const dim3 grid(row_blocks(p.rows)), block(kRowThreads);
  if (p.rows > 1) launch(count_kept_kernel, grid, block, 0, stream, p);
  launch(p.rows > 1 ? compress_sequence_kernel<true> : compress_sequence_kernel<false>, grid, block, 0, stream, p);
}

void renumber_positions_cuda(const RenumberPositionsParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.out_length == 0) return;
  launch(renumber_positions_kernel, dim3(row_blocks(p.rows)), dim3(kScanThreads), 0, stream, p);
}

void tile_rows_cuda(const TileRowsParams& p, cudaStream_t stream) {
  if (p.tiles == 0) return;
  launch(tile_rows_kernel, dim3(row_blocks(p.tiles)), dim3(kScanThreads), 0, stream, p);
}

}  // namespace vico
