// The CUDA kernels of pixel_shuffle against its definition: bit-equal, except
// for sums of tiles selected repeatedly.
#include "common/tile_map_cuda.cu"
#include "cuda_on_host/tests/shuffle_problem.h"
#include "pixel_shuffle/pixel_shuffle_cuda.cu"

namespace {

using namespace coh_test;

template <class T>
constexpr vico::Dtype kDtype = std::is_same_v<T, double>           ? vico::Dtype::kDouble
                               : std::is_same_v<T, float>          ? vico::Dtype::kFloat
                               : std::is_same_v<T, vico::BFloat16> ? vico::Dtype::kBFloat16
                                                                   : vico::Dtype::kHalf;

template <class T>
void forward() {
  for_every_problem(1, [](const ShuffleProblem& problem, coh::Random& random) {
    ShuffleData<T> d(problem, random);
    const int64_t channels = d.shape.out_channels();
    Buffer<T> out(static_cast<size_t>(d.rows() * channels), problem.offset);
    vico::PixelShuffleParams p;
    p.shape = d.shape;
    p.element_size = sizeof(T);
    p.tokens = reinterpret_cast<const char*>(d.tokens.data());
    p.out = reinterpret_cast<char*>(out.data());
    vico::pixel_shuffle_cuda(p, nullptr);
    for (int64_t m = 0; m < d.rows(); ++m) {
      for (int64_t e = 0; e < channels; ++e) {
        const T wanted = d.input(m, e), got = out[static_cast<size_t>(m * channels + e)];
        expect(!std::memcmp(&wanted, &got, sizeof(T)), "row %lld element %lld", static_cast<long long>(m),
               static_cast<long long>(e));
      }
    }
  });
}

template <class T>
void backward() {
  for_every_problem(2, [](const ShuffleProblem& problem, coh::Random& random) {
    ShuffleData<T> d(problem, random);
    const int64_t channels = d.shape.out_channels();
    Buffer<T> grad_out(static_cast<size_t>(d.rows() * channels), problem.offset), grad(d.dense_size(), problem.offset);
    coh::fill_normal(grad_out, random);
    vico::PixelShuffleBackwardParams p;
    p.shape = d.shape;
    p.dtype = kDtype<T>;
    p.grad_out = grad_out.data();
    p.grad_tokens = grad.data();
    if (d.has_map()) {
      p.tile_offsets = d.tile_offsets.data();
      p.selected_tiles = d.selected_tiles.data();
    }
    vico::pixel_shuffle_backward_cuda(p, nullptr);
    std::vector<double> wanted(grad.size()), size(grad.size());
    for (int64_t m = 0; m < d.rows(); ++m) {
      for (int64_t e = 0; e < channels; ++e) {
        const double g = coh::element_value(grad_out[static_cast<size_t>(m * channels + e)]);
        wanted[d.dense_place(m, e)] += g;
        size[d.dense_place(m, e)] += std::fabs(g);
      }
    }
    const bool exact = problem.gather != Gather::kRepeated;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double error = std::fabs(coh::element_value(grad[i]) - wanted[i]);
      expect(error <= (exact ? 0 : 4 * coh::kEpsilon<T> * size[i]), "gradient %zu is off by %g", i, error);
    }
  });
}

// Up to several blocks of threads and rounds through shared memory, against the map that the CPU makes.
void tile_map() {
  coh::Random random(3);
  for (const auto& [tiles, count] : {std::pair<int64_t, int64_t>{0, 0}, {1, 0}, {1, 1}, {3, 7}, {300, 20}, {5, 600}}) {
    std::vector<int64_t> index;
    Buffer<int64_t> device_index(static_cast<size_t>(count)), offsets(static_cast<size_t>(tiles + 1));
    Buffer<int64_t> selected(static_cast<size_t>(count));
    for (int64_t s = 0; s < count; ++s) {
      index.push_back(random.below(tiles));
      device_index[static_cast<size_t>(s)] = index.back();
    }
    vico::tile_map_cuda({tiles, count, device_index.data(), offsets.data(), selected.data()}, nullptr);
    const vico::TileMap wanted = vico::invert_tile_index(index.data(), count, tiles);
    for (size_t t = 0; t < wanted.offsets.size(); ++t) expect(offsets[t] == wanted.offsets[t], "offset %zu", t);
    for (size_t s = 0; s < wanted.selected.size(); ++s) expect(selected[s] == wanted.selected[s], "place %zu", s);
  }
}

void bad_tile_index() {
  Buffer<int64_t> index(1), offsets(3), selected(1);
  index[0] = 2;
  std::string error;
  try {
    vico::tile_map_cuda({2, 1, index.data(), offsets.data(), selected.data()}, nullptr);
  } catch (const std::exception& e) {
    error = e.what();
  }
  expect(error.find("tile_index must lie in [0, 2), got 2 at position 0") != std::string::npos, "%s", error.c_str());
}

}  // namespace

COH_CASE(tile_map) { tile_map(); }
COH_CASE(bad_tile_index) { bad_tile_index(); }
COH_CASE(forward_bfloat16) { forward<vico::BFloat16>(); }
COH_CASE(forward_half) { forward<vico::Half>(); }
COH_CASE(forward_float) { forward<float>(); }
COH_CASE(forward_double) { forward<double>(); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }

COH_MAIN
