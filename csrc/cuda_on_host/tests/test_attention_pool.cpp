// The CUDA kernels of attention_pool against plain loops in double, and against themselves: a tile's bits depend on
// neither the other tiles, nor the schedule, nor how much shared memory the device has.
#include "attention_pool/attention_pool_cuda.cu"
#include "cuda_on_host/tests/harness.h"

namespace {

using coh::Buffer;
using coh::element_value;
using coh::expect;
using vico::accumulate_t;

template <class T>
constexpr vico::Dtype kDtype = std::is_same_v<T, double>           ? vico::Dtype::kDouble
                               : std::is_same_v<T, float>          ? vico::Dtype::kFloat
                               : std::is_same_v<T, vico::BFloat16> ? vico::Dtype::kBFloat16
                                                                   : vico::Dtype::kHalf;

struct Problem {
  int64_t tiles, count, channels, heads, skip;
  bool one_query = false;     // for all tiles
  int64_t token_padding = 0;  // elements between tokens, and between heads of the query
  size_t offset = 0;          // elements before the first, of every buffer
};

const std::vector<Problem> kProblems = {
    {1, 1, 1, 1, 0},
    {2, 5, 8, 3, 1},
    {0, 4, 8, 2, 1},
    {2, 4, 8, 0, 1},
    {2, 13, 40, 16, 1, true},
    {2, 10, 32, 19, 0, false, 8},
    {2, 9, 37, 5, 2, false, 3, 1},
};
// For the fused kernel: full chunks, one slice and many, of each of its geometries, with tails.
const std::vector<Problem> kFusedProblems = {
    {3, 141, 40, 16, 1, true}, {1, 20, 264, 16, 1, false, 0, 1},
    {1, 34, 400, 4, 0},        {1, 24, 1024, 2, 0},
    {1, 9, 1096, 16, 1},       {1, 16, 3200, 2, 0},
};

size_t size(int64_t n) { return static_cast<size_t>(n); }

template <class T>
struct Pool {
  using A = accumulate_t<T>;
  Problem problem;
  vico::AttentionPoolShape s;
  vico::AttentionPoolInputs in;
  Buffer<T> tokens, query, context;
  Buffer<A> lse;

  Pool(const Problem& p, coh::Random& random)
      : problem(p),
        tokens(size(p.tiles * (p.skip + p.count) * (p.channels + p.token_padding)), p.offset),
        query(size((p.one_query ? 1 : p.tiles) * p.heads * (p.channels + p.token_padding)), p.offset),
        context(size(p.tiles * p.heads * p.channels), p.offset),
        lse(size(p.tiles * p.heads)) {
    s.dtype = kDtype<T>;
    s.tiles = p.tiles;
    s.count = p.count;
    s.channels = p.channels;
    s.heads = p.heads;
    in.token_stride = in.query_head_stride = p.channels + p.token_padding;
    in.tile_stride = (p.skip + p.count) * in.token_stride;
    in.tokens = tokens.data() + p.skip * in.token_stride;
    in.query = query.data();
    in.query_stride = p.one_query ? 0 : p.heads * in.query_head_stride;
    // Skipped tokens and padding stay NaN: a kernel that reads them shows.
    const double scale = 1.5 / std::sqrt(static_cast<double>(p.channels));
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      for (int64_t t = 0; t < p.count; ++t) {
        for (int64_t c = 0; c < p.channels; ++c) tokens[token_at(tile, t, c)] = coh::element_from<T>(random.normal());
      }
      for (int64_t h = 0; h < p.heads && (tile == 0 || !p.one_query); ++h) {
        for (int64_t c = 0; c < p.channels; ++c) {
          query[query_at(tile, h, c)] = coh::element_from<T>(scale * random.normal());
        }
      }
    }
  }

  size_t token_at(int64_t tile, int64_t t, int64_t c) const {
    return size(tile * in.tile_stride + (problem.skip + t) * in.token_stride + c);
  }
  size_t query_at(int64_t tile, int64_t h, int64_t c) const {
    return size(tile * in.query_stride + h * in.query_head_stride + c);
  }
  double x(int64_t tile, int64_t t, int64_t c) const { return element_value(tokens[token_at(tile, t, c)]); }
  double q(int64_t tile, int64_t h, int64_t c) const { return element_value(query[query_at(tile, h, c)]); }

