// The CUDA kernels of consistency against plain loops in double over the whole vocabulary.
#include <algorithm>
#include <deque>

#include "consistency/consistency_cuda.cu"
#include "cuda_on_host/tests/dtype_of.h"
#include "cuda_on_host/tests/harness.h"

namespace {

using namespace coh_test;
using coh::Buffer;
using coh::expect;
using vico::Divergence;

struct Problem {
  int64_t rows;
  std::vector<int64_t> chunks;  // words of each
  double temperature = 1;
  bool bias = false;
  size_t offset = 0;       // elements before the first, of every buffer
  double scale = 2;        // of the logits
  int64_t impossible = 0;  // so many first words have logits of -inf in both models
};

// Packs and single words, less than a warp and more than a block of them, chunks that raise the maximum and that do
// not.
const Problem kProblems[] = {
    {1, {1}},
    {2, {3}, 2.0},
    {3, {40, 12}, 0.5, true},
    {2, {1064, 24, 1100}},
    {2, {1031, 5}, 1.0, true},
    {2, {64, 64}, 1.0, true, 1},
    {1, {12, 8}, 1.0, false, 0, 400.0},
    {2, {16, 9, 20}, 1.0, false, 0, 2.0, 18},
    {0, {8}},
};

double log_sum(const std::vector<double>& z) {
  const double top = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double x : z) sum += std::exp(x - top);
  return top + std::log(sum);
}

// What the loss and dL/dlogits of one row are.
struct Wanted {
  double loss = 0, policy_lse, reference_lse;
  std::vector<double> gradient;

  Wanted(const std::vector<double>& zq, const std::vector<double>& zp, Divergence kind, double beta, double temperature)
      : policy_lse(log_sum(zq)), reference_lse(log_sum(zp)), gradient(zq.size()) {
    const double a = kind == Divergence::kForward ? 1 : kind == Divergence::kReverse ? 0 : beta;
    double policy_kl = 0;
    const auto log_m = [&](double log_p, double log_q) {
      if (kind == Divergence::kForward) return log_q;
      if (kind == Divergence::kReverse) return log_p;
      return std::log(beta * std::exp(log_p) + (1 - beta) * std::exp(log_q));
    };
    for (size_t v = 0; v < zq.size(); ++v) {
      if (zq[v] == -HUGE_VAL) continue;
      const double log_q = zq[v] - policy_lse, log_p = zp[v] - reference_lse;
      const double p = std::exp(log_p), q = std::exp(log_q);
      if (p > 0) loss += a * p * (log_p - log_m(log_p, log_q));
      if (q > 0) policy_kl += q * (log_q - log_m(log_p, log_q));
    }
    loss += (1 - a) * policy_kl;
    for (size_t v = 0; v < zq.size(); ++v) {
      if (zq[v] == -HUGE_VAL) continue;
      const double log_q = zq[v] - policy_lse, log_p = zp[v] - reference_lse;
      const double q = std::exp(log_q);
      gradient[v] = kind == Divergence::kForward ? (q - std::exp(log_p)) / temperature
                    : q > 0                      ? (1 - a) * q * (log_q - log_m(log_p, log_q) - policy_kl) / temperature
                                                 : 0;
    }
  }
};

