// CPU kernels of consistency. Each kernel goes over a row of the chunk once or twice, while it is in cache.
#include <cstring>
#include <limits>

#include "common/exp.h"
#include "common/log.h"
#include "consistency/consistency.h"

namespace vico::VICO_CPU_ARCH {
namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// load_n with -inf in the lanes beyond the end: words of no probability.
template <class A>
VICO_INLINE vec_t<A> load_words(const A* p, int64_t n) {
  if (n >= kWidth<A>) return load(p);
  A buffer[kWidth<A>];
  for (int i = 0; i < kWidth<A>; ++i) buffer[i] = i < n ? p[i] : -kInfinity<A>;
  return load(buffer);
}

template <class V>
VICO_INLINE auto largest(V v) {
  auto result = v[0];
  for (int i = 1; i < kLanes<V>; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// weight * x where there is weight; NaN weights stay NaN.
template <class V>
VICO_INLINE V times(V weight, V x) {
  return weight == V{} ? V{} : weight * x;
}

// What exp(z) is taken relative to: the maximum, unless there is none.
VICO_INLINE double base_of(double max) { return max == -kInfinity<double> ? 0 : max; }

// logits -> z = (logits + bias) / temperature, in place unless nothing changes; the largest z.
template <class A>
VICO_INLINE double scale_row(A* row, const A* bias, double temperature, int64_t n) {
  auto top = broadcast<vec_t<A>>(-kInfinity<A>);
  if (!bias && temperature == 1) {
    for (int64_t i = 0; i < n; i += kWidth<A>) top = max(top, load_words(row + i, n - i));
    return largest(top);
  }
  const A scale = static_cast<A>(1 / temperature);
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    auto z = load_words(row + i, n - i);
    if (bias) z += load_n(bias + i, n - i);
    z *= scale;
    store_n(row + i, z, n - i);
    top = max(top, z);
  }
  return largest(top);
}

// Moves sums that are relative to `max` to a larger maximum.
VICO_INLINE void raise_max(double& max, double chunk_max, double& sum, double& cross) {
  if (!(chunk_max > max)) return;
  const double factor = std::exp(max - chunk_max);  // of the first chunk: exp(-inf) = 0
  sum *= factor;
  cross *= factor;
  max = chunk_max;
}

template <class A, Divergence kKind>
void statistics(const ConsistencyParams& p, int64_t row) {
  const int64_t n = p.columns;
  A* policy = static_cast<A*>(p.policy) + row * n;
  A* reference = static_cast<A*>(p.reference) + row * n;
  ConsistencyRow& s = p.state[row];
  raise_max(s.policy_max, scale_row(policy, static_cast<const A*>(p.policy_bias), p.temperature, n), s.policy_sum,
            s.policy_cross);
  raise_max(s.reference_max, scale_row(reference, static_cast<const A*>(p.reference_bias), p.temperature, n),
            s.reference_sum, s.reference_cross);
  const A policy_base = static_cast<A>(base_of(s.policy_max)),
          reference_base = static_cast<A>(base_of(s.reference_max));
  vec_t<A> policy_sum{}, reference_sum{}, cross{};
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    const auto zq = load_words(policy + i, n - i), zp = load_words(reference + i, n - i);
    const auto eq = exp(zq - policy_base), ep = exp(zp - reference_base);
    policy_sum += eq;
    reference_sum += ep;
    if constexpr (kKind == Divergence::kForward) cross += times(ep, zp - zq);
    if constexpr (kKind == Divergence::kReverse) cross += times(eq, zq - zp);
  }
  s.policy_sum += sum(policy_sum);
  s.reference_sum += sum(reference_sum);
  if constexpr (kKind == Divergence::kForward) s.reference_cross += sum(cross);
  if constexpr (kKind == Divergence::kReverse) s.policy_cross += sum(cross);
}

// exp(z - max) / sum and z - lse of one model's row.
template <class A>
struct Softmax {
  A base, inverse_sum, log_sum;

  VICO_INLINE Softmax(double max, double sum)
      : base(static_cast<A>(base_of(max))),
        inverse_sum(static_cast<A>(1 / sum)),
        log_sum(static_cast<A>(std::log(sum))) {}
  VICO_INLINE vec_t<A> probability(vec_t<A> z) const { return exp(z - base) * inverse_sum; }
  VICO_INLINE vec_t<A> log_probability(vec_t<A> z) const { return (z - base) - log_sum; }
};

// log p - log m and log q - log m of m = beta p + (1 - beta) q, given log p and log q.
//
// With d = log q - log p: m / max(p, q) = u, at most 1, and one of the two gaps is -log u, the other that and -|d|; no
// logarithms of nearly equal numbers are subtracted.
template <class A>
struct MixtureGaps {
  vec_t<A> reference, policy;

