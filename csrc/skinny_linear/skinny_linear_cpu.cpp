// CPU kernels of skinny_linear: the weight streams once past x, which stays in the cache.
#include "common/dot.h"
#include "common/multiply.h"
#include "common/panel.h"
#include "skinny_linear/skinny_linear.h"

namespace vico::VICO_CPU_ARCH {
namespace {

// Elements of a weight row per step: kDotLeft such pieces stay in the L1 cache while all rows of x pass by.
constexpr int64_t kDepth = kVecBytes == 64 ? 1024 : 512;
// The processors with 64-byte vectors are quicker without being told what comes next.
constexpr bool kFetch = kVecBytes < 64;

// The kF weight rows from `weight` on, n elements of each, against all rows of x. Meanwhile the same piece of the kF
// rows after them, from `next` on, is fetched: the hardware's own prefetch starts anew on every row.
template <int kF, class T, class W, class V>
VICO_INLINE void dot_piece(const SkinnyLinearParams& p, const T* next, const W* weight, int64_t weight_stride,
                           const accumulate_t<T>* x, int64_t n, V* totals, int64_t total_stride) {
  const int64_t x_stride = p.groups * p.depth, tiles = (p.rows + kDotRight - 1) / kDotRight;
  const auto tile = [&](int64_t row, int64_t ahead_rows, const T* ahead) __attribute__((always_inline)) {
    const auto run = [&](auto rows) __attribute__((always_inline)) {
      dot_tile<kF, decltype(rows)::value, kFetch>(weight, weight_stride, x + row * x_stride, x_stride, n, ahead_rows,
                                                  ahead, p.feature_stride, totals + row * total_stride, total_stride);
    };
    switch (p.rows - row) {
      case 1:
        return run(std::integral_constant<int, 1>());
      case 2:
        return run(std::integral_constant<int, 2>());
      case 3:
        return run(std::integral_constant<int, 3>());
      default:
        return run(std::integral_constant<int, kDotRight>());
    }
  };
  // The first tiles share the rows to fetch, so that memory is read at an even pace.
  const int64_t fetched = kF == kDotLeft ? kF : 0, share = tiles == 1 ? 4 : tiles < 4 ? 2 : 1;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t left = fetched - i * share;
    tile(i * kDotRight, left > 0 ? min_of(left, share) : 0, left > 0 ? next + i * share * p.feature_stride : next);
  }
}

// totals[row * total_stride + f] += x[row, :] . weight row f, for kF weight rows whose elements are next to each other.
// panel: [kDotLeft, kDepth], for a weight that has to be converted.
template <int kF, class T>
void dot_features(const SkinnyLinearParams& p, const T* weight, const accumulate_t<T>* x, accumulate_t<T>* panel,
                  vec_t<T>* totals, int64_t total_stride) {
  using A = accumulate_t<T>;
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t n = min_of(kDepth, p.depth - k);
    const T* next = weight + kF * p.feature_stride + k;
    if (std::is_same_v<T, A> || p.rows <= kDotRight) {
      dot_piece<kF>(p, next, weight + k, p.feature_stride, x + k, n, totals, total_stride);
    } else {
      copy_rows(weight + k, p.feature_stride, kF, n, panel, kDepth);
      dot_piece<kF>(p, next, panel, kDepth, x + k, n, totals, total_stride);
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
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  const int64_t most = round_up(p.block(), kLanes<V>);
  Scratch<V> totals(p.rows * most);
  Scratch<A> panel(kDotLeft * kDepth);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / p.blocks(), first = item % p.blocks() * p.block();
    const int64_t count = min_of(p.block(), p.features - first);
    const T* weight = static_cast<const T*>(p.weight) + group * p.group_stride + first * p.feature_stride;
    const A* x = static_cast<const A*>(p.x) + group * p.depth;
    for (int64_t i = 0; i < p.rows * most; ++i) totals[i] = V{};
    int64_t f = 0;
    for (; f + kDotLeft <= count; f += kDotLeft) {
      dot_features<kDotLeft, T>(p, weight + f * p.feature_stride, x, panel.get(), totals.get() + f, most);
    }
    for (; f < count; ++f) {
      dot_features<1, T>(p, weight + f * p.feature_stride, x, panel.get(), totals.get() + f, most);
    }
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t at = group * p.features + first;
      T* y = static_cast<T*>(p.y) + row * p.groups * p.features + at;
      for (f = 0; f < count; f += kLanes<V>) {
        V sums[kLanes<V>];
        for (int i = 0; i < kLanes<V>; ++i) sums[i] = totals[row * most + f + i];
        V value = lane_sums(sums);
        if (p.bias) value += load_n(static_cast<const T*>(p.bias) + at + f, count - f);
        store_n(y + f, value, count - f);
      }
    }
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