  // Tiles [first, first + tiles) alone.
  void run(int64_t first, int64_t tiles) {
    vico::AttentionPoolParams p;
    p.shape = s;
    p.shape.tiles = tiles;
    Buffer<A> workspace(size(p.shape.cuda_forward_workspace()));
    p.in = in;
    p.in.tokens = static_cast<const T*>(in.tokens) + first * in.tile_stride;
    p.in.query = query.data() + first * in.query_stride;
    p.context = context.data() + first * s.heads * s.channels;
    p.lse = lse.data() + first * s.heads;
    p.partial = workspace.data();
    vico::attention_pool_cuda(p, nullptr);
  }
  void run() { run(0, s.tiles); }

  double score(int64_t tile, int64_t h, int64_t t, double& magnitude) const {
    double sum = 0;
    magnitude = 0;
    for (int64_t c = 0; c < s.channels; ++c) {
      sum += q(tile, h, c) * x(tile, t, c);
      magnitude += std::fabs(q(tile, h, c) * x(tile, t, c));
    }
    return sum;
  }

  // Softmax of head h, its log-sum-exp, and how far a score may be off, over the sum type's rounding.
  std::vector<double> weights(int64_t tile, int64_t h, double& log_sum, double& worst) const {
    std::vector<double> w(size(s.count));
    double highest = -INFINITY, total = 0;
    worst = 1;
    for (int64_t t = 0; t < s.count; ++t) {
      double magnitude;
      w[size(t)] = score(tile, h, t, magnitude);
      highest = std::max(highest, w[size(t)]);
      worst = std::max(worst, magnitude);
    }
    for (double& v : w) total += v = std::exp(v - highest);
    for (double& v : w) v /= total;
    log_sum = highest + std::log(total);
    return w;
  }
  // What sums of n terms, each off by `worst` roundings, may be off by, over their magnitude.
  double sum_error(double worst) const {
    return 4 * coh::kEpsilon<A> * (1 + std::sqrt(static_cast<double>(s.count + s.channels))) * (1 + worst);
  }
};

void expect_close(const char* what, size_t i, double got, double wanted, double tolerance) {
  expect(std::fabs(got - wanted) <= tolerance, "%s %zu is %.9g, not %.9g", what, i, got, wanted);
}

template <class T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size() == b.size() &&
         !std::memcmp(static_cast<const void*>(a.data()), static_cast<const void*>(b.data()), a.size() * sizeof(T));
}
template <class T>
std::vector<T> copy_of(const Buffer<T>& b) {
  return std::vector<T>(b.data(), b.data() + b.size());
}
template <class T>
bool same_bits(const Buffer<T>& a, const std::vector<T>& b) {
  return b.empty() ||
         !std::memcmp(static_cast<const void*>(a.data()), static_cast<const void*>(b.data()), b.size() * sizeof(T));
}

template <class Fn>
void for_every_problem(const std::vector<Problem>& problems, uint64_t seed, const Fn& fn) {
  coh::Random random(seed);
  int number = 0;
  for (const Problem& p : problems) {
    try {
      fn(p, random);
    } catch (const std::exception& e) {
      throw std::runtime_error("problem " + std::to_string(number) + ": " + e.what());
    }
    ++number;
  }
}

template <class T>
void check_forward(const Pool<T>& d) {
  const vico::AttentionPoolShape& s = d.s;
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    for (int64_t h = 0; h < s.heads; ++h) {
      double log_sum, worst;
      const std::vector<double> w = d.weights(tile, h, log_sum, worst);
      const size_t row = size(tile * s.heads + h);
      expect_close("lse", row, static_cast<double>(d.lse[row]), log_sum, d.sum_error(worst));
      for (int64_t c = 0; c < s.channels; ++c) {
        double sum = 0, magnitude = 0;
        for (int64_t t = 0; t < s.count; ++t) {
          sum += w[size(t)] * d.x(tile, t, c);
          magnitude += w[size(t)] * std::fabs(d.x(tile, t, c));
        }
        // Weights are rounded to 16 bits as well where tensor cores take them.
        const double rounding = (sizeof(T) == 2 ? 2 : 0) * coh::kEpsilon<T> * magnitude;
        const size_t i = row * size(s.channels) + size(c);
        expect_close("context", i, element_value(d.context[i]), sum,
                     2 * coh::kEpsilon<T> * std::fabs(sum) + rounding + d.sum_error(worst) * magnitude);
      }
    }
  }
}

