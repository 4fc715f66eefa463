// CPU kernels of attention_pool: tokens in blocks that stay in the cache, all heads at once, so that scores and means
// are small matrix products with the heads along the vector; softmax online, with a running maximum per head.
#include <limits>

#include "attention_pool/attention_pool.h"
#include "common/dot.h"
#include "common/exp.h"
#include "common/multiply.h"
#include "common/panel.h"

namespace vico::VICO_CPU_ARCH {
namespace {

// What a thread needs for the tokens of one chunk, one block of them at a time. A is the accumulate type.
template <class T>
struct Block {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  // Elements of a row per step: a few tokens' and all heads' pieces stay in the L1 cache. Sums of sums round less than
  // one long sum.
  static constexpr int64_t kDepth = (kVecBytes == 64 ? 2048 : 1024) / sizeof(A);

  const AttentionPoolShape& shape;
  const int64_t heads;      // padded
  const int64_t stride;     // of a row of `panel`
  const int64_t most;       // tokens in a block
  Scratch<A> panel;         // [most, stride]
  Scratch<A> ones;          // [heads]
  Scratch<V> totals;        // [heads, kDotLeft], vectors of partial sums
  const A* rows = nullptr;  // the block's tokens: where they are, or converted in `panel`
  int64_t row_stride = 0;

  explicit Block(const AttentionPoolShape& s)
      : shape(s),
        heads(s.padded_heads()),
        stride(panel_stride<A>(s.channels)),
        most(panel_rows<A>(s.channels, AttentionPoolShape::kChunk)),
        panel(most * stride),
        ones(heads),
        totals(heads * kDotLeft) {
    for (int64_t h = 0; h < heads; ++h) ones[h] = 1;
  }

  void read(const AttentionPoolInputs& in, int64_t tile, int64_t token, int64_t count) {
    const T* from = static_cast<const T*>(in.tokens) + tile * in.tile_stride + token * in.token_stride;
    if constexpr (std::is_same_v<T, A>) {
      rows = from;
      row_stride = in.token_stride;
    } else {
      copy_rows(from, in.token_stride, count, shape.channels, panel.get(), stride);
      rows = panel.get();
      row_stride = stride;
    }
  }

  // out [count, heads]: out[t, h] = rows[t, :] . right[h, :], from right [shape.heads, stride]
  void times_rows(const A* right, A* out, int64_t count) const {
    int64_t t = 0;
    for (; t + kDotLeft <= count; t += kDotLeft) scores<kDotLeft>(right, rows + t * row_stride, out + t * heads);
    for (; t < count; ++t) scores<1>(right, rows + t * row_stride, out + t * heads);
  }

  // out [channels, heads] = beta [heads] * out + rows^T [channels, count] weights [count, heads]
  void transposed_times(const A* weights, const A* beta, A* out, int64_t count) const {
    multiply<V, A, true>({count, rows, 1, row_stride, weights, heads, out, heads, beta}, shape.channels, heads);
  }

