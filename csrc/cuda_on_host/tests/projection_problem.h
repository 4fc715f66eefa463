// Problems for the projection kernels, and the plain loops in fp64 that say what comes out.
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "common/philox.h"
#include "cuda_on_host/tests/shuffle_problem.h"
#include "projection/projection.h"

namespace coh_test {

// One group of rows. Of a view, rows and depth are what the shuffle gives.
struct GroupProblem {
  int64_t tiles = 1, tile_rows = 1, columns = 1, depth = 1;
  bool bias = false, gelu = false;
  double dropout = 0;
  bool mapped = false;   // rows go to places of their own, tile by tile
  bool ordered = false;  // and the places are those of other tiles
  bool folded = false;   // LayerNorm
  int64_t a_padding = 0, out_padding = 0;
  size_t offset = 0;  // elements before the first, of every buffer
  std::optional<ShuffleProblem> view = std::nullopt;
};

template <class T>
class GroupData {
 public:
  GroupData(const GroupProblem& problem, coh::Random& random)
      : q_(problem), tokens_(problem.view.value_or(ShuffleProblem{0, 1, 1, 1, 1, 0}), random) {
    const ShuffleShape& s = tokens_.shape;
    rows_ = q_.view ? tokens_.rows() : q_.tiles * q_.tile_rows;
    depth_ = q_.view ? s.out_channels() : q_.depth;
    if (q_.view) q_.tile_rows = s.out_tokens();
    const int64_t a_stride = depth_ + q_.a_padding, out_stride = q_.columns + q_.out_padding;
    a_ = buffer<T>(q_.view || rows_ == 0 ? 0 : (rows_ - 1) * a_stride + depth_);
    for (int64_t m = 0; m < rows_ && !q_.view; ++m) fill(*a_, m * a_stride, depth_, random, 1, q_.folded ? 0.5 : 0);
    weight_ = buffer<T>(q_.columns * depth_);
    fill(*weight_, 0, q_.columns * depth_, random, 1 / std::sqrt(static_cast<double>(depth_) + 1));
    bias_ = floats(q_.columns, random);
    gain_sum_ = floats(q_.columns, random);
    mean_ = floats(rows_, random);
    rstd_ = floats(rows_, random);
    const int64_t tiles = q_.tile_rows ? rows_ / q_.tile_rows : 0;
    out_row_ = std::make_unique<Buffer<int64_t>>(static_cast<size_t>(tiles));
    out_tile_ = std::make_unique<Buffer<int64_t>>(static_cast<size_t>(tiles));
    for (int64_t t = 0; t < tiles; ++t) (*out_tile_)[at(t)] = (t + 1) % tiles;
    // From the last place to the first, with a free row before each tile's.
    for (int64_t t = 0; t < tiles; ++t) (*out_row_)[static_cast<size_t>(t)] = (tiles - 1 - t) * (q_.tile_rows + 1) + 1;
    out_ = buffer<T>((rows_ + (q_.mapped ? tiles : 0)) * out_stride);

    g.rows = rows_;
    g.columns = q_.columns;
    g.depth = depth_;
    g.a = q_.view ? tokens_.tokens.data() : a_->data();
    g.a_stride = a_stride;
    g.shuffled = q_.view.has_value();
    g.shape = s;
    g.weight = weight_->data();
    if (q_.bias) g.bias = bias_->data();
    if (q_.folded) {
      g.mean = mean_->data();
      g.rstd = rstd_->data();
      g.gain_sum = gain_sum_->data();
    }
    g.gelu = q_.gelu;
    if (q_.dropout > 0) {
      g.mask.active = true;
      g.mask.seed = random.bits();
      g.mask.keep_below = static_cast<uint32_t>((1 - q_.dropout) * 4294967296.0);
      g.mask.scale = 1 / (1 - q_.dropout);
    }
    g.out = out_->data();
    g.out_stride = out_stride;
    g.out_rows = out_stride ? static_cast<int64_t>(out_->size()) / out_stride : 0;
    if (q_.mapped) g.out_row = out_row_->data();
    if (q_.mapped && q_.ordered) g.out_tile = out_tile_->data();
    g.out_tiles = tiles;
    g.tile_rows = std::max<int64_t>(1, q_.tile_rows);
  }

