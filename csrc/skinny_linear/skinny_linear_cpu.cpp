// CPU kernels of skinny_linear: the weight streams once past x, which stays in the cache.
#include "common/multiply.h"
#include "common/panel.h"
#include "skinny_linear/skinny_linear.h"

namespace vico::VICO_CPU_ARCH {
namespace {

constexpr int kFeatures = 4;  // weight rows per step
constexpr int kRows = 3;      // rows of x per step: 12 sums and what they are made of fit 16 registers
// Elements of a weight row per step: kFeatures such pieces stay in the L1 cache while all rows of x pass by.
constexpr int64_t kDepth = 512;

// totals[r * kFeatures + f] += the vector of partial sums of x[r, :] . weight[f, :] over n elements. Meanwhile n
// elements of `ahead_rows` rows from `ahead` on, `ahead_stride` apart, are fetched into the L2 cache. NOTE: each total
// has one order of summation, whatever kF and kR: how features and rows are grouped does not change a bit of the
// result. Sums of sums round less than one long sum.
template <int kF, int kR, class W, class T, class A, class V>
VICO_INLINE void dot_tile(const W* weight, int64_t weight_stride, const A* x, int64_t x_stride, int64_t n,
                          int64_t ahead_rows, const T* ahead, int64_t ahead_stride, V* totals) {
  constexpr int64_t kLine = 64 / sizeof(T);
  V sums[kF][kR] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    V right[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) right[r] = load(x + r * x_stride + k);
#pragma GCC unroll 4
    for (int f = 0; f < kF; ++f) {
      const V left = load(weight + f * weight_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[f][r] += left * right[r];
    }
  };
  int64_t k = 0;
  for (; k + kLine <= n; k += kLine) {
#pragma GCC unroll 1
    for (int64_t f = 0; f < ahead_rows; ++f) __builtin_prefetch(ahead + f * ahead_stride + k, 0, 2);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLine; i += kLanes<V>) step(k + i);
  }
  for (; k + kLanes<V> <= n; k += kLanes<V>) step(k);
#pragma GCC unroll 4
  for (int f = 0; f < kF; ++f) {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      V sum = sums[f][r];
      if (k < n) sum += load_partial(weight + f * weight_stride + k, n - k) * load_partial(x + r * x_stride + k, n - k);
      totals[r * kFeatures + f] += sum;
    }
  }
}

// The kF weight rows from `weight` on, n elements of each, against all rows of x. Meanwhile the same piece of the kF
// rows after them, from `next` on, is fetched: the hardware's own prefetch starts anew on every row.
template <int kF, class T, class W, class V>
VICO_INLINE void dot_piece(const SkinnyLinearParams& p, const T* next, const W* weight, int64_t weight_stride,
                           const accumulate_t<T>* x, int64_t n, V* totals) {
  const int64_t x_stride = p.groups * p.depth, tiles = (p.rows + kRows - 1) / kRows;
  const auto tile = [&](int64_t row, int64_t ahead_rows, const T* ahead) __attribute__((always_inline)) {
    const auto run = [&](auto rows) __attribute__((always_inline)) {
      dot_tile<kF, decltype(rows)::value>(weight, weight_stride, x + row * x_stride, x_stride, n, ahead_rows, ahead,
                                          p.feature_stride, totals + row * kFeatures);
    };
    switch (p.rows - row) {
      case 1:
        return run(std::integral_constant<int, 1>());
      case 2:
        return run(std::integral_constant<int, 2>());
      default:
        return run(std::integral_constant<int, kRows>());
    }
  };
  // The first tiles share the rows to fetch, so that memory is read at an even pace.
  const int64_t fetched = kF == kFeatures ? kF : 0, share = tiles == 1 ? 4 : tiles < 4 ? 2 : 1;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t left = fetched - i * share;
    tile(i * kRows, left > 0 ? min_of(left, share) : 0, left > 0 ? next + i * share * p.feature_stride : next);
  }
}

