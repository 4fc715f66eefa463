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
  if (!p.out) return;
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
  const T* x;  // its first ViT token
  const T* grad_out;
  accumulate_t<T> mean, rstd;
  T* grad_x;  // its first ViT token in grad_tokens
  // A ViT token's gradient is a sum over the output tokens made of it, of which this one is the first and / or last.
  bool first, last;
};

// Adds kRows rows' parts of grad_weight and grad_bias: several at a time, so that these are read and written less.
template <class T, int kRows>
VICO_INLINE void add_parameter_grads(const ShuffleShape& s, const BackwardRow<T>* rows, accumulate_t<T>* grad_weight,
                                     accumulate_t<T>* grad_bias) {
  for_runs(s, 0, [&](int64_t offset, int64_t channel, int64_t length) {
    for (int64_t i = 0; i < length; i += kWidth<T>) {
      const int64_t c = channel + i, n = length - i;
      auto total_dyh = load_n(grad_weight + c, n), total_dy = load_n(grad_bias + c, n);
      for (int r = 0; r < kRows; ++r) {
        const auto dy = load_n(rows[r].grad_out + c, n);
        total_dyh += dy * ((load_n(rows[r].x + offset + i, n) - rows[r].mean) * rows[r].rstd);
        total_dy += dy;
      }
      store_n(grad_weight + c, total_dyh, n);
      store_n(grad_bias + c, total_dy, n);
    }
  });
}

// grad_x of one row, stored to grad_tokens if the row is the last of its ViT tokens; until then the sum over tiles that
// were gathered more than once stays in `repeated`, in the sum type.
template <class T>
VICO_INLINE void add_grad_x(const ShuffleShape& s, const BackwardRow<T>& row, const accumulate_t<T>* weight,
                            accumulate_t<T>* repeated) {
  using V = vec_t<T>;
  V total_g{}, total_gh{};
  for_runs(s, 0, [&](int64_t offset, int64_t channel, int64_t length) {
    for (int64_t i = 0; i < length; i += kWidth<T>) {
      const int64_t c = channel + i, n = length - i;
      const V g = load_n(row.grad_out + c, n) * load_n(weight + c, n);  // zero in lanes past the end
      total_g += g;
      total_gh += g * ((load_n(row.x + offset + i, n) - row.mean) * row.rstd);
    }
  });
  const auto channels = static_cast<accumulate_t<T>>(s.out_channels());
  const auto mean_g = sum(total_g) / channels, mean_gh = sum(total_gh) / channels;
  for (int64_t k = 0, channel = 0; k < s.rate * s.rate; ++k, channel += s.channels) {
    const int64_t i = k / s.rate, j = k % s.rate;
    const T* x = row.x + s.row_offset(i) + j * s.token_stride;
    T* grad_x = row.grad_x + (i * s.grid_w + j) * s.channels;
    for (int64_t c = 0; c < s.channels; c += kWidth<T>) {
      const int64_t n = s.channels - c;
      const V h = (load_n(x + c, n) - row.mean) * row.rstd;
      const V g = load_n(row.grad_out + channel + c, n) * load_n(weight + channel + c, n);
      V dx = row.rstd * (g - mean_g - h * mean_gh);
      if (!row.first) dx += load_n(repeated + channel + c, n);
      if (row.last) {
        store_n(grad_x + c, dx, n);
      } else {
        store_n(repeated + channel + c, dx, n);
      }
    }
  }
}

template <class T>
void backward_chunk(const NormalizedShuffleBackwardParams& p, int64_t chunk, accumulate_t<T>* repeated) {
  using A = accumulate_t<T>;
  constexpr int kRows = 4;
  const ShuffleShape& s = p.shape;
  const int64_t channels = s.out_channels(), blocks = p.used * s.out_tokens();
  A* grad_weight = static_cast<A*>(p.partials) + chunk * 2 * channels;
  A* grad_bias = grad_weight + channels;
  std::memset(grad_weight, 0, 2 * channels * sizeof(A));
  ShuffleShape dense = s;  // of grad_tokens
  dense.token_stride = s.channels;
  dense.tile_stride = (s.skip + s.grid_h * s.grid_w) * s.channels;

  BackwardRow<T> rows[kRows];
  int waiting = 0;
  const auto finish_waiting = [&] {
    if (waiting == kRows) {
      add_parameter_grads<T, kRows>(s, rows, grad_weight, grad_bias);
    } else {
      for (int r = 0; r < waiting; ++r) add_parameter_grads<T, 1>(s, rows + r, grad_weight, grad_bias);
    }
    for (int r = 0; r < waiting && p.grad_tokens; ++r) {
      add_grad_x(s, rows[r], static_cast<const A*>(p.weight), repeated);
    }
    waiting = 0;
  };
  const int64_t end = (chunk + 1) * kChunkRows < blocks ? (chunk + 1) * kChunkRows : blocks;
  for (int64_t b = chunk * kChunkRows; b < end; ++b) {
    const int64_t source = p.used_tiles[b / s.out_tokens()], token = b % s.out_tokens();
    const int64_t first = p.tile_offsets[source], last = p.tile_offsets[source + 1] - 1;
    for (int64_t k = first; k <= last; ++k) {
      const int64_t m = p.selected_tiles[k] * s.out_tokens() + token;
      BackwardRow<T>& row = rows[waiting++];
      row.x = static_cast<const T*>(p.tokens) + source * s.tile_stride + s.block_offset(token);
      row.grad_out = static_cast<const T*>(p.grad_out) + m * channels;
      row.mean = static_cast<const A*>(p.mean)[m];
      row.rstd = static_cast<const A*>(p.rstd)[m];
      row.grad_x = p.grad_tokens
                       ? static_cast<T*>(p.grad_tokens) + source * dense.tile_stride + dense.block_offset(token)
                       : nullptr;
      row.first = k == first;
      row.last = k == last;
      if (waiting == kRows) finish_waiting();
    }
  }
  finish_waiting();
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
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<T>(p, chunk, repeated.data());
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