 private:
  template <int kTokens>
  void scores(const A* right, const A* tokens, A* out) const {
    for (int64_t i = 0; i < heads * kDotLeft; ++i) totals[i] = V{};
    for (int64_t k = 0; k < shape.channels; k += kDepth) {
      const int64_t n = min_of(kDepth, shape.channels - k);
      const auto tile = [&](auto of_right, int64_t h) __attribute__((always_inline)) {
        // Meanwhile a piece of one of the next rows is fetched.
        const A* ahead = tokens + (kTokens + h / kDotRight) * row_stride + k;
        dot_tile<kTokens, decltype(of_right)::value, true>(tokens + k, row_stride, right + h * stride + k, stride, n,
                                                           h / kDotRight < kTokens, ahead, 0,
                                                           totals.get() + h * kDotLeft, kDotLeft);
      };
      int64_t h = 0;
      for (; h + kDotRight <= shape.heads; h += kDotRight) tile(std::integral_constant<int, kDotRight>(), h);
      for (; h < shape.heads; ++h) tile(std::integral_constant<int, 1>(), h);
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t h = 0; h < heads; h += kLanes<V>) {
        V sums[kLanes<V>];
        for (int i = 0; i < kLanes<V>; ++i) sums[i] = totals[(h + i) * kDotLeft + t];
        store(out + t * heads + h, lane_sums(sums));
      }
    }
  }
};

// Channels [begin, end) of out [heads, channels] = sum over chunks of weights[chunk, :] * partial[chunk], where
// partial is [chunks, chunk_rows, padded heads]. `block` is room for [end - begin, padded heads].
template <class T>
void combine_rows(const AttentionPoolShape& s, const accumulate_t<T>* partial, int64_t chunk_rows,
                  const accumulate_t<T>* weights, accumulate_t<T>* block, T* out, int64_t begin, int64_t end) {
  using V = vec_t<T>;
  const int64_t heads = s.padded_heads();
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t h = 0; h < heads; h += kLanes<V>) {
      V total = V{};
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
        total += load(weights + chunk * heads + h) * load(partial + (chunk * chunk_rows + c) * heads + h);
      }
      store(block + (c - begin) * heads + h, total);
    }
  }
  for (int64_t h = 0; h < s.heads; ++h) {
    for (int64_t c = begin; c < end; ++c) {
      out[h * s.channels + c] = from_accumulate<T>(block[(c - begin) * heads + h]);
    }
  }
}

template <class T>
void forward_chunks(const AttentionPoolParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  const AttentionPoolShape& s = p.shape;
  Block<T> block(s);
  const int64_t heads = block.heads;
  Scratch<A> query(s.heads * block.stride), weights(block.most * heads), beta(heads);
  const T* packed = nullptr;  // the query that `query` holds
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / s.chunks(), first = item % s.chunks() * AttentionPoolShape::kChunk;
    const int64_t last = min_of(first + AttentionPoolShape::kChunk, s.count);
    const T* rows = static_cast<const T*>(p.in.query) + tile * p.in.query_stride;
    if (rows != packed) copy_rows(rows, p.in.query_head_stride, s.heads, s.channels, query.get(), block.stride);
    packed = rows;
    A* sums = static_cast<A*>(p.partial) + item * s.partial_rows() * heads;  // [channels, heads]
    A* maximum = sums + s.channels * heads;                                  // [heads]
    A* total = maximum + heads;                                              // [heads]
    for (int64_t h = 0; h < heads; h += kLanes<V>) {
      // The lowest finite number and not -inf: scores of -inf then weigh 0 instead of exp(-inf + inf).
      store(maximum + h, broadcast<V>(std::numeric_limits<A>::lowest()));
      store(total + h, V{});
    }
    for (int64_t token = first; token < last; token += block.most) {
      const int64_t count = min_of(block.most, last - token);
      block.read(p.in, tile, token, count);
      block.times_rows(query.get(), weights.get(), count);
      for (int64_t h = 0; h < heads; h += kLanes<V>) {
        const V before = load(maximum + h);
        V now = before;
        for (int64_t t = 0; t < count; ++t) now = max(load(weights.get() + t * heads + h), now);
        const V scale = exp(before - now);
        V sum = load(total + h) * scale;
        for (int64_t t = 0; t < count; ++t) {
          A* weight = weights.get() + t * heads + h;
          const V e = exp(load(weight) - now);
          store(weight, e);
          sum += e;
        }
        store(maximum + h, now);
        store(total + h, sum);
        store(beta.get() + h, scale);
      }
      block.transposed_times(weights.get(), token > first ? beta.get() : nullptr, sums, count);
    }
  }
}

