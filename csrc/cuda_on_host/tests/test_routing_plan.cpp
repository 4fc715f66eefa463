// The CUDA kernels of routing_plan against sorting and plain loops: every decision is equal.
#include <numeric>

#include "cuda_on_host/tests/decisions.h"
#include "routing_plan/routing_plan_cuda.cu"

namespace {

using namespace coh_test;

// Probabilities with ties, zeros of both signs and both ends of the range.
template <class T>
std::vector<T> probabilities(int64_t tiles, coh::Random& random) {
  std::vector<T> p;
  const int64_t kind = random.below(3), distinct = 1 + tiles / 3;
  for (int64_t t = 0; t < tiles; ++t) {
    double x = random.uniform();
    if (kind == 1) x = 0.5 + 1e-3 * static_cast<double>(random.below(distinct));
    if (kind == 2) x = std::vector<double>{0.0, -0.0, 1.0, 0.5}[static_cast<size_t>(random.below(4))];
    p.push_back(coh::element_from<T>(x));
  }
  return p;
}

template <class T>
void put(Buffer<T>& to, const std::vector<T>& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
}

template <class T>
void widen() {
  coh::Random random(1);
  for (int64_t tiles : {0, 1, 300}) {
    const std::vector<T> values = probabilities<T>(tiles, random);
    Buffer<T> p(values.size(), 1);
    Buffer<vico::accumulate_t<T>> out(values.size(), 1);
    put(p, values);
    const auto run = [&] {
      vico::widen_probabilities_cuda({kDtype<T>, true, tiles, p.data(), out.data(), nullptr}, nullptr);
    };
    run();
    for (size_t t = 0; t < values.size(); ++t) {
      expect(static_cast<double>(out[t]) == coh::element_value(values[t]), "tile %zu", t);
    }
    if (tiles == 0) continue;
    p[values.size() - 1] = coh::element_from<T>(std::nan(""));
    expect_refusal(run, "got NaN for tile");
    p[values.size() - 1] = coh::element_from<T>(1.5);
    expect_refusal(run, "in [0, 1], got 1.5 for tile");
  }
}

template <class T>
void quantile() {
  using A = vico::accumulate_t<T>;
  coh::Random random(2);
  const std::vector<std::vector<int64_t>> problems = {{0}, {1}, {2, 0, 1}, {40, 3, 700}, {1500}};
  for (const std::vector<int64_t>& sizes : problems) {
    for (double relative : {0.0, 0.3, 0.5, 0.999, 1.0}) {
      std::vector<int64_t> offsets = {0};
      for (int64_t n : sizes) offsets.push_back(offsets.back() + n);
      const int64_t tiles = offsets.back();
      const size_t segments = sizes.size();
      const std::vector<T> values = probabilities<T>(tiles, random);
      Buffer<T> p(values.size(), 1);
      Buffer<int64_t> cu_tiles(offsets.size());
      Buffer<A> below(segments), above(segments), weight(segments), quantile(segments);
      Buffer<unsigned char> compress(values.size(), 1);
      put(p, values);
      fill(cu_tiles, offsets);
      vico::QuantileParams params;
      params.dtype = kDtype<T>;
      params.tiles = tiles;
      params.segments = static_cast<int64_t>(segments);
      params.cu_tiles = segments == 1 ? nullptr : cu_tiles.data();
      params.relative = relative;
      params.absolute = 0.4;
      params.p = p.data();
      params.below = below.data();
      params.above = above.data();
      params.weight = weight.data();
      params.quantile = quantile.data();
      params.compress = compress.data();
      vico::quantile_neighbors_cuda(params, nullptr);
      std::vector<int> wanted;
      for (size_t s = 0; s < segments && tiles > 0; ++s) {
        std::vector<A> sorted;
        for (int64_t t = offsets[s]; t < offsets[s + 1]; ++t) {
          sorted.push_back(static_cast<A>(coh::element_value(values[static_cast<size_t>(t)])));
        }
        std::vector<A> x = sorted;
        std::sort(sorted.begin(), sorted.end());
        A lower = 0, upper = 0, share = 0;
        if (!sorted.empty()) {
          const A rank = static_cast<A>(relative) * static_cast<A>(sorted.size() - 1);
          lower = sorted[static_cast<size_t>(std::floor(rank))];
          upper = sorted[static_cast<size_t>(std::ceil(rank))];
          share = rank - std::floor(rank);
        }
        expect(below[s] == lower && above[s] == upper && weight[s] == share, "segment %zu: %g %g %g, wanted %g %g %g",
               s, static_cast<double>(below[s]), static_cast<double>(above[s]), static_cast<double>(weight[s]),
               static_cast<double>(lower), static_cast<double>(upper), static_cast<double>(share));
        quantile[s] = lower + share * (upper - lower);
        for (A v : x) wanted.push_back(v > quantile[s] && v >= static_cast<A>(0.4));
      }
      vico::route_segments_cuda(params, nullptr);
      expect_equal(compress, wanted, "compress");
    }
  }
}

template <class T>
void budget() {
  coh::Random random(3);
  for (int64_t tiles : {0, 1, 2, 33, 700, 5000}) {
    const std::vector<T> values = probabilities<T>(tiles, random);
    Buffer<T> p(values.size(), 1);
    put(p, values);
    std::vector<size_t> ranked(values.size());
    std::iota(ranked.begin(), ranked.end(), size_t{0});
    std::stable_sort(ranked.begin(), ranked.end(),
                     [&](size_t a, size_t b) { return coh::element_value(values[a]) > coh::element_value(values[b]); });
    for (int64_t count : {int64_t{0}, (tiles + 1) / 3, tiles}) {
      Buffer<unsigned char> compress(values.size(), 1);
      std::vector<int> wanted(values.size(), 0);
      for (int64_t i = 0; i < count; ++i) wanted[ranked[static_cast<size_t>(i)]] = 1;
      vico::budget_route_cuda({kDtype<T>, tiles, count, p.data(), compress.data()}, nullptr);
      expect_equal(compress, wanted, "compress");
    }
  }
}

}  // namespace

