// CPU kernels of normalized_shuffle. A row's tokens are read from memory once, in the first of three sweeps (sum,
// squares, result); the other two find them in the cache, so no shuffled copy is ever written.
#include <cstring>
#include <vector>

#include "common/column_sum.h"
#include "common/vec.h"
#include "normalized_shuffle/normalized_shuffle.h"

namespace vico::VICO_CPU_ARCH {
namespace {

// Calls fn(offset in the tile's buffer, channel, length) for each run of memory that makes up the row of `block`.
template <class Fn>
VICO_INLINE void for_runs(const ShuffleShape& s, int64_t block, Fn&& fn) {
  const bool dense = s.token_stride == s.channels;  // then a row of the block's tokens is one run
  const int64_t run = dense ? s.rate : 1, length = run * s.channels;
  int64_t channel = 0;
  for (int64_t i = 0; i < s.rate; ++i) {
    for (int64_t j = 0; j < s.rate; j += run, channel += length) {
      fn(block + s.row_offset(i) + j * s.token_stride, channel, length);
    }
  }
}

// Lanes from n on set to zero.
template <class V>
VICO_INLINE V first_lanes(V v, int64_t n) {
  for (int i = 0; i < kLanes<V>; ++i) v[i] = i < n ? v[i] : 0;
  return v;
}

// Sum of fn(x) over the row whose tile's buffer begins at `tile`; four sums in flight hide the adder's latency.
template <class T, class Fn>
VICO_INLINE accumulate_t<T> sum_row(const ShuffleShape& s, const T* tile, int64_t block, Fn&& fn) {
  constexpr int64_t kW = kWidth<T>;
  vec_t<T> a{}, b{}, c{}, d{};
  for_runs(s, block, [&](int64_t offset, int64_t, int64_t length) {
    const T* x = tile + offset;
    int64_t i = 0;
    for (; i + 4 * kW <= length; i += 4 * kW) {
      a += fn(load(x + i));
      b += fn(load(x + i + kW));
      c += fn(load(x + i + 2 * kW));
      d += fn(load(x + i + 3 * kW));
    }
    for (; i + kW <= length; i += kW) a += fn(load(x + i));
    if (i < length) b += first_lanes(fn(load_partial(x + i, length - i)), length - i);
  });
  return sum((a + b) + (c + d));
}

template <class T>
void forward_row(const NormalizedShuffleParams& p, int64_t m) {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  const ShuffleShape& s = p.shape;
  const T* tile = static_cast<const T*>(p.tokens) + s.source_tile(m / s.out_tokens()) * s.tile_stride;
  const int64_t block = s.block_offset(m % s.out_tokens()), channels = s.out_channels();
  const A mean = sum_row(s, tile, block, [](V x) { return x; }) / static_cast<A>(channels);
  const A squares = sum_row(s, tile, block, [mean](V x) { return (x - mean) * (x - mean); });
  const A rstd = 1 / std::sqrt(squares / static_cast<A>(channels) + static_cast<A>(p.eps));
  static_cast<A*>(p.mean)[m] = mean;
  static_cast<A*>(p.rstd)[m] = rstd;
  T* out = static_cast<T*>(p.out) + m * channels;
  const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
  for_runs(s, block, [&](int64_t offset, int64_t channel, int64_t length) {
    for (int64_t i = 0; i < length; i += kWidth<T>) {
      const V h = (load_n(tile + offset + i, length - i) - mean) * rstd;
      const V y = h * load_n(weight + channel + i, length - i) + load_n(bias + channel + i, length - i);
      store_n(out + channel + i, y, length - i);
    }
  });
}

// One output token in the backward pass.
template <class T>
struct BackwardRow {
  using A = accumulate_t<T>;
  const T* tile;  // its tile in the ViT's buffer
  int64_t block;  // offset of its first ViT token in there
  const T* grad_out;
  A mean, rstd;
  T* grad_x;  // its first ViT token in grad_tokens
};

// Adds the row's part of grad_weight and grad_bias; with kNeedGradX, also the two means that grad_x subtracts.
template <class T, bool kNeedGradX>
VICO_INLINE void add_parameter_grads(const ShuffleShape& s, const BackwardRow<T>& row, const accumulate_t<T>* weight,
                                     accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias, accumulate_t<T>& mean_g,
                                     accumulate_t<T>& mean_gh) {
  using V = vec_t<T>;
  V total_g{}, total_gh{};
  for_runs(s, row.block, [&](int64_t offset, int64_t channel, int64_t length) {
    for (int64_t i = 0; i < length; i += kWidth<T>) {
      const int64_t c = channel + i, n = length - i;
      const V dy = load_n(row.grad_out + c, n);  // zero in lanes past the end, which so add nothing
      const V dyh = dy * ((load_n(row.tile + offset + i, n) - row.mean) * row.rstd);
      store_n(grad_weight + c, load_n(grad_weight + c, n) + dyh, n);
      store_n(grad_bias + c, load_n(grad_bias + c, n) + dy, n);
      if constexpr (kNeedGradX) {
        const V w = load_n(weight + c, n);
        total_g += dy * w;
        total_gh += dyh * w;
      }
    }
  });
  mean_g = sum(total_g) / static_cast<accumulate_t<T>>(s.out_channels());
  mean_gh = sum(total_gh) / static_cast<accumulate_t<T>>(s.out_channels());
}

// grad_x of one row, added to `repeated` if it is not the first of its ViT tokens, and stored to grad_tokens if it is
// the last: the sum over tiles that were gathered more than once stays in the sum type until then.
template <class T>
VICO_INLINE void add_grad_x(const ShuffleShape& s, const BackwardRow<T>& row, const accumulate_t<T>* weight,
                            accumulate_t<T> mean_g, accumulate_t<T> mean_gh, bool first, bool last,
                            accumulate_t<T>* repeated) {
  using V = vec_t<T>;
  for (int64_t k = 0, channel = 0; k < s.rate * s.rate; ++k, channel += s.channels) {
    const int64_t i = k / s.rate, j = k % s.rate;
    const T* x = row.tile + row.block + s.row_offset(i) + j * s.token_stride;
    T* grad_x = row.grad_x + (i * s.grid_w + j) * s.channels;
    for (int64_t c = 0; c < s.channels; c += kWidth<T>) {
      const int64_t n = s.channels - c;
      const V h = (load_n(x + c, n) - row.mean) * row.rstd;
      const V g = load_n(row.grad_out + channel + c, n) * load_n(weight + channel + c, n);
      V dx = row.rstd * (g - mean_g - h * mean_gh);
      if (!first) dx += load_n(repeated + channel + c, n);
      if (last) {
        store_n(grad_x + c, dx, n);
      } else {
        store_n(repeated + channel + c, dx, n);
      }
    }
  }
}

template <class T, bool kNeedGradX>
void backward_chunk(const NormalizedShuffleBackwardParams& p, int64_t chunk, accumulate_t<T>* repeated) {
  using A = accumulate_t<T>;
  const ShuffleShape& s = p.shape;
  const int64_t channels = s.out_channels(), blocks = p.used * s.out_tokens();
  const A* weight = static_cast<const A*>(p.weight);
  A* grad_weight = static_cast<A*>(p.partials) + chunk * 2 * channels;
  A* grad_bias = grad_weight + channels;
  std::memset(grad_weight, 0, 2 * channels * sizeof(A));
  ShuffleShape dense = s;  // of grad_tokens
  dense.token_stride = s.channels;
  dense.tile_stride = (s.skip + s.grid_h * s.grid_w) * s.channels;
  const int64_t end = (chunk + 1) * kChunkRows < blocks ? (chunk + 1) * kChunkRows : blocks;
  for (int64_t b = chunk * kChunkRows; b < end; ++b) {
    const int64_t source = p.used_tiles[b / s.out_tokens()], token = b % s.out_tokens();
    const int64_t first = p.tile_offsets[source], last = p.tile_offsets[source + 1] - 1;
    for (int64_t k = first; k <= last; ++k) {
      const int64_t m = p.selected_tiles[k] * s.out_tokens() + token;
      BackwardRow<T> row{static_cast<const T*>(p.tokens) + source * s.tile_stride,
                         s.block_offset(token),
                         static_cast<const T*>(p.grad_out) + m * channels,
                         static_cast<const A*>(p.mean)[m],
                         static_cast<const A*>(p.rstd)[m],
                         nullptr};
      A mean_g, mean_gh;
      add_parameter_grads<T, kNeedGradX>(s, row, weight, grad_weight, grad_bias, mean_g, mean_gh);
      if constexpr (kNeedGradX) {
        row.grad_x = static_cast<T*>(p.grad_tokens) + source * dense.tile_stride + dense.block_offset(token);
        add_grad_x(s, row, weight, mean_g, mean_gh, k == first, k == last, repeated);
      }
    }
  }
}

}  // namespace

void normalized_shuffle(const NormalizedShuffleParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    for (int64_t m = begin; m < end; ++m) forward_row<decltype(element)>(p, m);
  });
}

void normalized_shuffle_backward(const NormalizedShuffleBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<accumulate_t<T>> repeated(p.grad_tokens ? p.shape.out_channels() : 0);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (p.grad_tokens) {
        backward_chunk<T, true>(p, chunk, repeated.data());
      } else {
        backward_chunk<T, false>(p, chunk, repeated.data());
      }
    }
  });
}

void normalized_shuffle_zero_rest(const NormalizedShuffleBackwardParams& p, int64_t begin, int64_t end) {
  const ShuffleShape& s = p.shape;
  const int64_t tile_bytes = (s.skip + s.grid_h * s.grid_w) * s.channels * element_size(p.dtype);
  for (int64_t t = begin; t < end; ++t) {
    const bool used = p.tile_offsets[t] < p.tile_offsets[t + 1];
    const int64_t bytes = used ? s.skip * s.channels * element_size(p.dtype) : tile_bytes;
    std::memset(static_cast<char*>(p.grad_tokens) + t * tile_bytes, 0, bytes);
  }
}

}  // namespace vico::VICO_CPU_ARCH
