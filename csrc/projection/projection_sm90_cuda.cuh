// The projection kernel for sm_90a: persistent, warp-specialised, TMA and wgmma.
//
// Warp group 0 keeps a ring of stages filled, one thread of it issuing the copies; groups 1 and 2 multiply 64 rows each
// of a tile of 128 rows and kN columns, in steps of 64 along K. A stage holds 128 rows of A, then kN of W, each row 64
// elements = 128 bytes, swizzled. The ring goes on from tile to tile.
#pragma once

#include <algorithm>

#include "common/shuffle_row.cuh"
#include "common/tensor_map.cuh"
#include "projection/projection_output_cuda.cuh"

namespace vico {

template <int kN>
struct Sm90Projection {
  static constexpr int kRows = 128, kDepth = 64, kBoxRows = 64, kThreads = 384;
  static constexpr int kBoxBytes = kBoxRows * kDepth * 2;
  static constexpr int kStageBytes = (kRows + kN) * kDepth * 2;
  static constexpr int kStages = kN == 256 ? 4 : 6;
  static constexpr int kSums = kStages * kStageBytes;  // behind the ring: a part of each consumer warp's sums
  static constexpr int kShared = kSums + 8 * StagedSums<64>::kFloats * 4;
};

// Of A: boxes of 64 rows, from rows {K, M}, or from tokens {rate * V, inner, outer, image tile, row of the block} with
// (inner, outer) the output grid's columns and rows (its rows and columns if it is transposed). Of W {K, N}: kN rows.
struct ProjectionMaps {
  CUtensorMap a[2], weight[2];
};

// A stage of the ring, and the parity of its current phase.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  template <int kStages>
  VICO_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where a box of 64 rows of A comes from.
struct BoxOfA {
  bool shuffled;
  int row, run, outer, tile;  // run: elements that are contiguous along K

  VICO_DEVICE BoxOfA(const ProjectionGroup& g, int first_row)
      : shuffled(g.shuffled), row(first_row), run(1), outer(0), tile(0) {
    if (!shuffled) return;
    const ShuffleShape& s = g.shape;
    run = static_cast<int>(s.rate * s.channels);
    const int64_t inner = s.transposed ? s.out_h() : s.out_w();
    outer = static_cast<int>(first_row % s.out_tokens() / inner);
    // Behind the last row lies the tile after the last one: outside the tensor, zeros. Bad indices lead there too.
    const int64_t source = first_row < g.rows ? s.source_tile(first_row / s.out_tokens()) : s.tiles;
    tile = static_cast<int>(source >= 0 && source < s.tiles ? source : s.tiles);
  }
  VICO_DEVICE void load(void* to, const CUtensorMap* map, int k, uint64_t* full) const {
    if (shuffled) {
      const int at[5] = {k % run, 0, outer, tile, k / run};
      ptx::tma_load(to, map, at, full);
    } else {
      const int at[2] = {k, row};
      ptx::tma_load(to, map, at, full);
    }
  }
};

// The descriptor of an operand of wgmma in the ring; its address is in units of 16 bytes.
VICO_DEVICE uint64_t operand(uint32_t address) { return ptx::matrix_descriptor(address, 16, 1024, ptx::Swizzle::k128); }

// Ends with a message where a row would go to a place that does not exist, or a tile of the view is none. The main
// kernel must not: a call anywhere in it, and ptxas has every wgmma wait for the one before (C7510), at half the speed.
static __global__ void __launch_bounds__(256) projection_indices_kernel(const __grid_constant__ ProjectionParams p) {
  const ProjectionGroup& g = p.group[blockIdx.y];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= g.rows) return;
  output_row<true>(g, i);
  if (g.shuffled && i < g.shape.selected) checked_source_tile(g.shape, i);
}

inline bool has_indices(const ProjectionGroup& g) {
  return g.rows > 0 && (g.out_row || (g.shuffled && g.shape.tile_index));
}

