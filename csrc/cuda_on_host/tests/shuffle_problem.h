// Problems for the shuffle kernels: odd shapes, strides, gathers, misaligned
// pointers, and the plain loops that say what comes out.
#pragma once

#include <vector>

#include "common/shuffle.h"
#include "common/tile_map.h"
#include "cuda_on_host/tests/harness.h"

namespace coh_test {

using coh::Buffer;
using coh::expect;
using vico::ShuffleShape;

enum class Gather { kNone, kSome, kRepeated, kEmpty };

struct ShuffleProblem {
  int64_t tiles, grid_h, grid_w, channels, rate, skip;
  bool transposed = false;
  Gather gather = Gather::kNone;
  int64_t token_padding = 0, tile_padding = 0;  // elements between tokens, tiles
  size_t offset = 0;                            // elements before the first, of every buffer
};

// Every branch of the kernels: packs of 16 bytes and single elements, rows of
// one pack and of thousands, tails.
inline const std::vector<ShuffleProblem>& shuffle_problems() {
  static const std::vector<ShuffleProblem> all = {
      {1, 1, 1, 1, 1, 0},
      {1, 2, 2, 8, 2, 0},
      {2, 4, 6, 16, 2, 1},
      {3, 4, 4, 24, 2, 1, false, Gather::kSome},
      {3, 4, 8, 8, 4, 1, true, Gather::kRepeated},
      {2, 6, 3, 5, 3, 2, true},
      {2, 4, 4, 7, 2, 1, false, Gather::kRepeated},
      {2, 4, 4, 16, 2, 1, false, Gather::kSome, 16, 48},
      {2, 4, 4, 16, 2, 1, false, Gather::kNone, 3, 5},
      {2, 4, 4, 16, 2, 1, false, Gather::kRepeated, 0, 0, 1},
      {2, 4, 4, 16, 2, 1, false, Gather::kEmpty},
      {0, 2, 2, 8, 2, 1},
      {1, 2, 2, 0, 2, 1},
      {1, 2, 4, 1000, 2, 1, false, Gather::kRepeated},
      {1, 4, 4, 2056, 4, 0},
      {1, 4, 4, 129, 4, 1},
      {1, 4, 4, 520, 4, 1, false, Gather::kRepeated},
      {6, 20, 24, 8, 2, 1, true, Gather::kSome},  // more rows than blocks that run at a time, or than chunks
      {6, 20, 20, 8, 2, 1, false, Gather::kRepeated},
  };
  return all;
}

template <class T>
struct ShuffleData {
  ShuffleProblem problem;
  ShuffleShape shape;
  std::vector<int64_t> host_index;
  vico::TileMap map;
  Buffer<int64_t> tile_index, tile_offsets, selected_tiles;
  Buffer<T> tokens;

  static std::vector<int64_t> index_of(const ShuffleProblem& p) {
    std::vector<int64_t> index;
    if (p.gather == Gather::kSome) {
      for (int64_t t = p.tiles - 1; t >= 0; t -= 2) index.push_back(t);
    } else if (p.gather == Gather::kRepeated) {
      for (int64_t i = 0; i < 3; ++i) index.push_back(p.tiles - 1);
      index.push_back(0);
    } else if (p.gather == Gather::kNone) {
      for (int64_t t = 0; t < p.tiles; ++t) index.push_back(t);
    }
    return index;
  }

