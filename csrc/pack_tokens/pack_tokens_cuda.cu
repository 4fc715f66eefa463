// CUDA kernels of pack_tokens. A thread keeps its pack of columns, and the bias or the sum of gradients that belongs to
// it, while it runs down a chunk of rows (common/row_chunks.cuh), kRowsInFlight of them at a time: one read and one
// write per element. Chunks do not cross from `full` to `compressed`, so a block has one bias.
#include "common/row_chunks.cuh"
#include "pack_tokens/pack_tokens.h"

namespace vico {
namespace {

constexpr int kRowsInFlight = 4;

// Rows [first, last) of `full`, or of `compressed`.
struct SourceRows {
  bool is_full;
  int64_t first, last;

  VICO_DEVICE SourceRows(const PackShape& s, int64_t chunk, int64_t chunk_rows) {
    const int64_t full_chunks = chunk_count(s.full_rows(), chunk_rows);
    is_full = chunk < full_chunks;
    first = (is_full ? chunk : chunk - full_chunks) * chunk_rows;
    const int64_t rows = is_full ? s.full_rows() : s.compressed_rows();
    last = first + chunk_rows < rows ? first + chunk_rows : rows;
  }
};

// Whether source tile j has none of the rows [from, to), or rows that its own check refuses. By subtraction of checked
// signs, so that hostile offsets cannot overflow; likewise below.
VICO_DEVICE bool is_apart(const PackShape& s, int64_t j, int64_t from, int64_t to) {
  const int64_t tile = s.order[j];
  if (tile < 0 || tile >= s.tiles()) return true;
  const int64_t other = s.first_row[tile];
  return other < 0 || other >= to || other <= from - s.tile_tokens(j);
}

// Checks what the host has not seen: that the tiles of these rows have just their rows in the output, so that none lies
// out of bounds, and that no other tile has them. `threads` threads of the block call this.
VICO_DEVICE void check_plan(const PackShape& s, const SourceRows& rows, int64_t tokens, unsigned threads) {
  const int64_t tiles = s.tiles(), before = rows.is_full ? 0 : s.full_tiles;
  VICO_DEVICE_CHECK(!s.packed || s.first_row[0] == 0, "cu_tokens must begin with 0, got %lld",
                    static_cast<long long>(s.first_row[0]));
  for (int64_t t = rows.first / tokens; t * tokens < rows.last; ++t) {
    const int64_t i = before + t, tile = s.order[i];
    const bool looks = t * tokens >= rows.first;  // one chunk of each tile, at the other tiles
    bool once = tile >= 0 && tile < tiles;
    if (looks) {
      for (int64_t j = threadIdx.x; j < tiles; j += threads) once = once && (j == i || s.order[j] != tile);
    }
    VICO_DEVICE_CHECK(once, "order must hold each tile of [0, %lld) once, got %lld at position %lld",
                      static_cast<long long>(tiles), static_cast<long long>(tile), static_cast<long long>(i));
    const int64_t from = s.first_row[tile];
    if (!s.packed) {
      VICO_DEVICE_CHECK(from >= 0 && from <= s.buffer_rows - tokens,
                        "first_row gives tile %lld rows from %lld on, but it has %lld tokens, and out %lld rows",
                        static_cast<long long>(tile), static_cast<long long>(from), static_cast<long long>(tokens),
                        static_cast<long long>(s.buffer_rows));
      bool alone = true;
      if (looks) {
        for (int64_t j = threadIdx.x; j < tiles; j += threads)
          alone = alone && (j == i || is_apart(s, j, from, from + tokens));
      }
      VICO_DEVICE_CHECK(alone, "first_row gives tile %lld rows %lld to %lld, and some of them to another tile too",
                        static_cast<long long>(tile), static_cast<long long>(from),
                        static_cast<long long>(from + tokens));
      continue;
    }
    const int64_t to = s.first_row[tile + 1];
    VICO_DEVICE_CHECK(from >= 0 && to >= 0 && to - from == tokens && to <= s.rows(),
                      "cu_tokens gives tile %lld rows %lld to %lld, but it is a %s tile of %lld tokens: is the plan of "
                      "another batch?",
                      static_cast<long long>(tile), static_cast<long long>(from), static_cast<long long>(to),
                      rows.is_full ? "full" : "compressed", static_cast<long long>(tokens));
  }
}

// The output's rows for a chunk's rows, one after another, with a division for the first alone.
class OutputRows {
 public:
  VICO_DEVICE OutputRows(const PackShape& s, const SourceRows& rows, unsigned threads)
      : first_row_(s.first_row), tokens_(rows.is_full ? s.full_tokens : s.compressed_tokens) {
    check_plan(s, rows, tokens_, threads);
    order_ = s.order + (rows.is_full ? 0 : s.full_tiles) + rows.first / tokens_;
    token_ = rows.first % tokens_;
    tile_row_ = first_row_[*order_];
  }
  VICO_DEVICE int64_t next() {
    if (token_ == tokens_) {
      token_ = 0;
      tile_row_ = first_row_[*++order_];
    }
    return tile_row_ + token_++;
  }