template <class T, int kN>
__global__ void __launch_bounds__(Sm90Projection<kN>::kThreads, 1)
    projection_sm90_kernel(const __grid_constant__ ProjectionParams p, const __grid_constant__ ProjectionMaps maps,
                           unsigned tiles) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Sm90Projection<kN>;
  VICO_DYNAMIC_SHARED(unsigned char, shared);
  VICO_SHARED(uint64_t, full, [S::kStages]);
  VICO_SHARED(uint64_t, empty, [S::kStages]);
  const int tid = static_cast<int>(threadIdx.x), warp_group = tid / 128, lane = tid % 32;
  if (tid == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], 8);  // the consumers' warps
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  RingPlace ring;
  if (warp_group == 0) {
    ptx::take_fewer_registers<40>();
    if (tid != 0) return;
#pragma unroll 1
    for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
      const ProjectionTile tile = find_tile<S::kRows, kN>(p, index);
      const ProjectionGroup& g = p.group[tile.group];
      const BoxOfA upper(g, tile.row), lower(g, tile.row + S::kBoxRows);
      const CUtensorMap *map_a = &maps.a[tile.group], *map_w = &maps.weight[tile.group];
      const int depth = static_cast<int>(g.depth), column = tile.column;
#pragma unroll 1
      for (int k = 0; k < depth; k += S::kDepth) {
        unsigned char* stage = shared + ring.stage * S::kStageBytes;
        uint64_t* landed = &full[ring.stage];
        ptx::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(landed, S::kStageBytes);
        upper.load(stage, map_a, k, landed);
        lower.load(stage + S::kBoxBytes, map_a, k, landed);
        const int at[2] = {k, column};
        ptx::tma_load(stage + 2 * S::kBoxBytes, map_w, at, landed);
        ring.advance<S::kStages>();
      }
    }
    return;
  }

  ptx::take_more_registers<232>();
  const int box = warp_group - 1, warp = tid / 32 % 4;
  const uint32_t ring_address = ptx::shared_address(shared);
  const uint64_t ring_a = operand(ring_address + static_cast<uint32_t>(box * S::kBoxBytes));
  const uint64_t ring_w = operand(ring_address + 2 * S::kBoxBytes);
  using Staged = StagedSums<64>;
  float* staged = reinterpret_cast<float*>(shared + S::kSums) + (tid / 32 - 4) * Staged::kFloats;
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const ProjectionTile tile = find_tile<S::kRows, kN>(p, index);
    const ProjectionGroup& g = p.group[tile.group];
    const int steps = static_cast<int>((g.depth + S::kDepth - 1) / S::kDepth);
    float sums[kN / 2] = {};
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::mbarrier_wait(&full[ring.stage], ring.parity);
      const uint64_t stage = static_cast<uint64_t>(ring.stage) * (S::kStageBytes / 16);
      ptx::wgmma_fence();
#pragma unroll
      for (uint64_t k = 0; k < S::kDepth / 16; ++k) {
        ptx::wgmma_m64k16<kN, std::is_same_v<T, Half>>(sums, ring_a + stage + 2 * k, ring_w + stage + 2 * k, true);
      }
      ptx::wgmma_commit();
      if (step > 0) {  // the step before is through: its stage may be filled again
        ptx::wgmma_wait<1>();
        if (lane == 0) ptx::mbarrier_arrive(&empty[previous]);
      }
      previous = ring.stage;
      ring.advance<S::kStages>();
    }
    const int row = tile.row + box * S::kBoxRows + 16 * warp, lane_column = lane % Staged::kRowLanes * 8;
    const OutputRow lane_row = output_row<false>(g, row + lane % 16);
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&empty[previous]);

#pragma unroll 1
    for (int column = tile.column; column < tile.column + kN && column < g.columns; column += 64) {
      const ColumnTerms terms(g, column + lane_column);  // on their way while the sums are put
      __syncwarp();                                      // the part before is read
#pragma unroll
      for (int held = 0; held < kN / 64; ++held) {
        if (tile.column + 64 * held == column)
          Staged::put(staged, [&](int j, int r) { return sums[32 * held + 4 * j + r]; });
      }
      __syncwarp();
      Staged::write<T>(g, row, column, staged, lane_row, [&](int) { return terms; });
    }
  }
#else
  VICO_DEVICE_CHECK(false, "the projection needs machine code for sm_90a on this GPU, build with 90a-real");
#endif
}

