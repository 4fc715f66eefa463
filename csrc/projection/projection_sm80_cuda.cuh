// The projection kernel for sm_80 and later: cp.async, ldmatrix, mma.sync. Any shape; one block per tile.
//
// A block of 2 x 4 warps computes 128 x 128 elements in steps of 32 along K; warp (w / 4, w % 4) has 64 rows and 32
// columns, as 4 x 4 fragments of 16 x 8. A stage holds 128 rows of A, then 128 of W, of 32 elements each: four chunks
// of 16 bytes, xored with bits 1 and 2 of the row, which spreads every eight rows over all banks.
#pragma once

#include "common/shuffle_row.cuh"
#include "projection/projection_output_cuda.cuh"

namespace vico {

struct Sm80Projection {
  static constexpr int kRows = 128, kColumns = 128, kDepth = 32, kStages = 4, kThreads = 256;
  static constexpr int kStage = (kRows + kColumns) * kDepth;  // elements
  static constexpr int kShared = kStages * kStage * 2;        // bytes

  VICO_DEVICE static int place(int row, int chunk) { return row * kDepth + (chunk ^ (row >> 1 & 3)) * 8; }
};

// A position along K: it runs over the tokens of a block, row by row. An ordinary row is one token without end.
struct DepthCursor {
  int at = 0, channel = 0, j = 0;