template <class T>
void forward(const std::vector<Problem>& problems) {
  for_every_problem(problems, 5, [](const Problem& problem, coh::Random& random) {
    Pool<T> d(problem, random);
    d.run();
    check_forward(d);
    const std::vector<T> context = copy_of(d.context);
    const auto lse = copy_of(d.lse);
    d.context.poison();
    d.lse.poison();
    coh::config.seed += 1000;  // another schedule
    for (int64_t tile = 0; tile < d.s.tiles; ++tile) d.run(tile, 1);
    coh::config.seed -= 1000;
    expect(same_bits(d.context, context) && same_bits(d.lse, lse), "a tile alone has other bits");
  });
}

// Devices with less shared memory: one step at a time, or the simple kernels.
template <class T>
void smaller_devices() {
  coh::Random random(6);
  for (const Problem& problem : {Problem{1, 40, 72, 3, 1}, Problem{1, 9, 1096, 16, 1}}) {
    Pool<T> d(problem, random);
    d.run();
    const std::vector<T> context = copy_of(d.context);
    const auto bytes = problem.channels < 100 ? vico::FusedPool<4>::shared_bytes : vico::FusedPool<50>::shared_bytes;
    const size_t before = vico::host_shared_memory_limit;
    vico::host_shared_memory_limit = bytes(static_cast<int>(problem.channels), 1);
    d.context.poison();
    d.run();
    const bool same = same_bits(d.context, context);
    vico::host_shared_memory_limit = 1024;
    d.context.poison();
    d.run();
    vico::host_shared_memory_limit = before;
    expect(same, "one step at a time gives other bits");
    check_forward(d);
  }
}

template <class T>
struct Gradients {
  Buffer<T> tokens, query;
  explicit Gradients(const Pool<T>& d)
      : tokens(size(d.s.tiles * (d.problem.skip + d.s.count) * d.s.channels), d.problem.offset),
        query(size(d.s.tiles * d.s.heads * d.s.channels), d.problem.offset) {}
};

template <class T>
void run_backward(Pool<T>& d, const Buffer<T>& grad_context, Gradients<T>& g, bool need_grad_tokens) {
  vico::AttentionPoolBackwardParams p;
  p.shape = d.s;
  Buffer<accumulate_t<T>> workspace(size(d.s.cuda_backward_workspace()));
  p.in = d.in;
  p.grad_context = grad_context.data();
  p.context = d.context.data();
  p.lse = d.lse.data();
  p.grad_tokens = need_grad_tokens ? g.tokens.data() : nullptr;
  p.skip = d.problem.skip;
  p.grad_query = g.query.data();
  p.partial = workspace.data();
  vico::attention_pool_backward_cuda(p, nullptr);
}

template <class T>
void check_backward(const Pool<T>& d, const Buffer<T>& grad_context, const Gradients<T>& g, bool need_grad_tokens) {
  const vico::AttentionPoolShape& s = d.s;
  const auto grad = [&](int64_t tile, int64_t h, int64_t c) {
    return element_value(grad_context[size((tile * s.heads + h) * s.channels + c)]);
  };
  const int64_t rows = d.problem.skip + s.count;
  std::vector<double> grad_x(size(s.count * s.channels)), size_x(grad_x.size());
  for (int64_t tile = 0; tile < s.tiles && s.heads; ++tile) {
    std::fill(grad_x.begin(), grad_x.end(), 0.0);
    std::fill(size_x.begin(), size_x.end(), 0.0);
    for (int64_t h = 0; h < s.heads; ++h) {
      double log_sum, worst, dot = 0, dot_size = 0;
      const std::vector<double> w = d.weights(tile, h, log_sum, worst);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double term = grad(tile, h, c) * element_value(d.context[size((tile * s.heads + h) * s.channels + c)]);
        dot += term;
        dot_size += std::fabs(term);
      }
      std::vector<double> grad_q(size(s.channels)), size_q(size(s.channels));
      for (int64_t t = 0; t < s.count; ++t) {
        double product = 0, product_size = 0;
        for (int64_t c = 0; c < s.channels; ++c) {
          product += grad(tile, h, c) * d.x(tile, t, c);
          product_size += std::fabs(grad(tile, h, c) * d.x(tile, t, c));
        }
        const double slope = w[size(t)] * (product - dot), slope_size = w[size(t)] * (product_size + dot_size);
        for (int64_t c = 0; c < s.channels; ++c) {
          const double x = d.x(tile, t, c), q = d.q(tile, h, c), weight = w[size(t)];
          grad_q[size(c)] += slope * x;
          size_q[size(c)] += slope_size * std::fabs(x) * (1 + worst);
          grad_x[size(t * s.channels + c)] += weight * grad(tile, h, c) + slope * q;
          size_x[size(t * s.channels + c)] +=
              (weight * std::fabs(grad(tile, h, c)) + slope_size * std::fabs(q)) * (1 + worst);
        }
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        const size_t i = size((tile * s.heads + h) * s.channels + c);
        expect_close("grad_query", i, element_value(g.query[i]), grad_q[size(c)],
                     2 * coh::kEpsilon<T> * std::fabs(grad_q[size(c)]) + d.sum_error(0) * size_q[size(c)]);
      }
    }
    for (int64_t t = 0; t < rows && need_grad_tokens; ++t) {
      for (int64_t c = 0; c < s.channels; ++c) {
        const size_t i = size((tile * rows + t) * s.channels + c), j = size((t - d.problem.skip) * s.channels + c);
        const double wanted = t < d.problem.skip ? 0 : grad_x[j], magnitude = t < d.problem.skip ? 0 : size_x[j];
        expect_close("grad_tokens", i, element_value(g.tokens[i]), wanted,
                     2 * coh::kEpsilon<T> * std::fabs(wanted) + d.sum_error(0) * magnitude);
      }
    }
  }
}

