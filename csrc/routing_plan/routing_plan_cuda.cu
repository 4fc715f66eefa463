// CUDA kernels of routing_plan. A few numbers per tile: what they cost is their launches, so each decision is one block
// per segment or one for all, in loops that are right for any number of tiles.
#include "common/block_scan.cuh"
#include "common/copy_row.cuh"
#include "routing_plan/routing_plan.h"
#include "routing_plan/sort_key.h"

namespace vico {
namespace {

constexpr int kSelectThreads = 256;
constexpr int kDigits = 256;

using Long = long long;  // for formats

template <class T>
VICO_DEVICE void check_number(T x, int64_t tile) {
  VICO_DEVICE_CHECK(x == x,
                    "p must hold probabilities, got NaN for tile %lld: look for NaN or infinity in the ViT's tokens or "
                    "the router's weights",
                    static_cast<Long>(tile));
}

// out[t] = p[t] in the sum type; one thread per tile.
template <class T>
__global__ void __launch_bounds__(kSelectThreads)
    widen_probabilities_kernel(const __grid_constant__ ProbabilityParams p) {
  using A = accumulate_t<T>;
  const int64_t t = int64_t{blockIdx.x} * kSelectThreads + threadIdx.x;
  if (t >= p.tiles) return;
  const A x = value_of(static_cast<const T*>(p.p)[t]);
  static_cast<A*>(p.out)[t] = x;
  check_number(x, t);
  VICO_DEVICE_CHECK(
      !p.bounded || (x >= 0 && x <= 1),
      "p must hold probabilities in [0, 1], got %g for tile %lld: pass the router's softmax, not its logits",
      static_cast<double>(x), static_cast<Long>(t));
}

struct SelectScratch {
  unsigned count[kDigits];  // of the undecided elements, by their next digit
  unsigned digit, rank;
};

// The rank-th smallest of the keys key_of(i), i in [0, n), by all threads of the block: eight bits of it are decided in
// each pass. `equal_after` is how many equal keys come after it in the order.
template <class Key, class KeyOf>
VICO_DEVICE Key select_key(int64_t n, unsigned rank, const KeyOf& key_of, SelectScratch& s, unsigned& equal_after) {
  Key prefix = 0, decided = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (unsigned d = threadIdx.x; d < kDigits; d += blockDim.x) s.count[d] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Key key = key_of(i);
      if ((key & decided) == prefix) atomicAdd(&s.count[static_cast<unsigned>(key >> shift) & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l looks at digits 8 l to 8 l + 7
      constexpr unsigned kEach = kDigits / 32;
      unsigned digit = threadIdx.x * kEach, sum = 0;
      for (unsigned d = 0; d < kEach; ++d) sum += s.count[digit + d];
      unsigned before = sum;
      for (int delta = 1; delta < 32; delta *= 2) {
        const unsigned lower = __shfl_up_sync(~0u, before, delta);
        if (static_cast<int>(threadIdx.x) >= delta) before += lower;
      }
      before -= sum;
      if (rank >= before && rank - before < sum) {
        for (; rank - before >= s.count[digit]; ++digit) before += s.count[digit];
        s.digit = digit;
        s.rank = rank - before;
      }
    }
    __syncthreads();
    rank = s.rank;
    prefix |= static_cast<Key>(s.digit) << shift;
    decided |= static_cast<Key>(kDigits - 1) << shift;
  }
  equal_after = s.count[s.digit] - 1 - rank;
  return prefix;
}

VICO_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
VICO_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// below, above and weight of segment blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) quantile_neighbors_kernel(const __grid_constant__ QuantileParams p) {
  using A = accumulate_t<T>;
  using Key = decltype(sort_key(A{}));
  VICO_SHARED(SelectScratch, digits);
  VICO_SHARED(Key, keys, [kMaxWarps]);
  const int64_t segment = blockIdx.x, first = p.first_tile(segment), last = p.last_tile(segment);
  const int64_t n = min(last, p.tiles) - first;
  if (p.cu_tiles) {
    VICO_DEVICE_CHECK(p.cu_tiles[0] == 0 && p.cu_tiles[p.segments] == p.tiles,
                      "cu_tiles must begin with 0 and end with the number of tiles (%lld), got %lld and %lld",
                      static_cast<Long>(p.tiles), static_cast<Long>(p.cu_tiles[0]),
                      static_cast<Long>(p.cu_tiles[p.segments]));
    // The first and the last offset are right: any other that is not leads to one that is less.
    VICO_DEVICE_CHECK(0 <= first && first <= last, "cu_tiles must not decrease, got %lld then %lld at position %lld",
                      static_cast<Long>(first), static_cast<Long>(last), static_cast<Long>(segment));
  }
  A below = 0, above = 0, weight = 0;
  if (n > 0) {
    const T* x = static_cast<const T*>(p.p) + first;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) check_number(value_of(x[i]), first + i);
    // NOTE: rounded as torch.quantile's product is, and not fused into the subtraction.
    const A rank = rounded_product(static_cast<A>(p.relative), static_cast<A>(n - 1));
    const int64_t floor_rank = min(static_cast<int64_t>(rank), n - 1);
    weight = rank - static_cast<A>(floor_rank);
    const auto key_of = [&](int64_t i) { return sort_key(value_of(x[i])); };
    unsigned equal_after;
    const Key value = select_key<Key>(n, static_cast<unsigned>(floor_rank), key_of, digits, equal_after);
    below = above = from_sort_key(value);
    if (weight > 0 && equal_after == 0) {
      Key next = ~Key{0};
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const Key key = key_of(i);
        if (key > value && key < next) next = key;
      }
      Key least;
      block_scan(next, ~Key{0}, [](Key a, Key b) { return a < b ? a : b; }, keys, least);
      above = from_sort_key(least);
    }
  }
  if (threadIdx.x == 0) {
    static_cast<A*>(p.below)[segment] = below;
    static_cast<A*>(p.above)[segment] = above;
    static_cast<A*>(p.weight)[segment] = weight;
  }
}