  ShuffleData(const ShuffleProblem& p, coh::Random& random)
      : problem(p),
        host_index(index_of(p)),
        map(vico::invert_tile_index(host_index.data(), static_cast<int64_t>(host_index.size()), p.tiles)),
        tile_index(host_index.size()),
        tile_offsets(map.offsets.size()),
        selected_tiles(map.selected.size()),
        tokens(token_elements(p), p.offset) {
    for (size_t i = 0; i < host_index.size(); ++i) tile_index[i] = host_index[i];
    for (size_t i = 0; i < map.offsets.size(); ++i) tile_offsets[i] = map.offsets[i];
    for (size_t i = 0; i < map.selected.size(); ++i) selected_tiles[i] = map.selected[i];
    shape.tiles = p.tiles;
    shape.grid_h = p.grid_h;
    shape.grid_w = p.grid_w;
    shape.channels = p.channels;
    shape.rate = p.rate;
    shape.skip = p.skip;
    shape.token_stride = p.channels + p.token_padding;
    shape.tile_stride = tokens_per_tile() * shape.token_stride + p.tile_padding;
    shape.transposed = p.transposed;
    shape.selected = static_cast<int64_t>(host_index.size());
    shape.tile_index = p.gather == Gather::kNone ? nullptr : tile_index.data();
    // The skipped tokens and the padding stay NaN: a kernel that reads them
    // shows.
    for (int64_t t = 0; t < p.tiles; ++t) {
      for (int64_t n = p.skip; n < tokens_per_tile(); ++n) {
        for (int64_t c = 0; c < p.channels; ++c) {
          tokens[static_cast<size_t>(t * shape.tile_stride + n * shape.token_stride + c)] =
              coh::element_from<T>(random.normal());
        }
      }
    }
  }

  static size_t token_elements(const ShuffleProblem& p) {
    const int64_t tile = (p.skip + p.grid_h * p.grid_w) * (p.channels + p.token_padding) + p.tile_padding;
    // Nothing behind the last tile's last channel: reading on is out of bounds.
    const int64_t all = p.tiles * tile - p.tile_padding - p.token_padding;
    return p.tiles > 0 && all > 0 ? static_cast<size_t>(all) : 0;
  }
  int64_t tokens_per_tile() const { return problem.skip + problem.grid_h * problem.grid_w; }
  int64_t rows() const { return shape.selected * shape.out_tokens(); }
  bool has_map() const { return problem.gather != Gather::kNone; }

  // The ViT token, counted in its tile, and channel behind element e of output
  // token t: straight from the definition.
  void source(int64_t t, int64_t e, int64_t& token, int64_t& channel) const {
    const int64_t h = problem.transposed ? t % shape.out_h() : t / shape.out_w();
    const int64_t w = problem.transposed ? t / shape.out_h() : t % shape.out_w();
    const int64_t k = e / problem.channels, i = k / problem.rate, j = k % problem.rate;
    channel = e % problem.channels;
    token = problem.skip + (problem.rate * h + i) * problem.grid_w + problem.rate * w + j;
  }
  T input(int64_t row, int64_t e) const {
    int64_t token, channel;
    source(row % shape.out_tokens(), e, token, channel);
    const int64_t tile = host_index[static_cast<size_t>(row / shape.out_tokens())];
    return tokens[static_cast<size_t>(tile * shape.tile_stride + token * shape.token_stride + channel)];
  }
  // The same place in a contiguous [tiles, tokens, channels].
  size_t dense_place(int64_t row, int64_t e) const {
    int64_t token, channel;
    source(row % shape.out_tokens(), e, token, channel);
    const int64_t tile = host_index[static_cast<size_t>(row / shape.out_tokens())];
    return static_cast<size_t>((tile * tokens_per_tile() + token) * problem.channels + channel);
  }
  size_t dense_size() const { return static_cast<size_t>(problem.tiles * tokens_per_tile() * problem.channels); }
};

template <class Fn>
void for_every_problem(uint64_t seed, const Fn& fn) {
  coh::Random random(seed);
  int number = 0;
  for (const ShuffleProblem& p : shuffle_problems()) {
    try {
      fn(p, random);
    } catch (const std::exception& e) {
      throw std::runtime_error("problem " + std::to_string(number) + ": " + e.what());
    }
    ++number;
  }
}

template <class T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size() == b.size() &&
         !std::memcmp(static_cast<const void*>(a.data()), static_cast<const void*>(b.data()), a.size() * sizeof(T));
}

}  // namespace coh_test
