// What both projection kernels share: the numbering of tiles, and the epilogue, from mma fragments to rows of memory.
#pragma once

#include <string>
#include <utility>

#include "common/dropout.cuh"
#include "common/normal.h"
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

// z Phi(z), with Phi by the tail on z's side: no cancellation for negative z.
VICO_DEVICE float exact_gelu(float z) {
  const float u = __fdividef(1.0f, 0.35355339059f * (z < 0 ? -z : z) + 1.0f);
  const float tail = __expf(-0.5f * z * z) * (u * normal_tail_quotient(u));
  return z * (z > 0 ? 1.0f - tail : tail);
}

// A row of the output as the thread that writes parts of it needs it.
struct OutputRow {
  bool valid;
  int64_t offset;  // of its first element in `out`
  float mean, rstd;

  VICO_DEVICE OutputRow(const ProjectionGroup& g, int row) : valid(row < g.rows), offset(0), mean(0), rstd(1) {
    if (!valid) return;
    int64_t place = row;
    if (g.out_row) {
      const unsigned tile_rows = static_cast<unsigned>(g.tile_rows), t = static_cast<unsigned>(row) / tile_rows;
      const int64_t tile = g.out_tile ? g.out_tile[t] : t;
      VICO_DEVICE_CHECK(tile >= 0 && tile < g.out_tiles, "tiles must lie in [0, %lld), got %lld",
                        static_cast<long long>(g.out_tiles), static_cast<long long>(tile));
      place = g.out_row[tile] + static_cast<unsigned>(row) % tile_rows;
      VICO_DEVICE_CHECK(place >= 0 && place < g.out_rows,
                        "rows must go to places in [0, %lld), row %d would go to %lld",
                        static_cast<long long>(g.out_rows), row, static_cast<long long>(place));
    }
    offset = place * g.out_stride;
    if (g.mean) {
      mean = g.mean[row];
      rstd = g.rstd[row];
    }
  }
};

template <class T>
VICO_DEVICE uint32_t pack_pair(float low, float high) {
  return std::is_same_v<T, Half> ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
}

// Whether rows of the output can be written 16 bytes at a time.
VICO_INLINE bool has_wide_rows(const ProjectionGroup& g) {
  return reinterpret_cast<uintptr_t>(g.out) % 16 == 0 && g.out_stride % 8 == 0;
}

// Finishes and writes 16 rows by 32 columns, from (row, column) on, of the four mma fragments that a warp holds side by
// side: sum(j, i) is register i of the j-th 16 x 8. output_row(h) is this lane's row, row + lane / 4 + 8 h.
template <class T, class Row, class Sum>
VICO_DEVICE void write_fragments(const ProjectionGroup& g, int row, int column, const Row& output_row, const Sum& sum) {
  const int lane = static_cast<int>(threadIdx.x % 32), quad = lane % 4;
  float bias[8], gain_sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int c = column + i / 2 * 8 + 2 * quad + i % 2;
    bias[i] = g.bias && c < g.columns ? g.bias[c] : 0.0f;
    gain_sum[i] = g.mean && c < g.columns ? g.gain_sum[c] : 0.0f;
  }
  // Lane l draws for row l % 16.
  const uint32_t drawn =
      g.mask.active ? kept_elements(g.mask, static_cast<uint64_t>((row + lane % 16) * g.columns + column)) : 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const OutputRow m = output_row(h);
    const uint32_t kept = __shfl_sync(~0u, drawn, lane / 4 + 8 * h);
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = m.rstd * (sum(j, 2 * h + i) - m.mean * gain_sum[2 * j + i]) + bias[2 * j + i];
        y[i] = g.gelu ? exact_gelu(z) : z;
        if (g.mask.active) y[i] *= kept >> (8 * j + 2 * quad + i) & 1 ? static_cast<float>(g.mask.scale) : 0.0f;
      }
      pairs[j] = pack_pair<T>(y[0], y[1]);
    }
    exchange_words(pairs);  // now this lane has the quad's columns of fragment number `quad`
    const int c = column + 8 * quad;
    T* out = static_cast<T*>(g.out) + m.offset + c;
    if (m.valid && c + 8 <= g.columns && has_wide_rows(g)) {
      ptx::store16(out, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    } else if (m.valid) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (c + i < g.columns) out[i].bits = static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2));
      }
    }
  }
}

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
