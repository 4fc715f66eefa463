// What both projection kernels share: the numbering of tiles, and the epilogue, from mma fragments to rows of memory.
//
// The epilogue's code is small on purpose: unrolled over the registers that hold a tile's sums it is a quarter of a
// megabyte, run once per tile, and the multiprocessor waits for its instructions. So a warp puts 16 rows of 32 or 64
// columns at a time into shared memory, the only part that must name registers, and loops over what lies there.
#pragma once

#include <string>
#include <utility>

#include "common/dropout.cuh"
#include "projection/projection.h"

namespace vico {

constexpr unsigned kBandRows = 2048;  // of tiles that run together, see find_tile

struct ProjectionTile {
  int group;
  int row, column;  // of its first element
};

template <int kM, int kN>
VICO_INLINE int64_t tile_count(const ProjectionGroup& g) {
  return (g.rows + kM - 1) / kM * ((g.columns + kN - 1) / kN);
}

// Tile `index` of all: group 0's first; in bands of kBandRows rows; within a band down the rows, then along the
// columns.
template <int kM, int kN>
VICO_DEVICE ProjectionTile find_tile(const ProjectionParams& p, unsigned index) {
  const unsigned first = static_cast<unsigned>(tile_count<kM, kN>(p.group[0]));
  const int group = index < first ? 0 : 1;
  const ProjectionGroup& g = p.group[group];
  if (group == 1) index -= first;
  constexpr unsigned kBand = kBandRows / kM;
  const unsigned high = static_cast<unsigned>((g.rows + kM - 1) / kM);
  const unsigned wide = static_cast<unsigned>((g.columns + kN - 1) / kN);
  const unsigned top = index / (kBand * wide) * kBand, in_band = index % (kBand * wide);
  const unsigned band = high - top < kBand ? high - top : kBand;
  return {group, static_cast<int>((top + in_band % band) * kM), static_cast<int>(in_band / band * kN)};
}

// Bit i: whether dropout keeps element first + i.
VICO_DEVICE uint32_t kept_elements(const DropoutMask& mask, uint64_t first) {
  const uint64_t seed = mask.current_seed();
  uint32_t bits = 0;
#pragma unroll 1
  for (unsigned lane = 0; lane < kPhiloxLanes; ++lane) {
    uint32_t words[4] = {};
    uint64_t drawn = ~uint64_t{0};
#pragma unroll 1
    for (unsigned i = lane; i < 32; i += kPhiloxLanes) {  // they share one counter, or two
      const uint64_t e = first + i, counter = e / kPhiloxBlock * kPhiloxLanes + e % kPhiloxLanes;
      if (counter != drawn) draw_words(words, seed, counter);
      drawn = counter;
      const unsigned part = e % kPhiloxBlock / kPhiloxLanes;
      const uint32_t low = part & 1 ? words[1] : words[0], high = part & 1 ? words[3] : words[2];
      bits |= uint32_t{(part < 2 ? low : high) < mask.keep_below} << i;
    }
  }
  return bits;
}

// z Phi(z), with Phi by the tail on z's side: no cancellation for negative z. The tail is 2^P(|z|), P the polynomial of
// degree 7 that makes its greatest relative error least, 3.3e-6 up to |z| = 6.2; beyond, P falls on, below -31.
VICO_DEVICE float exact_gelu(float z) {
  constexpr float kP[] = {-0.9999952933f,  -1.151251075f,     -0.4584642824f,   -0.05396021907f,
                          0.008507984482f, -0.0009305540545f, 6.160271718e-05f, -1.835069788e-06f};
  const float t = fabsf(z);
  float p = kP[7];
#pragma unroll
  for (int i = 6; i >= 0; --i) p = p * t + kP[i];
  const float y = z * ptx::exp2_approximate(p);
  return z > 0 ? z - y : y;
}

// Row `row` of the output as its writers need it.
struct OutputRow {
  int64_t offset;  // of its first element in `out`; -1: it is not written
  float mean, rstd;
};

// Without kChecked, a row whose place does not exist is not written; with it, the kernel ends with a message.
template <bool kChecked>
VICO_DEVICE OutputRow output_row(const ProjectionGroup& g, int row) {
  if (row >= g.rows) return {-1, 0, 1};
  int64_t place = row;
  if (g.out_row) {
    const unsigned tile_rows = static_cast<unsigned>(g.tile_rows), t = static_cast<unsigned>(row) / tile_rows;
    const int64_t tile = g.out_tile ? g.out_tile[t] : t;
    const bool is_tile = tile >= 0 && tile < g.out_tiles;
    if constexpr (kChecked) {
      VICO_DEVICE_CHECK(is_tile, "tiles must lie in [0, %lld), got %lld", static_cast<long long>(g.out_tiles),
                        static_cast<long long>(tile));
    }
    place = is_tile ? g.out_row[tile] + static_cast<unsigned>(row) % tile_rows : -1;
    const bool is_place = place >= 0 && place < g.out_rows;
    if constexpr (kChecked) {
      VICO_DEVICE_CHECK(is_place, "rows must go to places in [0, %lld), row %d would go to %lld",
                        static_cast<long long>(g.out_rows), row, static_cast<long long>(place));
    }
    if (!is_place) return {-1, 0, 1};
  }
  return {place * g.out_stride, g.mean ? g.mean[row] : 0.0f, g.mean ? g.rstd[row] : 1.0f};
}

template <class T>
VICO_DEVICE uint32_t pack_pair(float low, float high) {
  return std::is_same_v<T, Half> ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
}

// Whether rows of the output can be written 16 bytes at a time.
VICO_INLINE bool has_wide_rows(const ProjectionGroup& g) {
  return reinterpret_cast<uintptr_t>(g.out) % 16 == 0 && g.out_stride % 8 == 0;
}

// What a lane's eight columns add. Those behind the last are not written, whatever is added.
struct ColumnTerms {
  float bias[8] = {}, gain_sum[8] = {};