COH_CASE(widen_bfloat16) { widen<vico::BFloat16>(); }
COH_CASE(widen_half) { widen<vico::Half>(); }
COH_CASE(widen_float) { widen<float>(); }
COH_CASE(widen_double) { widen<double>(); }
COH_CASE(quantile_bfloat16) { quantile<vico::BFloat16>(); }
COH_CASE(quantile_half) { quantile<vico::Half>(); }
COH_CASE(quantile_float) { quantile<float>(); }
COH_CASE(quantile_double) { quantile<double>(); }
COH_CASE(budget_bfloat16) { budget<vico::BFloat16>(); }
COH_CASE(budget_half) { budget<vico::Half>(); }
COH_CASE(budget_float) { budget<float>(); }
COH_CASE(budget_double) { budget<double>(); }

COH_CASE(plan) {
  coh::Random random(4);
  for (int64_t tiles : {0, 1, 2, 33, 700, 5000}) {
    std::vector<int> mask;
    for (int64_t t = 0; t < tiles; ++t) mask.push_back(random.below(3) == 0);
    std::vector<int64_t> offsets = {0}, order;
    for (int compressed : mask) offsets.push_back(offsets.back() + (compressed ? 64 : 256));
    for (int wanted : {0, 1}) {
      for (int64_t t = 0; t < tiles; ++t) {
        if (mask[static_cast<size_t>(t)] == wanted) order.push_back(t);
      }
    }
    Buffer<unsigned char> compress(mask.size(), 1);
    Buffer<int64_t> cu_tokens(offsets.size()), got(order.size());
    fill(compress, mask);
    vico::plan_tokens_cuda({tiles, 256, 64, compress.data(), cu_tokens.data(), got.data()}, nullptr);
    expect_equal(cu_tokens, offsets, "cu_tokens");
    expect_equal(got, order, "order");
  }
}

COH_CASE(bad_segments) {
  Buffer<float> p(3), out(4);
  for (size_t t = 0; t < 3; ++t) p[t] = 0.5f;
  const auto run = [&](const std::vector<int64_t>& offsets) {
    Buffer<int64_t> cu_tiles(offsets.size());
    fill(cu_tiles, offsets);
    vico::QuantileParams params;
    params.tiles = 3;
    params.segments = static_cast<int64_t>(offsets.size()) - 1;
    params.cu_tiles = cu_tiles.data();
    params.p = p.data();
    params.below = params.above = params.weight = out.data();
    vico::quantile_neighbors_cuda(params, nullptr);
  };
  expect_refusal([&] { run({0, 2}); }, "end with the number of tiles (3), got 0 and 2");
  expect_refusal([&] { run({1, 3}); }, "end with the number of tiles (3), got 1 and 3");
  expect_refusal([&] { run({0, 5, 3}); }, "cu_tiles must not decrease, got 5 then 3 at position 1");
  expect_refusal([&] { run({0, 2, 1, 3}); }, "cu_tiles must not decrease, got 2 then 1 at position 1");
  p[1] = std::nanf("");
  expect_refusal([&] { run({0, 0, 3}); }, "got NaN for tile 1");
}

COH_MAIN