  void check() {
    const int64_t stride = q_.columns + q_.out_padding;
    std::vector<bool> written(out_->size());
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t t = m / q_.tile_rows, tile = q_.ordered ? (*out_tile_)[at(t)] : t;
      const int64_t place = q_.mapped ? (*out_row_)[at(tile)] + m % q_.tile_rows : m;
      for (int64_t n = 0; n < q_.columns; ++n) {
        const size_t i = at(place * stride + n);
        written[i] = true;
        const double got = coh::element_value((*out_)[i]);
        double error;
        const double wanted = element(m, n, error);
        expect(std::fabs(got - wanted) <= error, "row %lld column %lld is %g, not %g", static_cast<long long>(m),
               static_cast<long long>(n), got, wanted);
      }
    }
    for (size_t i = 0; i < written.size(); ++i) {
      expect(written[i] || (*out_)[i].bits == 0xffff, "element %zu of the output was written", i);
    }
  }

  vico::ProjectionGroup g;

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  template <class E>
  std::unique_ptr<Buffer<E>> buffer(int64_t size) const {
    return std::make_unique<Buffer<E>>(at(size), q_.offset);
  }
  std::unique_ptr<Buffer<float>> floats(int64_t size, coh::Random& random) const {
    auto b = std::make_unique<Buffer<float>>(at(size));
    coh::fill_normal(*b, random);
    return b;
  }
  static void fill(Buffer<T>& b, int64_t first, int64_t count, coh::Random& random, double scale, double shift = 0) {
    for (int64_t i = first; i < first + count; ++i) b[at(i)] = coh::element_from<T>(shift + scale * random.normal());
  }

  // What element (m, n) must be, and how far off it may be: roundings of the sum, of what follows, and of the output.
  double element(int64_t m, int64_t n, double& error) const {
    double z = 0, size = 0;
    for (int64_t k = 0; k < depth_; ++k) {
      const T a = q_.view ? tokens_.input(m, k) : (*a_)[at(m * g.a_stride + k)];
      const double product = coh::element_value(a) * coh::element_value((*weight_)[at(n * depth_ + k)]);
      z += product;
      size += std::fabs(product);
    }
    if (q_.folded) {
      const double shift = double{(*mean_)[at(m)]} * (*gain_sum_)[at(n)], rstd = (*rstd_)[at(m)];
      z = rstd * (z - shift);
      size = std::fabs(rstd) * (size + std::fabs(shift));
    }
    if (q_.bias) z += (*bias_)[at(n)];
    size += std::fabs(z);
    if (q_.gelu) z *= 0.5 * std::erfc(-z / std::sqrt(2.0));
    if (q_.dropout > 0) z *= is_kept(m * q_.columns + n) ? g.mask.scale : 0;
    error = 1.01 * coh::kEpsilon<T> * std::fabs(z) + (static_cast<double>(depth_) / 8 + 16) * 0x1p-24 * size + 0x1p-25;
    return z;
  }
  bool is_kept(int64_t e) const {
    const uint64_t counter = static_cast<uint64_t>(e / 32 * 8 + e % 8);
    uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
    vico::philox4x32_10(words, g.mask.seed);
    return words[e % 32 / 8] < g.mask.keep_below;
  }

  GroupProblem q_;
  int64_t rows_, depth_;
  ShuffleData<T> tokens_;
  std::unique_ptr<Buffer<T>> a_, weight_, out_;
  std::unique_ptr<Buffer<float>> bias_, gain_sum_, mean_, rstd_;
  std::unique_ptr<Buffer<int64_t>> out_row_, out_tile_;
};

using Projection = void (*)(const vico::ProjectionParams&, cudaStream_t);

template <class T>
void project(Projection kernel, const std::vector<GroupProblem>& groups, uint64_t seed = 1) {
  coh::Random random(seed);
  std::deque<GroupData<T>> data;
  vico::ProjectionParams p;
  p.dtype = std::is_same_v<T, vico::Half> ? vico::Dtype::kHalf : vico::Dtype::kBFloat16;
  for (size_t i = 0; i < groups.size(); ++i) {
    data.emplace_back(groups[i], random);
    p.group[i] = data.back().g;
  }
  kernel(p, nullptr);
  for (GroupData<T>& d : data) d.check();
}

}  // namespace coh_test