  VICO_DEVICE ColumnTerms(const ProjectionGroup& g, int column) {
    if (g.bias) load(bias, g.bias, g, column);
    if (g.mean) load(gain_sum, g.gain_sum, g, column);
  }

 private:
  VICO_DEVICE static void load(float (&to)[8], const float* from, const ProjectionGroup& g, int column) {
    const int last = static_cast<int>(g.columns) - 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = from[column + i < last ? column + i : last];
  }
};

// A warp's part of shared memory for 16 rows of kColumns sums, aligned to 16 bytes. Chunks of four floats change places
// within their row so that neither the fragments' rows nor the lanes' halves of eight columns meet in a bank.
template <int kColumns>
struct StagedSums {
  static constexpr int kFloats = 16 * kColumns;
  static constexpr int kRowLanes = kColumns / 8, kRowsAtOnce = 32 / kRowLanes;

  VICO_DEVICE static int place(int row, int chunk) {
    return row * kColumns + 4 * (chunk ^ chunk >> 3 ^ 2 * (row & 3) ^ (row & 1));
  }

  // sum(j, i) is register i of the j-th mma fragment of 16 x 8, side by side.
  template <class Sum>
  VICO_DEVICE static void put(float* stage, const Sum& sum) {
    struct alignas(8) Pair {
      float low, high;
    };
    const int lane = static_cast<int>(threadIdx.x % 32), quad = lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to = stage + place(lane / 4 + 8 * h, 2 * j + quad / 2) + quad % 2 * 2;
        *reinterpret_cast<Pair*>(to) = {sum(j, 2 * h), sum(j, 2 * h + 1)};
      }
    }
  }

  // Finishes and writes them: the rows from `row` on, the columns from `column` on. Lane l brings output row
  // row + l % 16; `terms_of(c)` gives it the terms of its columns, those from c on, when registers are there for them.
  template <class T, class TermsOf>
  VICO_DEVICE static void write(const ProjectionGroup& g, int row, int column, const float* stage,
                                const OutputRow& lane_row, const TermsOf& terms_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), eight = lane % kRowLanes, c = column + 8 * eight;
    constexpr int kParts = kColumns / 32;  // of a row; lane l draws for part l % kParts of row l / kParts
    uint32_t drawn = 0;
    if (g.mask.active) {
      const int64_t first = (row + lane / kParts % 16) * g.columns + column + 32 * (lane % kParts);
      drawn = kept_elements(g.mask, static_cast<uint64_t>(first));
    }
    const ColumnTerms terms = terms_of(c);
    const bool wide = c + 8 <= g.columns && has_wide_rows(g);
    const float scale = static_cast<float>(g.mask.scale);
#pragma unroll 1
    for (int i = 0; i < 16; i += kRowsAtOnce) {
      const int r = i + lane / kRowLanes;
      const int64_t offset = __shfl_sync(~0u, lane_row.offset, r);
      float y[8];
      load_values(reinterpret_cast<float(&)[4]>(y[0]), stage + place(r, 2 * eight));
      load_values(reinterpret_cast<float(&)[4]>(y[4]), stage + place(r, 2 * eight + 1));
      if (g.mean) {
        const float mean = __shfl_sync(~0u, lane_row.mean, r), rstd = __shfl_sync(~0u, lane_row.rstd, r);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = rstd * (y[j] - mean * terms.gain_sum[j]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] += terms.bias[j];
      if (g.gelu) {
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = exact_gelu(y[j]);
      }
      if (g.mask.active) {
        const uint32_t kept = __shfl_sync(~0u, drawn, r * kParts + eight / 4) >> 8 * (eight % 4);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] *= kept >> j & 1 ? scale : 0.0f;
      }
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = pack_pair<T>(y[2 * j], y[2 * j + 1]);
      T* out = static_cast<T*>(g.out) + offset + c;
      if (offset >= 0 && wide) {
        ptx::store16(out, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      } else if (offset >= 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (c + j < g.columns) out[j].bits = static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
        }
      }
    }
  }
};

// ---- for launches

// The groups in the order that their tiles are numbered in: those that take longest first.
inline ProjectionParams deepest_first(ProjectionParams p) {
  if (p.group[1].depth > p.group[0].depth) std::swap(p.group[0], p.group[1]);
  return p;
}

template <int kM, int kN>
unsigned checked_tiles(const ProjectionParams& p) {
  constexpr int64_t kMax = INT32_MAX - 512;  // room for a tile beyond
  for (const ProjectionGroup& g : p.group) {
    if (g.rows > kMax || g.columns > kMax || g.depth > kMax) {
      throw std::runtime_error("a projection of " + std::to_string(g.rows) + " rows, " + std::to_string(g.columns) +
                               " columns and depth " + std::to_string(g.depth) +
                               ": CUDA kernels take up to 2^31 - 513");
    }
  }
  const int64_t tiles = tile_count<kM, kN>(p.group[0]) + tile_count<kM, kN>(p.group[1]);
  if (tiles > INT32_MAX) {
    throw std::runtime_error("a projection of " + std::to_string(tiles) + " tiles: CUDA kernels take up to 2^31 - 1");
  }
  return static_cast<unsigned>(tiles);
}

// Calls fn with the element type; there are kernels for the 16-bit types alone.
template <class Fn>
void dispatch_16bit(Dtype dtype, const Fn& fn) {
  if (dtype == Dtype::kBFloat16) return fn(BFloat16{});
  if (dtype == Dtype::kHalf) return fn(Half{});
  throw std::runtime_error("the projection kernels are for bfloat16 and float16");
}

}  // namespace vico