  VICO_INLINE MixtureGaps(vec_t<A> log_p, vec_t<A> log_q, A beta) {
    const auto d = log_q - log_p;
    const auto p_leads = d <= vec_t<A>{};
    const auto ratio = exp(p_leads ? d : -d);
    const A other = 1 - beta;
    const auto minus_log_u = -log(p_leads ? ratio * other + beta : ratio * beta + other);
    reference = p_leads ? minus_log_u : minus_log_u - d;
    policy = p_leads ? minus_log_u + d : minus_log_u;
  }
};

template <class A>
void mixture(const ConsistencyParams& p, int64_t row) {
  const int64_t n = p.columns;
  const A* policy = static_cast<const A*>(p.policy) + row * n;
  const A* reference = static_cast<const A*>(p.reference) + row * n;
  ConsistencyRow& s = p.state[row];
  const Softmax<A> q_of(s.policy_max, s.policy_sum), p_of(s.reference_max, s.reference_sum);
  const A beta = static_cast<A>(p.beta);
  vec_t<A> policy_kl{}, reference_kl{};
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    const auto zq = load_words(policy + i, n - i), zp = load_words(reference + i, n - i);
    const MixtureGaps<A> gaps(p_of.log_probability(zp), q_of.log_probability(zq), beta);
    policy_kl += times(q_of.probability(zq), gaps.policy);
    reference_kl += times(p_of.probability(zp), gaps.reference);
  }
  s.policy_cross += sum(policy_kl);
  s.reference_cross += sum(reference_kl);
}

template <class A, Divergence kKind>
void gradient(const ConsistencyParams& p, int64_t row) {
  const int64_t n = p.columns;
  A* policy = static_cast<A*>(p.policy) + row * n;
  const A* reference = static_cast<const A*>(p.reference) + row * n;
  const ConsistencyRow& s = p.state[row];
  const Softmax<A> q_of(s.policy_max, s.policy_sum), p_of(s.reference_max, s.reference_sum);
  const A beta = static_cast<A>(p.beta), center = static_cast<A>(policy_divergence(s, kKind));
  const A scale = static_cast<A>((kKind == Divergence::kMixture ? 1 - p.beta : 1) / p.temperature);
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    const auto zq = load_words(policy + i, n - i), zp = load_words(reference + i, n - i);
    const auto q = q_of.probability(zq);
    vec_t<A> g;
    if constexpr (kKind == Divergence::kForward) {
      g = q - p_of.probability(zp);
    } else if constexpr (kKind == Divergence::kReverse) {
      g = times(q, q_of.log_probability(zq) - p_of.log_probability(zp) - center);
    } else {
      g = times(q, MixtureGaps<A>(p_of.log_probability(zp), q_of.log_probability(zq), beta).policy - center);
    }
    store_n(policy + i, g * scale, n - i);
  }
}

template <Divergence kKind>
struct KindOf {
  static constexpr Divergence value = kKind;
};

// Calls fn(A{}, KindOf<kind>{}) with the type of the logits and the divergence.
template <class Fn>
VICO_INLINE void with_type_and_kind(const ConsistencyParams& p, Fn&& fn) {
  const auto with_kind = [&](auto element) {
    switch (p.kind) {
      case Divergence::kForward:
        return fn(element, KindOf<Divergence::kForward>{});
      case Divergence::kReverse:
        return fn(element, KindOf<Divergence::kReverse>{});
      case Divergence::kMixture:
        return fn(element, KindOf<Divergence::kMixture>{});
    }
  };
  p.dtype == Dtype::kDouble ? with_kind(double{}) : with_kind(float{});
}

}  // namespace

void consistency_statistics(const ConsistencyParams& p, int64_t begin, int64_t end) {
  with_type_and_kind(p, [&](auto element, auto kind) {
    for (int64_t row = begin; row < end; ++row) statistics<decltype(element), decltype(kind)::value>(p, row);
  });
}

void consistency_mixture(const ConsistencyParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    p.dtype == Dtype::kDouble ? mixture<double>(p, row) : mixture<float>(p, row);
  }
}

void consistency_gradient(const ConsistencyParams& p, int64_t begin, int64_t end) {
  with_type_and_kind(p, [&](auto element, auto kind) {
    for (int64_t row = begin; row < end; ++row) gradient<decltype(element), decltype(kind)::value>(p, row);
  });
}

}  // namespace vico::VICO_CPU_ARCH