// The tensor map of a group's A.
inline CUtensorMap map_of_a(const ProjectionGroup& g, MapElement element) {
  TensorMapShape m;
  m.element = element;
  m.base = const_cast<void*>(g.a);
  m.swizzle = ptx::Swizzle::k128;
  m.box[0] = 64;
  if (!g.shuffled) {
    m.rank = 2;
    m.size[0] = static_cast<uint64_t>(g.depth);
    m.size[1] = static_cast<uint64_t>(g.rows);
    m.stride[0] = static_cast<uint64_t>(2 * g.a_stride);
    m.box[1] = 64;
    return encode_tensor_map(m);
  }
  const ShuffleShape& s = g.shape;
  const int64_t across = s.rate * s.token_stride, down = s.row_offset(s.rate);  // to the next output token
  const int64_t sizes[] = {s.rate * s.channels, s.transposed ? s.out_h() : s.out_w(),
                           s.transposed ? s.out_w() : s.out_h(), s.tiles, s.rate};
  const int64_t strides[] = {s.transposed ? down : across, s.transposed ? across : down, s.tile_stride,
                             s.row_offset(1)};
  m.rank = 5;
  m.base = static_cast<char*>(m.base) + 2 * s.skip * s.token_stride;
  for (int d = 0; d < 5; ++d) m.size[d] = static_cast<uint64_t>(sizes[d]);
  for (int d = 0; d < 4; ++d) m.stride[d] = static_cast<uint64_t>(2 * strides[d]);
  m.box[1] = static_cast<uint32_t>(sizes[1]);
  m.box[2] = static_cast<uint32_t>(64 / sizes[1]);
  m.box[3] = m.box[4] = 1;
  return encode_tensor_map(m);
}

inline CUtensorMap map_of_weight(const ProjectionGroup& g, MapElement element, int box_rows) {
  TensorMapShape m;
  m.element = element;
  m.rank = 2;
  m.base = const_cast<void*>(g.weight);
  m.size[0] = static_cast<uint64_t>(g.depth);
  m.size[1] = static_cast<uint64_t>(g.columns);
  m.stride[0] = static_cast<uint64_t>(2 * g.depth);
  m.box[0] = 64;
  m.box[1] = static_cast<uint32_t>(box_rows);
  m.swizzle = ptx::Swizzle::k128;
  return encode_tensor_map(m);
}

// Whether this kernel takes the group: TMA wants aligned rows whose length is a multiple of 16 bytes, and of the view
// that boxes of 64 output tokens and 64 channels tile it.
inline bool fits_sm90(const ProjectionGroup& g) {
  if (g.rows == 0 || g.columns == 0) return true;
  if (g.depth == 0 || g.depth % 8 != 0 || !is_aligned16(g.weight)) return false;
  if (!g.shuffled) return is_aligned16(g.a) && g.a_stride % 8 == 0 && g.a_stride >= g.depth;
  const ShuffleShape& s = g.shape;
  const int64_t inner = s.transposed ? s.out_h() : s.out_w();
  return has_aligned_tokens(s, 2, g.a) && s.token_stride == s.channels && s.rate * s.channels % 64 == 0 &&
         64 % inner == 0 && s.out_tokens() % 64 == 0 && s.tiles < INT32_MAX;
}

inline bool fits_sm90(const ProjectionParams& p) { return fits_sm90(p.group[0]) && fits_sm90(p.group[1]); }

template <class T, int kN>
void launch_projection_sm90(const ProjectionParams& p, int multiprocessors, cudaStream_t stream) {
  using S = Sm90Projection<kN>;
  const unsigned tiles = checked_tiles<S::kRows, kN>(p);
  if (tiles == 0) return;
  const MapElement element = p.dtype == Dtype::kHalf ? MapElement::kHalf : MapElement::kBFloat16;
  ProjectionMaps maps{};
  for (int i = 0; i < 2; ++i) {
    const ProjectionGroup& g = p.group[i];
    if (tile_count<S::kRows, kN>(g) == 0) continue;
    maps.a[i] = map_of_a(g, element);
    maps.weight[i] = map_of_weight(g, element, kN);
  }
  if (has_indices(p.group[0]) || has_indices(p.group[1])) {
    const auto rows = static_cast<unsigned>(std::max(p.group[0].rows, p.group[1].rows));
    launch(projection_indices_kernel, dim3((rows + 255) / 256, 2), dim3(256), 0, stream, p);
  }
  launch(projection_sm90_kernel<T, kN>, dim3(std::min(tiles, static_cast<unsigned>(multiprocessors))),
         dim3(S::kThreads), S::kShared, stream, p, maps, tiles);
}

inline void launch_projection_sm90(const ProjectionParams& params, int multiprocessors, cudaStream_t stream) {
  if (!fits_sm90(params)) throw std::runtime_error("the sm_90a projection kernel does not take these groups");
  const ProjectionParams p = deepest_first(params);
  // Smaller tiles where the large ones would leave multiprocessors without any.
  const bool large = checked_tiles<Sm90Projection<256>::kRows, 256>(p) >= static_cast<unsigned>(multiprocessors);
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    large ? launch_projection_sm90<T, 256>(p, multiprocessors, stream)
          : launch_projection_sm90<T, 128>(p, multiprocessors, stream);
  });
}

}  // namespace vico