template <class T>
void backward() {
  for_every_problem(kProblems, 7, [](const Problem& problem, coh::Random& random) {
    Pool<T> d(problem, random);
    Buffer<T> grad_context(d.context.size(), problem.offset);
    coh::fill_normal(grad_context, random);
    d.run();
    Gradients<T> first(d), second(d), without(d);
    run_backward(d, grad_context, first, true);
    check_backward(d, grad_context, first, true);
    coh::config.seed += 1000;  // another schedule
    run_backward(d, grad_context, second, true);
    run_backward(d, grad_context, without, false);
    coh::config.seed -= 1000;
    expect(same_bits(first.tokens, second.tokens) && same_bits(first.query, second.query), "two runs differ");
    expect(same_bits(first.query, without.query), "the query's gradient depends on whether the tokens' is wanted");
    for (size_t i = 0; i < without.tokens.size(); ++i) {
      expect(std::isnan(element_value(without.tokens[i])), "an unwanted gradient was written");
    }
  });
}

// Scores that rise by 37 with every token, fall by as much, or are -infinity.
template <class T>
void large_scores() {
  coh::Random random(8);
  Pool<T> d({1, 300, 8, 2, 0}, random);
  for (int64_t t = 0; t < 300; ++t) {
    for (int64_t c = 0; c < 8; ++c) d.tokens[d.token_at(0, t, c)] = coh::element_from<T>(static_cast<double>(t % 5));
    d.tokens[d.token_at(0, t, 0)] = coh::element_from<T>(static_cast<double>(t % 250));
    d.tokens[d.token_at(0, t, 1)] = coh::element_from<T>(t < 200 ? -INFINITY : 0.0);
  }
  for (int64_t c = 0; c < 8; ++c) {
    d.query[d.query_at(0, 0, c)] = coh::element_from<T>(c == 0 ? 37.0 : c == 1 ? 1.0 : 0.0);
    d.query[d.query_at(0, 1, c)] = coh::element_from<T>(c == 0 ? -37.0 : c == 1 ? 1.0 : 0.0);
  }
  d.run();
  // Head 0's highest score is that of token 249, head 1's that of token 250: the others weigh less than exp(-36).
  expect_close("context", 2, element_value(d.context[2]), 249 % 5, 1e-6);
  expect_close("context", 10, element_value(d.context[10]), 250 % 5, 1e-6);
  expect_close("lse", 0, static_cast<double>(d.lse[0]), 37.0 * 249, 1e-3);
  expect_close("lse", 1, static_cast<double>(d.lse[1]), 0, 1e-6);
}

}  // namespace

COH_CASE(forward_bfloat16) { forward<vico::BFloat16>(kProblems); }
COH_CASE(forward_half) { forward<vico::Half>(kProblems); }
COH_CASE(forward_float) { forward<float>(kProblems); }
COH_CASE(forward_double) { forward<double>(kProblems); }
COH_CASE(forward_fused_bfloat16) { forward<vico::BFloat16>(kFusedProblems); }
COH_CASE(forward_fused_half) { forward<vico::Half>(kFusedProblems); }
COH_CASE(smaller_devices_bfloat16) { smaller_devices<vico::BFloat16>(); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }
COH_CASE(large_scores_bfloat16) { large_scores<vico::BFloat16>(); }
COH_CASE(large_scores_half) { large_scores<vico::Half>(); }
COH_CASE(large_scores_float) { large_scores<float>(); }

COH_MAIN
