// routing_plan: from probabilities to the tiles that are compressed, and from those to the packed layout.
#pragma once

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

struct ProbabilityParams {
  Dtype dtype = Dtype::kFloat;   // of `p`
  bool bounded = false;          // whether values outside [0, 1] are bad, or NaN alone
  int64_t tiles = 0;             // P
  const void* p = nullptr;       // [tiles], contiguous
  void* out = nullptr;           // [tiles], contiguous: the values in double for double, in float for all else
  int64_t* first_bad = nullptr;  // CPU: the first bad tile; left alone where there is none
};

// The quantile of a segment of n values lies between two of them: with rank = relative * (n - 1),
//   below = sorted[floor(rank)], above = sorted[ceil(rank)], weight = rank - floor(rank).
struct QuantileParams {
  Dtype dtype = Dtype::kFloat;  // of `p`; all below is in double for double, in float for all else. CPU: those two
  int64_t tiles = 0;            // P
  int64_t segments = 1;
  const int64_t* cu_tiles = nullptr;  // [segments + 1] offsets of the segments; null: one segment over all tiles
  double relative = 0;                // in [0, 1]
  double absolute = 0;
  const void* p = nullptr;            // [tiles], contiguous, no NaN
  void* below = nullptr;              // [segments], 0 where a segment is empty
  void* above = nullptr;              // [segments]
  void* weight = nullptr;             // [segments]
  const void* quantile = nullptr;     // [segments], interpolated
  unsigned char* compress = nullptr;  // [tiles], 0 or 1

  VICO_INLINE int64_t first_tile(int64_t segment) const { return cu_tiles ? cu_tiles[segment] : 0; }
  VICO_INLINE int64_t last_tile(int64_t segment) const { return cu_tiles ? cu_tiles[segment + 1] : tiles; }
};

// The `count` tiles of highest p, of equal ones those of lower index.
struct BudgetParams {
  Dtype dtype = Dtype::kFloat;        // of `p`. CPU: kFloat or kDouble
  int64_t tiles = 0;                  // P
  int64_t count = 0;                  // in [0, P]
  const void* p = nullptr;            // [tiles], contiguous, no NaN
  unsigned char* compress = nullptr;  // [tiles], 0 or 1
};

struct PlanTokensParams {
  int64_t tiles = 0;                        // P
  int64_t full_tokens = 0;                  // of a tile that stays whole
  int64_t compressed_tokens = 0;            // of a compressed tile
  const unsigned char* compress = nullptr;  // [tiles], 0 or 1
  int64_t* cu_tokens = nullptr;             // [tiles + 1]
  int64_t* order = nullptr;                 // [tiles]: whole tiles ascending, then compressed tiles ascending
};

// Tiles [begin, end). Serial: the caller gives the whole range, so that the first bad tile is the first of all.
VICO_CPU_KERNEL(widen_probabilities, const ProbabilityParams&, int64_t begin, int64_t end)
// Segments [begin, end): fills below, above and weight.
VICO_CPU_KERNEL(quantile_neighbors, const QuantileParams&, int64_t begin, int64_t end)
// Segments [begin, end): compress = p > quantile and p >= absolute.
VICO_CPU_KERNEL(route_segments, const QuantileParams&, int64_t begin, int64_t end)
// Over all tiles, serial.
VICO_CPU_KERNEL(budget_route, const BudgetParams&)
// A scan over all tiles, serial.
VICO_CPU_KERNEL(plan_tokens, const PlanTokensParams&)

void widen_probabilities_cuda(const ProbabilityParams& p, cudaStream_t stream);
void quantile_neighbors_cuda(const QuantileParams& p, cudaStream_t stream);
void route_segments_cuda(const QuantileParams& p, cudaStream_t stream);
void budget_route_cuda(const BudgetParams& p, cudaStream_t stream);
void plan_tokens_cuda(const PlanTokensParams& p, cudaStream_t stream);

}  // namespace vico