// y[:, group, feature .. feature + kF) from weight rows whose elements are next to each other.
// totals: [rows, kFeatures]; panel: [kFeatures, kDepth], for a weight that has to be converted.
template <int kF, class T>
void dot_features(const SkinnyLinearParams& p, int64_t group, int64_t feature, vec_t<T>* totals,
                  accumulate_t<T>* panel) {
  using A = accumulate_t<T>;
  const T* weight = static_cast<const T*>(p.weight) + group * p.group_stride + feature * p.feature_stride;
  const A* x = static_cast<const A*>(p.x) + group * p.depth;
  for (int64_t i = 0; i < p.rows * kFeatures; ++i) totals[i] = vec_t<T>{};
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t n = min_of(kDepth, p.depth - k);
    const T* next = weight + kF * p.feature_stride + k;
    if (std::is_same_v<T, A> || p.rows <= kRows) {
      dot_piece<kF>(p, next, weight + k, p.feature_stride, x + k, n, totals);
    } else {
      copy_rows(weight + k, p.feature_stride, kF, n, panel, kDepth);
      dot_piece<kF>(p, next, panel, kDepth, x + k, n, totals);
    }
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int f = 0; f < kF; ++f) {
      const int64_t at = group * p.features + feature + f;
      const A bias = p.bias ? to_accumulate(static_cast<const T*>(p.bias)[at]) : A{};
      static_cast<T*>(p.y)[row * p.groups * p.features + at] =
          from_accumulate<T>(sum(totals[row * kFeatures + f]) + bias);
    }
  }
}

// Room for a piece of a weight whose features are next to each other, and for the sums of its features.
template <class A>
struct Columns {
  static constexpr int64_t kBlock = SkinnyLinearParams::kMostBlock;
  static constexpr int64_t kDepth = 64;  // with kBlock columns, about half of the L1 cache
  const int64_t stride = panel_stride<A>(kBlock);
  Scratch<A> panel;  // [kDepth, stride]
  Scratch<A> sums;   // [rows, kBlock]
  Scratch<A> ones;   // [kBlock]

  explicit Columns(int64_t rows) : panel(kDepth * stride), sums(rows * kBlock), ones(kBlock) {
    for (int64_t f = 0; f < kBlock; ++f) ones[f] = 1;
  }
};

// y[:, group, feature .. feature + count) from weight columns that are next to each other.
template <class T>
void multiply_features(const SkinnyLinearParams& p, int64_t group, int64_t feature, int64_t count,
                       const Columns<accumulate_t<T>>& room) {
  using A = accumulate_t<T>;
  using Room = Columns<A>;
  const T* weight = static_cast<const T*>(p.weight) + group * p.group_stride + feature;
  const A* x = static_cast<const A*>(p.x) + group * p.depth;
  for (int64_t k = 0; k < p.depth; k += Room::kDepth) {
    const int64_t n = min_of(Room::kDepth, p.depth - k);
    copy_rows(weight + k * p.depth_stride, p.depth_stride, n, count, room.panel.get(), room.stride);
    multiply<vec_t<T>, A>({n, x + k, p.groups * p.depth, 1, room.panel.get(), room.stride, room.sums.get(),
                           Room::kBlock, k ? room.ones.get() : nullptr},
                          p.rows, round_up(count, kWidth<T>));
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t at = group * p.features + feature;
    T* y = static_cast<T*>(p.y) + row * p.groups * p.features + at;
    for (int64_t f = 0; f < count; f += kWidth<T>) {
      vec_t<T> value = load(room.sums.get() + row * Room::kBlock + f);
      if (p.bias) value += load_n(static_cast<const T*>(p.bias) + at + f, count - f);
      store_n(y + f, value, count - f);
    }
  }
}

template <class T>
void dot_blocks(const SkinnyLinearParams& p, int64_t begin, int64_t end) {
  Scratch<vec_t<T>> totals(p.rows * kFeatures);
  Scratch<accumulate_t<T>> panel(kFeatures * kDepth);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / p.blocks();
    int64_t feature = item % p.blocks() * p.block();
    const int64_t last = min_of(feature + p.block(), p.features);
    for (; feature + kFeatures <= last; feature += kFeatures) {
      dot_features<kFeatures, T>(p, group, feature, totals.get(), panel.get());
    }
    for (; feature < last; ++feature) dot_features<1, T>(p, group, feature, totals.get(), panel.get());
  }
}

template <class T>
void multiply_blocks(const SkinnyLinearParams& p, int64_t begin, int64_t end) {
  const Columns<accumulate_t<T>> room(p.rows);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t feature = item % p.blocks() * p.block();
    multiply_features<T>(p, item / p.blocks(), feature, min_of(p.block(), p.features - feature), room);
  }
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.depth_stride == 1) {
      dot_blocks<T>(p, begin, end);
    } else {
      multiply_blocks<T>(p, begin, end);
    }
  });
}

}  // namespace vico::VICO_CPU_ARCH