// compress = p > quantile and p >= absolute, for the tiles of segment blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) route_segments_kernel(const __grid_constant__ QuantileParams p) {
  using A = accumulate_t<T>;
  const A quantile = static_cast<const A*>(p.quantile)[blockIdx.x], absolute = static_cast<A>(p.absolute);
  const int64_t last = p.last_tile(blockIdx.x);
  for (int64_t t = p.first_tile(blockIdx.x) + threadIdx.x; t < last; t += blockDim.x) {
    const A x = value_of(static_cast<const T*>(p.p)[t]);
    p.compress[t] = (x > quantile) & (x >= absolute);
  }
}

// One block: all tiles above the last value that is taken, then the first ones equal to it.
template <class T>
__global__ void __launch_bounds__(kScanThreads) budget_route_kernel(const __grid_constant__ BudgetParams p) {
  using A = accumulate_t<T>;
  using Key = decltype(sort_key(A{}));
  VICO_SHARED(SelectScratch, digits);
  VICO_SHARED(int64_t, sums, [kMaxWarps]);
  const T* x = static_cast<const T*>(p.p);
  for (int64_t t = threadIdx.x; t < p.tiles; t += blockDim.x) check_number(value_of(x[t]), t);
  if (p.count == 0) {
    for (int64_t t = threadIdx.x; t < p.tiles; t += blockDim.x) p.compress[t] = 0;
    return;
  }
  unsigned equal_after;
  const A least = from_sort_key(select_key<Key>(
      p.tiles, static_cast<unsigned>(p.tiles - p.count), [&](int64_t t) { return sort_key(value_of(x[t])); }, digits,
      equal_after));
  // By value, not by key: zeros of both signs are equal.
  const int64_t equal = p.count - block_sum_over(p.tiles, sums, [&](int64_t t) { return value_of(x[t]) > least; });
  int64_t taken = 0;
  for (int64_t base = 0; base < p.tiles; base += kScanChunk) {
    const int64_t first = base + threadIdx.x * kScanItems;
    int64_t own = 0, all;
    for (int64_t t = first; t < first + kScanItems && t < p.tiles; ++t) own += value_of(x[t]) == least;
    int64_t before = taken + block_prefix_sum(own, sums, all);
    for (int64_t t = first; t < first + kScanItems && t < p.tiles; ++t) {
      const A v = value_of(x[t]);
      p.compress[t] = v > least || (v == least && before++ < equal);
    }
    taken += all;
  }
}