template <class A>
void check(const Problem& problem, Divergence kind, coh::Random& random) {
  const size_t rows = static_cast<size_t>(problem.rows);
  const double beta = kind == Divergence::kMixture ? 0.3 : kind == Divergence::kReverse ? 1 : 0;
  std::vector<std::vector<double>> zq(rows), zp(rows);
  std::deque<Buffer<A>> policy, reference;
  Buffer<vico::ConsistencyRow> state(rows);
  for (size_t i = 0; i < rows; ++i) state[i] = {-HUGE_VAL, 0, -HUGE_VAL, 0, 0, 0};
  vico::ConsistencyParams p;
  p.dtype = kDtype<A>;
  p.kind = kind;
  p.beta = beta;
  p.temperature = problem.temperature;
  p.rows = problem.rows;
  p.state = state.data();
  int64_t first = 0;
  for (int64_t words : problem.chunks) {
    const size_t n = static_cast<size_t>(words);
    Buffer<A>&q = policy.emplace_back(rows * n, problem.offset), &r = reference.emplace_back(rows * n, problem.offset);
    Buffer<A> q_bias(n, problem.offset), r_bias(n, problem.offset);
    for (Buffer<A>* b : {&q, &r, &q_bias, &r_bias}) coh::fill_normal(*b, random, problem.scale);
    for (size_t e = 0; e < rows * n; ++e) {
      if (first + static_cast<int64_t>(e % n) < problem.impossible) q[e] = r[e] = -static_cast<A>(HUGE_VAL);
      zq[e / n].push_back((q[e] + (problem.bias ? static_cast<double>(q_bias[e % n]) : 0)) / problem.temperature);
      zp[e / n].push_back((r[e] + (problem.bias ? static_cast<double>(r_bias[e % n]) : 0)) / problem.temperature);
    }
    p.columns = words;
    p.policy = q.data();
    p.reference = r.data();
    p.policy_bias = problem.bias ? q_bias.data() : nullptr;
    p.reference_bias = problem.bias ? r_bias.data() : nullptr;
    vico::consistency_statistics_cuda(p, nullptr);
    first += words;
  }
  p.policy_bias = p.reference_bias = nullptr;
  const auto for_chunks = [&](void (*kernel)(const vico::ConsistencyParams&, cudaStream_t)) {
    for (size_t c = 0; c < policy.size(); ++c) {
      p.columns = problem.chunks[c];
      p.policy = policy[c].data();
      p.reference = reference[c].data();
      kernel(p, nullptr);
    }
  };
  if (kind == Divergence::kMixture) for_chunks(vico::consistency_mixture_cuda);
  Buffer<double> loss(rows), lse(rows), ref_lse(rows);
  vico::ConsistencyResultParams result;
  result.kind = kind;
  result.beta = beta;
  result.rows = problem.rows;
  result.state = state.data();
  result.loss = loss.data();
  result.policy_lse = lse.data();
  result.reference_lse = ref_lse.data();
  vico::consistency_result_cuda(result, nullptr);
  // Rounded to 16 bits elsewhere first, which leaves the logits as they are; then in their place.
  std::vector<std::vector<vico::BFloat16>> bfloats;
  std::vector<std::vector<vico::Half>> halves;
  const auto rounded = [&](auto& all, vico::Dtype dtype) {
    using G = typename std::decay_t<decltype(all)>::value_type::value_type;
    for (size_t c = 0; c < policy.size(); ++c) {
      Buffer<G> out(policy[c].size(), problem.offset);
      p.columns = problem.chunks[c];
      p.policy = policy[c].data();
      p.reference = reference[c].data();
      p.gradient = out.data();
      p.gradient_dtype = dtype;
      vico::consistency_gradient_cuda(p, nullptr);
      all.emplace_back(out.data(), out.data() + out.size());
    }
    p.gradient = nullptr;
  };
  if constexpr (std::is_same_v<A, float>) {
    rounded(bfloats, vico::Dtype::kBFloat16);
    rounded(halves, vico::Dtype::kHalf);
  }
  for_chunks(vico::consistency_gradient_cuda);
  if constexpr (std::is_same_v<A, float>) {
    for (size_t c = 0; c < policy.size(); ++c) {
      for (size_t e = 0; e < policy[c].size(); ++e) {
        const auto bfloat = vico::pack_of<vico::BFloat16, 1>({policy[c][e]}).at[0];
        const auto half = vico::pack_of<vico::Half, 1>({policy[c][e]}).at[0];
        expect(!std::memcmp(&bfloat, &bfloats[c][e], 2), "bfloat16 gradient %zu of chunk %zu", e, c);
        expect(!std::memcmp(&half, &halves[c][e], 2), "float16 gradient %zu of chunk %zu", e, c);
      }
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    const Wanted wanted(zq[i], zp[i], kind, beta, problem.temperature);
    double largest = 1;
    for (size_t v = 0; v < zq[i].size(); ++v) {
      if (zq[i][v] != -HUGE_VAL) largest = std::max({largest, std::fabs(zq[i][v]), std::fabs(zp[i][v])});
    }
    const double few = 16 * coh::kEpsilon<A> * largest;  // roundings of the logits, which exp makes relative errors
    expect(std::fabs(loss[i] - wanted.loss) <= few * (1 + wanted.loss), "loss is off by %g of %g",
           loss[i] - wanted.loss, wanted.loss);
    expect(std::fabs(lse[i] - wanted.policy_lse) <= few, "policy lse is off by %g", lse[i] - wanted.policy_lse);
    expect(std::fabs(ref_lse[i] - wanted.reference_lse) <= few, "reference lse is off by %g",
           ref_lse[i] - wanted.reference_lse);
    size_t v = 0;
    for (size_t c = 0; c < policy.size(); ++c) {
      const size_t n = static_cast<size_t>(problem.chunks[c]);
      for (size_t j = 0; j < n; ++j, ++v) {
        const double error = std::fabs(static_cast<double>(policy[c][i * n + j]) - wanted.gradient[v]);
        expect(error <= few * (1 + std::fabs(wanted.loss)) / problem.temperature,
               "gradient of word %zu is off by %g of %g", v, error, wanted.gradient[v]);
      }
    }
  }
}

template <class A>
void for_every_problem(Divergence kind) {
  coh::Random random(7);
  int number = 0;
  for (const Problem& p : kProblems) {
    try {
      check<A>(p, kind, random);
    } catch (const std::exception& e) {
      throw std::runtime_error("problem " + std::to_string(number) + ": " + e.what());
    }
    ++number;
  }
}

// NaN logits, in a word that no other thread's maximum can hide, are not lost.
void nan_is_kept(int64_t word) {
  Buffer<float> policy(64), reference(64);
  Buffer<vico::ConsistencyRow> state(1);
  for (size_t v = 0; v < 64; ++v) policy[v] = reference[v] = v < 60 ? -HUGE_VALF : 1.0f;
  policy[static_cast<size_t>(word)] = std::nanf("");
  state[0] = {-HUGE_VAL, 0, -HUGE_VAL, 0, 0, 0};
  vico::ConsistencyParams p;
  p.rows = 1;
  p.columns = 64;
  p.policy = policy.data();
  p.reference = reference.data();
  p.state = state.data();
  vico::consistency_statistics_cuda(p, nullptr);
  expect(std::isnan(state[0].policy_sum), "a NaN logit left the sum at %g", state[0].policy_sum);
  expect(std::fabs(state[0].reference_sum - 4) < 1e-6, "the reference's sum is %g", state[0].reference_sum);
}

}  // namespace

COH_CASE(forward_float) { for_every_problem<float>(Divergence::kForward); }
COH_CASE(reverse_float) { for_every_problem<float>(Divergence::kReverse); }
COH_CASE(mixture_float) { for_every_problem<float>(Divergence::kMixture); }
COH_CASE(forward_double) { for_every_problem<double>(Divergence::kForward); }
COH_CASE(mixture_double) { for_every_problem<double>(Divergence::kMixture); }
COH_CASE(nan_logits) {
  for (int64_t word : {0, 7, 63}) nan_is_kept(word);
}

COH_MAIN
