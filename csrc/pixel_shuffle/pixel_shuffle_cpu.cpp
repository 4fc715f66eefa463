// CPU kernels of pixel_shuffle: runs of `rate` neighbouring tokens are copied whole.
#include <cstring>

#include "common/vec.h"
#include "pixel_shuffle/pixel_shuffle.h"

namespace vico::VICO_CPU_ARCH {

void pixel_shuffle(const PixelShuffleParams& p, int64_t begin, int64_t end) {
  const ShuffleShape& s = p.shape;
  const int64_t token_bytes = s.channels * p.element_size;
  // One row of a block is `rate` tokens: one run of memory where tokens follow each other.
  const bool dense = s.token_stride == s.channels;
  const int64_t run = dense ? s.rate : 1, run_bytes = run * token_bytes;
  char* out = p.out + begin * s.rate * s.rate * token_bytes;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t tile = s.source_tile(m / s.out_tokens());
    const char* block = p.tokens + (tile * s.tile_stride + s.block_offset(m % s.out_tokens())) * p.element_size;
    for (int64_t i = 0; i < s.rate; ++i) {
      const char* row = block + s.row_offset(i) * p.element_size;
      for (int64_t j = 0; j < s.rate; j += run, out += run_bytes) {
        std::memcpy(out, row + j * s.token_stride * p.element_size, run_bytes);
      }
    }
  }
}

namespace {

// grad_tokens[t, skip + y * grid_w + x, :] = sum over the output tiles made of tile t of their token's (i, j) slice.
template <class T>
void backward_row(const PixelShuffleBackwardParams& p, int64_t tile, int64_t y) {
  const ShuffleShape& s = p.shape;
  const int64_t first = p.tile_offsets[tile], last = p.tile_offsets[tile + 1];
  T* row =
      static_cast<T*>(p.grad_tokens) + (tile * (s.skip + s.grid_h * s.grid_w) + s.skip + y * s.grid_w) * s.channels;
  if (first == last) {
    std::memset(row, 0, s.grid_w * s.channels * sizeof(T));
    return;
  }
  const int64_t h = y / s.rate, i = y % s.rate, run = s.rate * s.channels;
  for (int64_t w = 0; w < s.out_w(); ++w, row += run) {
    const int64_t token = s.transposed ? w * s.out_h() + h : h * s.out_w() + w;
    const auto slice = [&](int64_t k) {
      return static_cast<const T*>(p.grad_out) + (p.selected_tiles[k] * s.out_tokens() + token) * s.out_channels() +
             i * run;
    };
    if (last - first == 1) {
      std::memcpy(row, slice(first), run * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < run; c += kWidth<T>) {
      auto total = load_n(slice(first) + c, run - c);
      for (int64_t k = first + 1; k < last; ++k) total += load_n(slice(k) + c, run - c);
      store_n(row + c, total, run - c);
    }
  }
}

}  // namespace

void pixel_shuffle_backward(const PixelShuffleBackwardParams& p, int64_t begin, int64_t end) {
  const ShuffleShape& s = p.shape;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t tile = r / (1 + s.grid_h), y = r % (1 + s.grid_h) - 1;
      if (y >= 0) {
        backward_row<T>(p, tile, y);
      } else {
        T* skipped = static_cast<T*>(p.grad_tokens) + tile * (s.skip + s.grid_h * s.grid_w) * s.channels;
        std::memset(skipped, 0, s.skip * s.channels * sizeof(T));
      }
    }
  });
}

}  // namespace vico::VICO_CPU_ARCH