template <class T>
void forward_combine(const AttentionPoolParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  const AttentionPoolShape& s = p.shape;
  const int64_t heads = s.padded_heads(), chunks = s.chunks();
  Scratch<A> weights(chunks * heads), sums(AttentionPoolShape::kCombineRows * heads);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / s.combine_items(), first = item % s.combine_items() * AttentionPoolShape::kCombineRows;
    const int64_t last = min_of(first + AttentionPoolShape::kCombineRows, s.channels);
    const A* partial = static_cast<const A*>(p.partial) + tile * chunks * s.partial_rows() * heads;
    const auto statistics = [&](int64_t chunk, int64_t h) {
      return partial + (chunk * s.partial_rows() + s.channels) * heads + h;
    };
    for (int64_t h = 0; h < heads; h += kLanes<V>) {
      V maximum = load(statistics(0, h)), total = V{};
      for (int64_t chunk = 1; chunk < chunks; ++chunk) maximum = max(load(statistics(chunk, h)), maximum);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const V weight = exp(load(statistics(chunk, h)) - maximum);
        store(weights.get() + chunk * heads + h, weight);
        total += weight * load(statistics(chunk, h) + heads);
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        A* weight = weights.get() + chunk * heads + h;
        store(weight, load(weight) / total);
      }
      for (int64_t i = 0; first == 0 && i < kLanes<V> && h + i < s.heads; ++i) {
        static_cast<A*>(p.lse)[tile * s.heads + h + i] = maximum[i] + std::log(total[i]);
      }
    }
    combine_rows<T>(s, partial, s.partial_rows(), weights.get(), sums.get(),
                    static_cast<T*>(p.context) + tile * s.heads * s.channels, first, last);
  }
}

// The queries and gradients of one tile as the products of its chunks read them.
template <class T>
struct BackwardTile {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  Scratch<A> stacked;   // [2 * heads, stride]: grad_context's rows, then the queries
  Scratch<A> lse, dot;  // [heads]; dot[h] = grad_context[h, :] . context[h, :]
  int64_t held = -1;    // tile

  BackwardTile(int64_t heads, int64_t stride) : stacked(2 * heads * stride), lse(heads), dot(heads) {}

  void hold(const AttentionPoolBackwardParams& p, int64_t tile, int64_t heads, int64_t stride) {
    if (tile == held) return;
    held = tile;
    const AttentionPoolShape& s = p.shape;
    const T* queries = static_cast<const T*>(p.in.query) + tile * p.in.query_stride;
    const T* grads = static_cast<const T*>(p.grad_context) + tile * s.heads * s.channels;
    const T* contexts = static_cast<const T*>(p.context) + tile * s.heads * s.channels;
    for (int64_t h = 0; h < heads; ++h) {
      lse[h] = dot[h] = 0;
      if (h >= s.heads) continue;
      lse[h] = static_cast<const A*>(p.lse)[tile * s.heads + h];
      V product = V{};
      for (int64_t c = 0; c < s.channels; c += kWidth<T>) {
        product +=
            load_n(grads + h * s.channels + c, s.channels - c) * load_n(contexts + h * s.channels + c, s.channels - c);
      }
      dot[h] = sum(product);
    }
    for (int64_t h = s.heads; h < heads; ++h) {
      for (int64_t c = 0; c < stride; ++c) stacked[h * stride + c] = stacked[(heads + h) * stride + c] = 0;
    }
    copy_rows(grads, s.channels, s.heads, s.channels, stacked.get(), stride);
    copy_rows(queries, p.in.query_head_stride, s.heads, s.channels, stacked.get() + heads * stride, stride);
  }
};

