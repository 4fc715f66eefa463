// The CUDA kernels of normalized_shuffle against plain loops in double, and
// against themselves: two runs are bit-equal whatever the scheduler does.
#include "common/column_sum_cuda.cu"
#include "cuda_on_host/tests/shuffle_problem.h"
#include "normalized_shuffle/normalized_shuffle_cuda.cu"

namespace {

using namespace coh_test;
using vico::accumulate_t;

template <class T>
constexpr vico::Dtype kDtype = std::is_same_v<T, double>           ? vico::Dtype::kDouble
                               : std::is_same_v<T, float>          ? vico::Dtype::kFloat
                               : std::is_same_v<T, vico::BFloat16> ? vico::Dtype::kBFloat16
                                                                   : vico::Dtype::kHalf;
constexpr double kEps = 1e-5;

template <class T>
struct Norm : ShuffleData<T> {
  using A = accumulate_t<T>;
  int64_t channels;
  Buffer<A> weight, bias, mean, rstd;
  bool element_parameters;  // weight and bias are given in T, and those above are their values
  Buffer<T> element_weight, element_bias;

  Norm(const ShuffleProblem& p, coh::Random& random)
      : ShuffleData<T>(p, random),
        channels(this->shape.out_channels()),
        weight(static_cast<size_t>(channels), p.offset),
        bias(static_cast<size_t>(channels), p.offset),
        mean(static_cast<size_t>(this->rows())),
        rstd(static_cast<size_t>(this->rows())),
        element_parameters(sizeof(T) == 2 && p.tiles % 2 == 0),
        element_weight(element_parameters ? weight.size() : 0, p.offset),
        element_bias(element_parameters ? weight.size() : 0, p.offset) {
    coh::fill_normal(weight, random, 0.5, 1);
    coh::fill_normal(bias, random);
    if (!element_parameters) return;
    coh::fill_normal(element_weight, random, 0.5, 1);
    coh::fill_normal(element_bias, random);
    for (size_t c = 0; c < weight.size(); ++c) {
      weight[c] = static_cast<A>(coh::element_value(element_weight[c]));
      bias[c] = static_cast<A>(coh::element_value(element_bias[c]));
    }
  }

