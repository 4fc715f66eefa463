// CPU kernels of routing_plan. Order statistics without a sort: linear in the tiles whatever their values.
#include "common/vec.h"
#include "routing_plan/routing_plan.h"
#include "routing_plan/sort_key.h"

namespace vico::VICO_CPU_ARCH {
namespace {

VICO_INLINE double widened(double x) { return x; }
template <class T>
VICO_INLINE float widened(T x) {
  return to_float(x);
}

// Of few elements: each one's place in the order is counted.
template <class T>
void select_two_of_few(const T* p, int64_t n, int64_t rank, T* value, T* next) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t place = 0;
    for (int64_t j = 0; j < n; ++j) place += (p[j] < p[i]) | ((p[j] == p[i]) & (j < i));
    if (place == rank) *value = p[i];
    if (place == (rank + 1 < n ? rank + 1 : rank)) *next = p[i];
  }
}

// Of many: eight bits of the key are decided in each pass over p.
template <class T>
void select_two(const T* p, int64_t n, int64_t rank, T* value, T* next) {
  using Key = decltype(sort_key(T{}));
  Key prefix = 0, decided = 0;
  int64_t count[256];
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    std::memset(count, 0, sizeof(count));
    for (int64_t i = 0; i < n; ++i) {
      const Key key = sort_key(p[i]);
      if ((key & decided) == prefix) ++count[(key >> shift) & 255];
    }
    int digit = 0;
    for (; rank >= count[digit]; ++digit) rank -= count[digit];
    prefix |= static_cast<Key>(digit) << shift;
    decided |= static_cast<Key>(255) << shift;
    if (shift == 0) rank = count[digit] - 1 - rank;  // how many of the elements equal to the value come after it
  }
  *value = *next = from_sort_key(prefix);
  if (rank > 0) return;
  Key least = ~Key{0};
  for (int64_t i = 0; i < n; ++i) {
    const Key key = sort_key(p[i]);
    if (key > prefix && key <= least) {
      least = key;
      *next = p[i];
    }
  }
}

// sorted(p)[rank] and sorted(p)[min(rank + 1, n - 1)].
template <class T>
void select_neighbors(const T* p, int64_t n, int64_t rank, T* value, T* next) {
  constexpr int64_t kFew = 32;
  n <= kFew ? select_two_of_few(p, n, rank, value, next) : select_two(p, n, rank, value, next);
}

template <class T>
void segment_neighbors(const QuantileParams& p, int64_t segment) {
  const int64_t first = p.first_tile(segment), n = p.last_tile(segment) - first;
  T below = 0, above = 0, weight = 0;
  if (n > 0) {
    // NOTE: volatile, so that the product is rounded as torch.quantile's is, and not fused into the subtraction.
    volatile T product = static_cast<T>(p.relative) * static_cast<T>(n - 1);
    const T rank = product;
    int64_t floor_rank = static_cast<int64_t>(rank);
    if (floor_rank > n - 1) floor_rank = n - 1;
    weight = rank - static_cast<T>(floor_rank);
    select_neighbors(static_cast<const T*>(p.p) + first, n, floor_rank, &below, &above);
    if (!(weight > 0)) above = below;
  }
  static_cast<T*>(p.below)[segment] = below;
  static_cast<T*>(p.above)[segment] = above;
  static_cast<T*>(p.weight)[segment] = weight;
}

template <class T>
void route_segment(const QuantileParams& p, int64_t segment) {
  const T quantile = static_cast<const T*>(p.quantile)[segment], absolute = static_cast<T>(p.absolute);
  const T* x = static_cast<const T*>(p.p);
  for (int64_t t = p.first_tile(segment); t < p.last_tile(segment); ++t) {
    p.compress[t] = (x[t] > quantile) & (x[t] >= absolute);
  }
}

// All tiles above the last value that is taken, then the first ones equal to it.
template <class T>
void take_highest(const BudgetParams& p) {
  const T* x = static_cast<const T*>(p.p);
  T least = 0, next = 0;
  if (p.count > 0) select_neighbors(x, p.tiles, p.tiles - p.count, &least, &next);
  int64_t equal = p.count;  // how many of these are taken
  for (int64_t t = 0; t < p.tiles; ++t) equal -= x[t] > least;
  for (int64_t t = 0; t < p.tiles; ++t) {
    p.compress[t] = p.count > 0 && (x[t] > least || (x[t] == least && equal-- > 0));
  }
}

}  // namespace

void widen_probabilities(const ProbabilityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    accumulate_t<T>* out = static_cast<accumulate_t<T>*>(p.out);
    bool all_good = true;
    for (int64_t t = begin; t < end; ++t) {
      const accumulate_t<T> x = widened(static_cast<const T*>(p.p)[t]);
      out[t] = x;
      all_good &= p.bounded ? (x >= 0) & (x <= 1) : x == x;
    }
    if (all_good) return;
    int64_t t = begin;
    while (p.bounded ? out[t] >= 0 && out[t] <= 1 : out[t] == out[t]) ++t;
    *p.first_bad = t;
  });
}

void quantile_neighbors(const QuantileParams& p, int64_t begin, int64_t end) {
  for (int64_t segment = begin; segment < end; ++segment) {
    p.dtype == Dtype::kDouble ? segment_neighbors<double>(p, segment) : segment_neighbors<float>(p, segment);
  }
}

void route_segments(const QuantileParams& p, int64_t begin, int64_t end) {
  for (int64_t segment = begin; segment < end; ++segment) {
    p.dtype == Dtype::kDouble ? route_segment<double>(p, segment) : route_segment<float>(p, segment);
  }
}

void budget_route(const BudgetParams& p) {
  p.dtype == Dtype::kDouble ? take_highest<double>(p) : take_highest<float>(p);
}

void plan_tokens(const PlanTokensParams& p) {
  int64_t full = 0;
  for (int64_t t = 0; t < p.tiles; ++t) full += !p.compress[t];
  int64_t place[2] = {0, full}, tokens = 0;
  for (int64_t t = 0; t < p.tiles; ++t) {
    const bool compressed = p.compress[t];
    p.cu_tokens[t] = tokens;
    tokens += compressed ? p.compressed_tokens : p.full_tokens;
    p.order[place[compressed]++] = t;
  }
  p.cu_tokens[p.tiles] = tokens;
}

}  // namespace vico::VICO_CPU_ARCH