  // Returns how far in memory the row goes on.
  VICO_DEVICE int64_t advance(const ProjectionGroup& g, int count) {
    const int channels = g.shuffled ? static_cast<int>(g.shape.channels) : INT32_MAX;
    int64_t moved = count;
    at += count;
    channel += count;
    while (channel >= channels) {
      channel -= channels;
      moved += g.shape.token_stride - channels;
      if (++j == static_cast<int>(g.shape.rate)) {
        j = 0;
        moved += g.shape.row_offset(1) - g.shape.rate * g.shape.token_stride;
      }
    }
    return moved;
  }
};

// The first element of row `row` of A. All that is divided fits 32 bits.
template <class T>
VICO_DEVICE const T* row_of_a(const ProjectionGroup& g, unsigned row) {
  const T* a = static_cast<const T*>(g.a);
  if (!g.shuffled) return a + row * g.a_stride;
  const ShuffleShape& s = g.shape;
  const unsigned rate = static_cast<unsigned>(s.rate);
  const unsigned out_h = static_cast<unsigned>(s.grid_h) / rate, out_w = static_cast<unsigned>(s.grid_w) / rate;
  const unsigned tile = row / (out_h * out_w), token = row % (out_h * out_w);
  const unsigned h = s.transposed ? token % out_h : token / out_w, w = s.transposed ? token / out_h : token % out_w;
  return a + checked_source_tile(s, tile) * s.tile_stride +
         (s.skip + h * s.rate * s.grid_w + w * s.rate) * s.token_stride;
}

// Copies the chunk of 8 elements that begins at the cursor, whose place in memory is `from`; zeros where the row or the
// depth is outside.
template <class T, bool kWide, bool kIsA>
VICO_DEVICE void copy_chunk(const ProjectionGroup& g, T* to, const T* from, bool valid, DepthCursor cursor) {
  if constexpr (kWide) {  // 8 divides K and the channels: a chunk is whole
    ptx::cp_async_16(to, from, valid && cursor.at < g.depth ? 16 : 0);
  } else {
    Pack<T, 8> chunk{};
#pragma unroll 1
    for (int i = 0; i < 8 && valid && cursor.at < g.depth; ++i) {
      chunk.at[i] = *from;
      const int64_t moved = cursor.advance(g, 1);
      from += kIsA ? moved : 1;
    }
    store_pack(to, chunk);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(Sm80Projection::kThreads, kWide ? 2 : 1)
    projection_sm80_kernel(const __grid_constant__ ProjectionParams p) {
  using S = Sm80Projection;
  VICO_DYNAMIC_SHARED(T, shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const ProjectionTile tile = find_tile<S::kRows, S::kColumns>(p, blockIdx.x);
  const ProjectionGroup& g = p.group[tile.group];

  // Thread t copies chunk t % 4 of rows t / 4 and t / 4 + 64 of A and of W. Places outside are never read.
  const T *from_a[2], *from_w[2];
  bool valid_a[2], valid_w[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int m = tile.row + tid / 4 + 64 * u, n = tile.column + tid / 4 + 64 * u;
    valid_a[u] = m < g.rows;
    valid_w[u] = n < g.columns;
    from_a[u] = row_of_a<T>(g, valid_a[u] ? static_cast<unsigned>(m) : 0);
    from_w[u] = static_cast<const T*>(g.weight) + (valid_w[u] ? n : 0) * g.depth;
  }
  DepthCursor cursor;
  const int steps = static_cast<int>((g.depth + S::kDepth - 1) / S::kDepth), chunk = tid % 4;
  const auto advance = [&](int count) {
    const int64_t moved = cursor.advance(g, count);
    for (int u = 0; u < 2; ++u) {
      from_a[u] += moved;
      from_w[u] += count;
    }
  };
  if (steps > 0) advance(8 * chunk);
  const auto copy = [&](int step) {
    if (step < steps) {
      T* to = shared + step % S::kStages * S::kStage + S::place(tid / 4, chunk);
      for (int u = 0; u < 2; ++u) {  // 64 rows on, a chunk's place is xored alike
        T* to_row = to + 64 * u * S::kDepth;
        copy_chunk<T, kWide, true>(g, to_row, from_a[u], valid_a[u], cursor);
        copy_chunk<T, kWide, false>(g, to_row + S::kRows * S::kDepth, from_w[u], valid_w[u], cursor);
      }
      advance(S::kDepth);
    }
    ptx::cp_async_commit();
  };

  float sums[4][4][4] = {};
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
#pragma unroll 1
  for (int step = 0; step < S::kStages - 1; ++step) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<S::kStages - 2>();
    // Every thread's copies of this step have landed, and the stage of the step before is free again.
    __syncthreads();
    copy(step + S::kStages - 1);
    const T *stage_a = shared + step % S::kStages * S::kStage, *stage_w = stage_a + S::kRows * S::kDepth;
#pragma unroll
    for (int k = 0; k < S::kDepth / 16; ++k) {
      uint32_t a[4][4], w[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::ldmatrix(a[i], stage_a + S::place(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // two fragments at once: rows of W are columns of the product
        uint32_t both[4];
        ptx::ldmatrix(both, stage_w + S::place(warp_column + 8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        w[j][0] = both[0];
        w[j][1] = both[1];
        w[j + 1][0] = both[2];
        w[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (std::is_same_v<T, Half>) {
            ptx::mma_m16n8k16_f16(sums[i][j], a[i], w[j]);
          } else {
            ptx::mma_m16n8k16_bf16(sums[i][j], a[i], w[j]);
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

  __syncthreads();  // the stages are read: the sums may lie there
  const int column = tile.column + warp_column;
  if (column >= g.columns) return;
  using Staged = StagedSums<32>;
  static_assert(S::kThreads / 32 * Staged::kFloats * 4 <= S::kShared);
  float* stage = reinterpret_cast<float*>(shared) + warp * Staged::kFloats;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    __syncwarp();  // the rows before are read
#pragma unroll
    for (int held = 0; held < 4; ++held) {
      if (held == i) Staged::put(stage, [&](int j, int r) { return sums[held][j][r]; });
    }
    __syncwarp();
    const int row = tile.row + warp_row + 16 * i;
    const OutputRow lane_row = output_row<true>(g, row + lane % 16);
    Staged::write<T>(g, row, column, stage, lane_row, [&](int c) { return ColumnTerms(g, c); });
  }
}

// Whether all of A's and W's chunks of 8 elements are aligned to 16 bytes.
inline bool has_wide_operands(const ProjectionGroup& g) {
  const bool rows = g.shuffled ? has_aligned_tokens(g.shape, 2, g.a) : is_aligned16(g.a) && g.a_stride % 8 == 0;
  return g.rows == 0 || (rows && is_aligned16(g.weight) && g.depth % 8 == 0);
}

inline void launch_projection_sm80(const ProjectionParams& params, cudaStream_t stream) {
  using S = Sm80Projection;
  const ProjectionParams p = deepest_first(params);
  const unsigned tiles = checked_tiles<S::kRows, S::kColumns>(p);
  if (tiles == 0) return;
  const bool wide = has_wide_operands(p.group[0]) && has_wide_operands(p.group[1]);
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = wide ? projection_sm80_kernel<T, true> : projection_sm80_kernel<T, false>;
    launch(kernel, dim3(tiles), dim3(S::kThreads), S::kShared, stream, p);
  });
}

}  // namespace vico