template <class T>
void backward_chunks(const AttentionPoolBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = vec_t<T>;
  const AttentionPoolShape& s = p.shape;
  Block<T> block(s);
  const int64_t heads = block.heads;
  BackwardTile<T> held(heads, block.stride);
  Scratch<A> weights(block.most * heads), slopes(block.most * heads);
  Scratch<A> stacked(p.grad_tokens ? block.most * 2 * heads : 0);  // [most, 2 * heads]: weights, then slopes
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / s.chunks(), first = item % s.chunks() * AttentionPoolShape::kChunk;
    const int64_t last = min_of(first + AttentionPoolShape::kChunk, s.count);
    held.hold(p, tile, heads, block.stride);
    A* grad_query = static_cast<A*>(p.partial) + item * s.channels * heads;
    T* grad_tokens = nullptr;
    if (p.grad_tokens) {
      grad_tokens = static_cast<T*>(p.grad_tokens) + tile * (p.skip + s.count) * s.channels;
      if (first == 0) std::memset(static_cast<void*>(grad_tokens), 0, p.skip * s.channels * sizeof(T));
      grad_tokens += p.skip * s.channels;
    }
    for (int64_t token = first; token < last; token += block.most) {
      const int64_t count = min_of(block.most, last - token);
      block.read(p.in, tile, token, count);
      block.times_rows(held.stacked.get() + heads * block.stride, weights.get(), count);
      block.times_rows(held.stacked.get(), slopes.get(), count);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t h = 0; h < heads; h += kLanes<V>) {
          const V weight = exp(load(weights.get() + t * heads + h) - load(held.lse.get() + h));
          const V slope = weight * (load(slopes.get() + t * heads + h) - load(held.dot.get() + h));
          store(slopes.get() + t * heads + h, slope);
          if (!grad_tokens) continue;
          store(stacked.get() + t * 2 * heads + h, weight);
          store(stacked.get() + (t * 2 + 1) * heads + h, slope);
        }
      }
      block.transposed_times(slopes.get(), token > first ? block.ones.get() : nullptr, grad_query, count);
      if (!grad_tokens) continue;
      // Where the block's tokens were converted they have been used: their place takes their gradients.
      multiply<V, A>(
          {2 * heads, stacked.get(), 2 * heads, 1, held.stacked.get(), block.stride, block.panel.get(), block.stride},
          count, round_up(s.channels, kLanes<V>));
      for (int64_t t = 0; t < count; ++t) {
        const A* row = block.panel.get() + t * block.stride;
        T* out = grad_tokens + (token + t) * s.channels;
        for (int64_t c = 0; c < s.channels; c += kWidth<T>) store_n(out + c, load(row + c), s.channels - c);
      }
    }
  }
}

template <class T>
void backward_combine(const AttentionPoolBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const AttentionPoolShape& s = p.shape;
  const int64_t heads = s.padded_heads();
  Scratch<A> ones(s.chunks() * heads), sums(AttentionPoolShape::kCombineRows * heads);
  for (int64_t i = 0; i < s.chunks() * heads; ++i) ones[i] = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / s.combine_items(), first = item % s.combine_items() * AttentionPoolShape::kCombineRows;
    const int64_t last = min_of(first + AttentionPoolShape::kCombineRows, s.channels);
    combine_rows<T>(s, static_cast<const A*>(p.partial) + tile * s.chunks() * s.channels * heads, s.channels,
                    ones.get(), sums.get(), static_cast<T*>(p.grad_query) + tile * s.heads * s.channels, first, last);
  }
}

}  // namespace

void attention_pool_chunks(const AttentionPoolParams& p, int64_t begin, int64_t end) {
  dispatch(p.shape.dtype, [&](auto element) { forward_chunks<decltype(element)>(p, begin, end); });
}

void attention_pool_combine(const AttentionPoolParams& p, int64_t begin, int64_t end) {
  dispatch(p.shape.dtype, [&](auto element) { forward_combine<decltype(element)>(p, begin, end); });
}

void attention_pool_backward_chunks(const AttentionPoolBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.shape.dtype, [&](auto element) { backward_chunks<decltype(element)>(p, begin, end); });
}

void attention_pool_backward_combine(const AttentionPoolBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.shape.dtype, [&](auto element) { backward_combine<decltype(element)>(p, begin, end); });
}

}  // namespace vico::VICO_CPU_ARCH