 private:
  const int64_t *first_row_, *order_;
  int64_t tokens_, token_, tile_row_;
};

// out[the place of r] = row r + bias
template <class T, int kN>
__global__ void __launch_bounds__(kSlabThreads)
    pack_tokens_kernel(const __grid_constant__ PackTokensParams p, const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  const PackShape& s = p.shape;
  const SourceRows rows(s, blockIdx.x / at.slabs, at.chunk_rows);
  const int64_t pack = at.pack(), c = pack * kN;
  const unsigned threads = at.active_threads();
  if (threadIdx.x >= threads) return;
  const T* in = static_cast<const T*>(rows.is_full ? p.full : p.compressed) + rows.first * s.hidden + c;
  // The source rows need no plan: the first are on their way while it is checked, the next while these are stored.
  PackBits<T, kN> next[kRowsInFlight] = {};
  const auto load = [&](int64_t row) {
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r < rows.last)
        next[r] = detail::bit_cast<PackBits<T, kN>>(load_pack_streaming<T, kN>(in + r * s.hidden));
    }
    in += kRowsInFlight * s.hidden;
  };
  load(rows.first);
  const void* biases = rows.is_full ? p.full_bias : p.compressed_bias;
  A bias[kN] = {};
  if (biases) load_parameter<T>(bias, biases, c, rows.is_full ? p.element_full_bias : p.element_compressed_bias);
  OutputRows places(s, rows, threads);
  for (int64_t row = rows.first; row < rows.last; row += kRowsInFlight) {
    PackBits<T, kN> now[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) now[r] = next[r];
    load(row + kRowsInFlight);
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r >= rows.last) break;
      auto x = detail::bit_cast<Pack<T, kN>>(now[r]);
      if (biases) {  // else bits stay as they are, those of NaN too
        A y[kN];
        values_of(y, x);
#pragma unroll
        for (int i = 0; i < kN; ++i) y[i] += bias[i];
        x = pack_of<T, kN>(y);
      }
      store_pack(static_cast<T*>(p.out) + places.next() * p.out_stride + c, x);
    }
  }
}

// grad[r] = grad_out[the place of r],  partials[chunk] = its sum over the chunk's rows
template <class T, int kN>
__global__ void __launch_bounds__(kSlabThreads)
    pack_tokens_backward_kernel(const __grid_constant__ PackTokensBackwardParams p,
                                const __grid_constant__ RowChunks at) {
  using A = accumulate_t<T>;
  const PackShape& s = p.shape;
  const int64_t chunk = blockIdx.x / at.slabs;
  const SourceRows rows(s, chunk, at.chunk_rows);
  const int64_t pack = at.pack(), c = pack * kN;
  const unsigned threads = at.active_threads();
  if (threadIdx.x >= threads) return;
  OutputRows places(s, rows, threads);
  T* grad = static_cast<T*>(rows.is_full ? p.grad_full : p.grad_compressed) + c;
  A total[kN] = {};
  for (int64_t row = rows.first; row < rows.last; row += kRowsInFlight) {
    Pack<T, kN> g[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r >= rows.last) break;
      g[r] = load_pack_streaming<T, kN>(static_cast<const T*>(p.grad_out) + places.next() * s.hidden + c);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (row + r >= rows.last) break;
#pragma unroll
      for (int i = 0; i < kN; ++i) total[i] += value_of(g[r].at[i]);
      store_pack(grad + (row + r) * s.hidden, g[r]);
    }
  }
  store_values(static_cast<A*>(p.partials) + chunk * s.hidden + c, total);
}

// Chunks of both kinds of tiles, as rows for row_chunks.
int64_t chunked_rows(const PackShape& s, int64_t chunk_rows) {
  return (chunk_count(s.full_rows(), chunk_rows) + chunk_count(s.compressed_rows(), chunk_rows)) * chunk_rows;
}

bool has_aligned_rows(const PackShape& s, Dtype dtype) { return s.hidden * element_size(dtype) % 16 == 0; }

}  // namespace

void pack_tokens_cuda(const PackTokensParams& p, cudaStream_t stream) {
  const PackShape& s = p.shape;
  const int64_t chunk_rows = cuda_chunk_rows(s.rows(), s.hidden, p.dtype, kCudaForwardRows);
  const bool wide = has_aligned_rows(s, p.dtype) && is_aligned16(p.full) && is_aligned16(p.compressed) &&
                    is_aligned16(p.full_bias) && is_aligned16(p.compressed_bias) && is_aligned16(p.out) &&
                    p.out_stride * element_size(p.dtype) % 16 == 0;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = wide ? pack_tokens_kernel<T, kPackWidth<T>> : pack_tokens_kernel<T, 1>;
    launch_row_chunks(kernel, row_chunks(chunked_rows(s, chunk_rows), s.hidden, wide ? kPackWidth<T> : 1, chunk_rows),
                      stream, p);
  });
}

void pack_tokens_backward_cuda(const PackTokensBackwardParams& p, cudaStream_t stream) {
  const PackShape& s = p.shape;
  const bool wide = has_aligned_rows(s, p.dtype) && is_aligned16(p.grad_out) && is_aligned16(p.grad_full) &&
                    is_aligned16(p.grad_compressed) && is_aligned16(p.partials);
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = wide ? pack_tokens_backward_kernel<T, kPackWidth<T>> : pack_tokens_backward_kernel<T, 1>;
    launch_row_chunks(
        kernel, row_chunks(chunked_rows(s, p.chunk_rows), s.hidden, wide ? kPackWidth<T> : 1, p.chunk_rows), stream, p);
  });
}

}  // namespace vico