  vico::NormalizedShuffleParams params() {
    vico::NormalizedShuffleParams p;
    p.shape = this->shape;
    p.dtype = kDtype<T>;
    p.eps = kEps;
    p.tokens = this->tokens.data();
    p.mean = mean.data();
    p.rstd = rstd.data();
    return p;
  }
  void run_statistics() { vico::normalized_shuffle_cuda(params(), nullptr); }
  void run(Buffer<T>& out) {
    vico::NormalizedShuffleParams p = params();
    p.weight = weight_data();
    p.bias = element_parameters ? static_cast<const void*>(element_bias.data()) : bias.data();
    p.element_parameters = element_parameters;
    p.out = out.data();
    vico::normalized_shuffle_cuda(p, nullptr);
  }
  const void* weight_data() const {
    return element_parameters ? static_cast<const void*>(element_weight.data()) : weight.data();
  }
  void exact_statistics(int64_t m, double& mu, double& rs) const {
    double sum = 0, squares = 0;
    for (int64_t e = 0; e < channels; ++e) sum += coh::element_value(this->input(m, e));
    mu = sum / static_cast<double>(channels);
    for (int64_t e = 0; e < channels; ++e) squares += std::pow(coh::element_value(this->input(m, e)) - mu, 2);
    rs = 1 / std::sqrt(squares / static_cast<double>(channels) + kEps);
  }
};

// How far results may be off: the element type's rounding of a result, and sums
// of `terms` in the sum type.
template <class T>
double allowed(double result, double magnitude, double terms) {
  const double sum_epsilon = coh::kEpsilon<accumulate_t<T>>;
  return 2 * coh::kEpsilon<T> * std::fabs(result) + 8 * sum_epsilon * (1 + std::sqrt(terms)) * magnitude;
}

void expect_close(const char* what, size_t i, double got, double wanted, double tolerance) {
  expect(std::fabs(got - wanted) <= tolerance, "%s %zu is %.9g, not %.9g", what, i, got, wanted);
}

template <class T>
void check_statistics(const Norm<T>& d) {
  const double n = static_cast<double>(d.channels);
  for (int64_t m = 0; m < d.rows() && d.channels; ++m) {
    double mu, rs;
    d.exact_statistics(m, mu, rs);
    expect_close("mean", static_cast<size_t>(m), static_cast<double>(d.mean[static_cast<size_t>(m)]), mu,
                 allowed<double>(0, 0, 0) + 8 * coh::kEpsilon<accumulate_t<T>> * (1 + std::sqrt(n)));
    expect_close("rstd", static_cast<size_t>(m), static_cast<double>(d.rstd[static_cast<size_t>(m)]), rs,
                 8 * coh::kEpsilon<accumulate_t<T>> * (1 + std::sqrt(n)) * rs * (1 + rs));
  }
}

// Without a result, and without weight and bias: the bits that come with one.
template <class T>
void statistics() {
  for_every_problem(5, [](const ShuffleProblem& problem, coh::Random& random) {
    Norm<T> d(problem, random);
    d.run_statistics();
    check_statistics(d);
    Buffer<accumulate_t<T>> mean(d.mean.size()), rstd(d.rstd.size());
    for (size_t m = 0; m < mean.size(); ++m) {
      mean[m] = d.mean[m];
      rstd[m] = d.rstd[m];
    }
    Buffer<T> out(static_cast<size_t>(d.rows() * d.channels), problem.offset);
    d.run(out);
    expect(d.channels == 0 || (same_bits(mean, d.mean) && same_bits(rstd, d.rstd)), "the statistics alone differ");
  });
}

template <class T>
void forward() {
  for_every_problem(3, [](const ShuffleProblem& problem, coh::Random& random) {
    Norm<T> d(problem, random);
    Buffer<T> out(static_cast<size_t>(d.rows() * d.channels), problem.offset);
    d.run(out);
    check_statistics(d);
    const double n = static_cast<double>(d.channels);
    for (int64_t m = 0; m < d.rows() && d.channels; ++m) {
      double mu, rs;
      d.exact_statistics(m, mu, rs);
      for (int64_t e = 0; e < d.channels; ++e) {
        const size_t c = static_cast<size_t>(e), i = static_cast<size_t>(m * d.channels + e);
        const double w = static_cast<double>(d.weight[c]), h = (coh::element_value(d.input(m, e)) - mu) * rs;
        const double wanted = h * w + static_cast<double>(d.bias[c]);
        const double magnitude = std::fabs(w) * (1 + std::fabs(h)) * (1 + rs) + std::fabs(wanted);
        expect_close("output", i, coh::element_value(out[i]), wanted, allowed<T>(wanted, magnitude, n));
      }
    }
  });
}

template <class T>
struct Gradients {
  Buffer<T> tokens;
  Buffer<accumulate_t<T>> weight, bias;
  explicit Gradients(const Norm<T>& d)
      : tokens(d.dense_size(), d.problem.offset),
        weight(static_cast<size_t>(d.channels)),
        bias(static_cast<size_t>(d.channels)) {}
};

template <class T>
void run_backward(Norm<T>& d, const Buffer<T>& grad_out, Gradients<T>& g, bool need_grad_tokens) {
  using A = accumulate_t<T>;
  vico::NormalizedShuffleBackwardParams p;
  p.shape = d.shape;
  p.dtype = kDtype<T>;
  p.grad_out = grad_out.data();
  p.tokens = d.tokens.data();
  p.weight = d.weight_data();
  p.element_parameters = d.element_parameters;
  p.mean = d.mean.data();
  p.rstd = d.rstd.data();
  p.grad_tokens = need_grad_tokens ? g.tokens.data() : nullptr;
  if (d.has_map()) {
    p.tile_offsets = d.tile_offsets.data();
    p.selected_tiles = d.selected_tiles.data();
  }
  const auto plan = vico::plan_normalized_shuffle_backward(p);
  Buffer<A> partials(static_cast<size_t>(plan.chunks * 2 * d.channels)), means(static_cast<size_t>(plan.row_means));
  p.partials = partials.data();
  p.row_means = means.data();
  vico::normalized_shuffle_backward_cuda(p, nullptr);
  for (int half = 0; half < 2; ++half) {
    vico::ColumnSumParams sum;
    sum.dtype = std::is_same_v<A, double> ? vico::Dtype::kDouble : vico::Dtype::kFloat;
    sum.columns = d.channels;
    sum.chunks = plan.chunks;
    sum.chunk_stride = 2 * d.channels;
    sum.partials = partials.data() + half * d.channels;
    sum.out = half ? g.bias.data() : g.weight.data();
    vico::combine_chunks_cuda(sum, nullptr);
  }
}

template <class T>
void check_backward(const Norm<T>& d, const Buffer<T>& grad_out, const Gradients<T>& g, bool need_grad_tokens) {
  const size_t channels = static_cast<size_t>(d.channels);
  const double n = static_cast<double>(d.channels);
  std::vector<double> grad_x(d.dense_size()), size_x(d.dense_size());
  std::vector<double> grad_w(channels), size_w(channels), grad_b(channels), size_b(channels);
  for (int64_t m = 0; m < d.rows(); ++m) {
    const double mu = static_cast<double>(d.mean[static_cast<size_t>(m)]),
                 rs = static_cast<double>(d.rstd[static_cast<size_t>(m)]);
    double sum_g = 0, sum_gh = 0;
    const auto h_of = [&](size_t e) { return (coh::element_value(d.input(m, static_cast<int64_t>(e))) - mu) * rs; };
    const auto dy_of = [&](size_t e) { return coh::element_value(grad_out[static_cast<size_t>(m) * channels + e]); };
    for (size_t e = 0; e < channels; ++e) {
      const double dy = dy_of(e), h = h_of(e), gw = dy * static_cast<double>(d.weight[e]);
      sum_g += gw;
      sum_gh += gw * h;
      grad_w[e] += dy * h;
      size_w[e] += std::fabs(dy) * (std::fabs(h) + rs);
      grad_b[e] += dy;
      size_b[e] += std::fabs(dy);
    }
    for (size_t e = 0; e < channels; ++e) {
      const double gw = dy_of(e) * static_cast<double>(d.weight[e]), h = h_of(e);
      const size_t place = d.dense_place(m, static_cast<int64_t>(e));
      grad_x[place] += rs * (gw - sum_g / n - h * sum_gh / n);
      size_x[place] += rs * (std::fabs(gw) + 3 + std::fabs(h) * 3) * (1 + rs);
    }
  }
  const double rows = static_cast<double>(d.rows());
  for (size_t e = 0; e < channels; ++e) {
    expect_close("grad_weight", e, static_cast<double>(g.weight[e]), grad_w[e],
                 allowed<accumulate_t<T>>(grad_w[e], size_w[e], rows));
    expect_close("grad_bias", e, static_cast<double>(g.bias[e]), grad_b[e],
                 allowed<accumulate_t<T>>(grad_b[e], size_b[e], rows));
  }
  for (size_t i = 0; i < grad_x.size() && need_grad_tokens; ++i) {
    expect_close("grad_tokens", i, coh::element_value(g.tokens[i]), grad_x[i], allowed<T>(grad_x[i], size_x[i], n));
  }
}

template <class T>
void backward() {
  for_every_problem(4, [](const ShuffleProblem& problem, coh::Random& random) {
    Norm<T> d(problem, random);
    Buffer<T> out(static_cast<size_t>(d.rows() * d.channels), problem.offset), grad_out(out.size(), problem.offset);
    coh::fill_normal(grad_out, random);
    d.run(out);
    Gradients<T> first(d), second(d);
    run_backward(d, grad_out, first, true);
    check_backward(d, grad_out, first, true);
    coh::config.seed += 1000;  // another schedule
    run_backward(d, grad_out, second, true);
    coh::config.seed -= 1000;
    expect(same_bits(first.tokens, second.tokens) && same_bits(first.weight, second.weight) &&
               same_bits(first.bias, second.bias),
           "two runs differ");
    Gradients<T> without(d);
    run_backward(d, grad_out, without, false);
    check_backward(d, grad_out, without, false);
    for (size_t i = 0; i < without.tokens.size(); ++i)
      expect(std::isnan(coh::element_value(without.tokens[i])), "an unwanted gradient was written");
  });
}

}  // namespace

COH_CASE(forward_bfloat16) { forward<vico::BFloat16>(); }
COH_CASE(forward_half) { forward<vico::Half>(); }
COH_CASE(forward_float) { forward<float>(); }
COH_CASE(forward_double) { forward<double>(); }
COH_CASE(statistics_bfloat16) { statistics<vico::BFloat16>(); }
COH_CASE(statistics_half) { statistics<vico::Half>(); }
COH_CASE(statistics_float) { statistics<float>(); }
COH_CASE(statistics_double) { statistics<double>(); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }
COH_CASE(backward_with_less_shared_memory) {
  const size_t before = vico::host_shared_memory_limit;
  for (size_t limit : {40 * 1024, 1024}) {  // no row ahead, streaming
    vico::host_shared_memory_limit = limit;
    backward<vico::BFloat16>();
  }
  vico::host_shared_memory_limit = before;
}

COH_MAIN