// One block: cu_tokens and order by a prefix sum over `compress`.
__global__ void __launch_bounds__(kScanThreads) plan_tokens_kernel(const __grid_constant__ PlanTokensParams p) {
  VICO_SHARED(int64_t, sums, [kMaxWarps]);
  const int64_t saved = p.full_tokens - p.compressed_tokens;
  const int64_t full = p.tiles - block_sum_over(p.tiles, sums, [&](int64_t t) { return p.compress[t]; });
  int64_t compressed = 0;
  for (int64_t base = 0; base < p.tiles; base += kScanChunk) {
    const int64_t first = base + threadIdx.x * kScanItems;
    int64_t own = 0, all;
    for (int64_t t = first; t < first + kScanItems && t < p.tiles; ++t) own += p.compress[t];
    int64_t before = compressed + block_prefix_sum(own, sums, all);
    for (int64_t t = first; t < first + kScanItems && t < p.tiles; ++t) {
      p.cu_tokens[t] = t * p.full_tokens - before * saved;
      if (p.compress[t]) {
        p.order[full + before++] = t;
      } else {
        p.order[t - before] = t;
      }
    }
    compressed += all;
  }
  if (threadIdx.x == 0) p.cu_tokens[p.tiles] = p.tiles * p.full_tokens - compressed * saved;
}

}  // namespace

void widen_probabilities_cuda(const ProbabilityParams& p, cudaStream_t stream) {
  if (p.tiles == 0) return;
  dispatch(p.dtype, [&](auto element) {
    launch(widen_probabilities_kernel<decltype(element)>,
           dim3(row_blocks((p.tiles + kSelectThreads - 1) / kSelectThreads)), dim3(kSelectThreads), 0, stream, p);
  });
}

void quantile_neighbors_cuda(const QuantileParams& p, cudaStream_t stream) {
  if (p.tiles == 0 || p.segments == 0) return;
  row_blocks(p.tiles);  // ranks have 32 bits
  dispatch(p.dtype, [&](auto element) {
    launch(quantile_neighbors_kernel<decltype(element)>, dim3(row_blocks(p.segments)), dim3(kSelectThreads), 0, stream,
           p);
  });
}

void route_segments_cuda(const QuantileParams& p, cudaStream_t stream) {
  if (p.tiles == 0 || p.segments == 0) return;
  dispatch(p.dtype, [&](auto element) {
    launch(route_segments_kernel<decltype(element)>, dim3(row_blocks(p.segments)), dim3(kSelectThreads), 0, stream, p);
  });
}

void budget_route_cuda(const BudgetParams& p, cudaStream_t stream) {
  if (p.tiles == 0) return;
  row_blocks(p.tiles);  // ranks have 32 bits
  dispatch(p.dtype, [&](auto element) {
    launch(budget_route_kernel<decltype(element)>, dim3(1), dim3(kScanThreads), 0, stream, p);
  });
}

void plan_tokens_cuda(const PlanTokensParams& p, cudaStream_t stream) {
  launch(plan_tokens_kernel, dim3(1), dim3(kScanThreads), 0, stream, p);
}

}  // namespace vico
