// CUDA kernels of consistency. One block per token: thread t takes packs t, t + 256, ... of the chunk's words, and
// reads each word of both models once. Equations in consistency.h.
#include <type_traits>

#include "common/pack.cuh"
#include "consistency/consistency.h"

namespace vico {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class A>
constexpr A kNothing = -static_cast<A>(HUGE_VAL);  // the maximum of no words

VICO_DEVICE float exp_of(float x) { return expf(x); }
VICO_DEVICE double exp_of(double x) { return exp(x); }
VICO_DEVICE float log_of(float x) { return logf(x); }
VICO_DEVICE double log_of(double x) { return log(x); }
VICO_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
VICO_DEVICE double larger(double a, double b) { return fmax(a, b); }

// weight * x where there is weight; NaN weights stay NaN.
template <class A>
VICO_DEVICE A times(A weight, A x) {
  return weight == A(0) ? A(0) : weight * x;
}

// max z, sum exp(z - max) and sum exp(z - max) (z - other z) of some words.
template <class A>
struct Running {
  A max = kNothing<A>, sum = 0, cross = 0;

  VICO_DEVICE void raise(A to) {
    if (!(to > max)) return;
    const A factor = exp_of(max - to);
    sum *= factor;
    cross *= factor;
    max = to;
  }
  // The result has the same bits whichever of the two is `*this`.
  VICO_DEVICE void merge(const Running& other) {
    const A top = larger(max, other.max);
    // Without a word of any probability both sums are 0, or NaN of NaN logits: exp(-inf + inf) must not touch them.
    const bool none = top == kNothing<A>;
    const A mine = none ? A(1) : exp_of(max - top), theirs = none ? A(1) : exp_of(other.max - top);
    sum = sum * mine + other.sum * theirs;
    cross = cross * mine + other.cross * theirs;
    max = top;
  }
  VICO_DEVICE void merge_warp() {
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) {
      Running other;
      other.max = __shfl_xor_sync(~0u, max, delta);
      other.sum = __shfl_xor_sync(~0u, sum, delta);
      other.cross = __shfl_xor_sync(~0u, cross, delta);
      merge(other);
    }
  }
};

// logits -> z = (logits + bias) / temperature of a pack, kept if it changed; the largest z.
template <class A, int kN>
VICO_DEVICE A scaled(A (&z)[kN], A* row, const void* bias, A scale, bool changes, int64_t c) {
  const auto logits = load_pack<A, kN>(row + c);
  A top = kNothing<A>, b[kN] = {};
  if (bias) load_values(b, static_cast<const A*>(bias) + c);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    z[i] = changes ? (logits.at[i] + b[i]) * scale : logits.at[i];
    top = larger(top, z[i]);
  }
  if (changes) store_values(row + c, z);
  return top;
}

template <class A, int kN, Divergence kKind>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const __grid_constant__ ConsistencyParams p) {
  A* policy = static_cast<A*>(p.policy) + int64_t{blockIdx.x} * p.columns;
  A* reference = static_cast<A*>(p.reference) + int64_t{blockIdx.x} * p.columns;
  const A scale = static_cast<A>(1 / p.temperature);
  const bool policy_changes = p.policy_bias || p.temperature != 1;
  const bool reference_changes = p.reference_bias || p.temperature != 1;
  Running<A> q, r;
  for (int64_t c = int64_t{threadIdx.x} * kN; c < p.columns; c += kThreads * kN) {
    A zq[kN], zp[kN];
    q.raise(scaled(zq, policy, p.policy_bias, scale, policy_changes, c));
    r.raise(scaled(zp, reference, p.reference_bias, scale, reference_changes, c));
    const A q_base = q.max == kNothing<A> ? A(0) : q.max, r_base = r.max == kNothing<A> ? A(0) : r.max;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const A eq = exp_of(zq[i] - q_base), ep = exp_of(zp[i] - r_base);
      q.sum += eq;
      r.sum += ep;
      if constexpr (kKind == Divergence::kForward) r.cross += times(ep, zp[i] - zq[i]);
      if constexpr (kKind == Divergence::kReverse) q.cross += times(eq, zq[i] - zp[i]);
    }
  }
  VICO_SHARED(A, warps, [kWarps][6]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  q.merge_warp();
  r.merge_warp();
  if (lane == 0) {
    const A values[6] = {q.max, q.sum, q.cross, r.max, r.sum, r.cross};
#pragma unroll
    for (int i = 0; i < 6; ++i) warps[warp][i] = values[i];
  }
  __syncthreads();
  if (warp != 0) return;
  q = Running<A>();
  r = Running<A>();
  if (lane < kWarps) {
    q.max = warps[lane][0], q.sum = warps[lane][1], q.cross = warps[lane][2];
    r.max = warps[lane][3], r.sum = warps[lane][4], r.cross = warps[lane][5];
  }
  q.merge_warp();
  r.merge_warp();
  if (lane != 0) return;
  ConsistencyRow& s = p.state[blockIdx.x];
  raise_max(s.policy_max, q.max, s.policy_sum, s.policy_cross);
  raise_max(s.reference_max, r.max, s.reference_sum, s.reference_cross);
  // The chunk's sums are relative to its own maximum.
  const double q_factor = q.max == kNothing<A> ? 1 : exp(q.max - s.policy_max);
  const double r_factor = r.max == kNothing<A> ? 1 : exp(r.max - s.reference_max);
  s.policy_sum += q.sum * q_factor;
  s.reference_sum += r.sum * r_factor;
  if constexpr (kKind == Divergence::kForward) s.reference_cross += r.cross * r_factor;
  if constexpr (kKind == Divergence::kReverse) s.policy_cross += q.cross * q_factor;
}

// exp(z - max) / sum and z - lse of one model's row.
template <class A>
struct Softmax {
  A base, inverse_sum, log_sum;

  VICO_DEVICE A probability(A z) const { return exp_of(z - base) * inverse_sum; }
  VICO_DEVICE A log_probability(A z) const { return (z - base) - log_sum; }
};
template <class A>
struct Constants {
  Softmax<A> q, p;
  A center;  // what the gradient subtracts
};

// The constants of the block's row: of its doubles, worked out once.
template <class A>
VICO_DEVICE Constants<A> constants_of(const ConsistencyRow& s, Divergence kind) {
  VICO_SHARED(A, shared, [7]);
  if (threadIdx.x == 0) {
    shared[0] = static_cast<A>(base_of(s.policy_max));
    shared[1] = static_cast<A>(1 / s.policy_sum);
    shared[2] = static_cast<A>(log(s.policy_sum));
    shared[3] = static_cast<A>(base_of(s.reference_max));
    shared[4] = static_cast<A>(1 / s.reference_sum);
    shared[5] = static_cast<A>(log(s.reference_sum));
    shared[6] = static_cast<A>(kind == Divergence::kForward ? 0 : policy_divergence(s, kind));
  }
  __syncthreads();
  return {{shared[0], shared[1], shared[2]}, {shared[3], shared[4], shared[5]}, shared[6]};
}

// log p - log m and log q - log m of m = beta p + (1 - beta) q, as in consistency_cpu.cpp.
template <class A>
struct MixtureGaps {
  A reference, policy;

  VICO_DEVICE MixtureGaps(A log_p, A log_q, A beta) {
    const A d = log_q - log_p, other = 1 - beta;
    const bool p_leads = d <= 0;
    const A ratio = exp_of(p_leads ? d : -d);
    const A minus_log_u = -log_of(p_leads ? ratio * other + beta : ratio * beta + other);
    reference = p_leads ? minus_log_u : minus_log_u - d;
    policy = p_leads ? minus_log_u + d : minus_log_u;
  }
};

template <class A, int kN>
__global__ void __launch_bounds__(kThreads) mixture_kernel(const __grid_constant__ ConsistencyParams p) {
  const A* policy = static_cast<const A*>(p.policy) + int64_t{blockIdx.x} * p.columns;
  const A* reference = static_cast<const A*>(p.reference) + int64_t{blockIdx.x} * p.columns;
  ConsistencyRow& s = p.state[blockIdx.x];
  const Constants<A> row = constants_of<A>(s, Divergence::kForward);
  const A beta = static_cast<A>(p.beta);
  A policy_kl = 0, reference_kl = 0;
  for (int64_t c = int64_t{threadIdx.x} * kN; c < p.columns; c += kThreads * kN) {
    const auto zq = load_pack<A, kN>(policy + c), zp = load_pack<A, kN>(reference + c);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const MixtureGaps<A> gaps(row.p.log_probability(zp.at[i]), row.q.log_probability(zq.at[i]), beta);
      policy_kl += times(row.q.probability(zq.at[i]), gaps.policy);
      reference_kl += times(row.p.probability(zp.at[i]), gaps.reference);
    }
  }
  VICO_SHARED(A, warps, [2][kWarps]);
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    policy_kl += __shfl_xor_sync(~0u, policy_kl, delta);
    reference_kl += __shfl_xor_sync(~0u, reference_kl, delta);
  }
  if (threadIdx.x % 32 == 0) {
    warps[0][threadIdx.x / 32] = policy_kl;
    warps[1][threadIdx.x / 32] = reference_kl;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 0; w < kWarps; ++w) {
    s.policy_cross += warps[0][w];
    s.reference_cross += warps[1][w];
  }
}

// To the policy's own place, or where G is no A to p.gradient.
template <class A, class G, int kN, Divergence kKind>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const __grid_constant__ ConsistencyParams p) {
  const A* policy = static_cast<const A*>(p.policy) + int64_t{blockIdx.x} * p.columns;
  const A* reference = static_cast<const A*>(p.reference) + int64_t{blockIdx.x} * p.columns;
  G* out = static_cast<G*>(std::is_same_v<A, G> ? p.policy : p.gradient) + int64_t{blockIdx.x} * p.columns;
  const Constants<A> row = constants_of<A>(p.state[blockIdx.x], kKind);
  const A beta = static_cast<A>(p.beta);
  const A scale = static_cast<A>((kKind == Divergence::kMixture ? 1 - p.beta : 1) / p.temperature);
  for (int64_t c = int64_t{threadIdx.x} * kN; c < p.columns; c += kThreads * kN) {
    A zq[kN], zp[kN], g[kN];
    load_values(zq, policy + c);
    load_values(zp, reference + c);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const A q = row.q.probability(zq[i]);
      if constexpr (kKind == Divergence::kForward) {
        g[i] = q - row.p.probability(zp[i]);
      } else {
        const A log_q = row.q.log_probability(zq[i]), log_p = row.p.log_probability(zp[i]);
        const A gap = kKind == Divergence::kReverse ? log_q - log_p : MixtureGaps<A>(log_p, log_q, beta).policy;
        g[i] = times(q, gap - row.center);
      }
      g[i] *= scale;
    }
    if constexpr (std::is_same_v<A, G>) {
      store_values(out + c, g);
    } else {
      store_pack(out + c, pack_of<G, kN>(g));
    }
  }
}

__global__ void __launch_bounds__(kThreads) result_kernel(const __grid_constant__ ConsistencyResultParams p) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < p.rows) consistency_result(p, row);
}

template <class A, int kWidth>
struct Width {
  using type = A;
  static constexpr int value = kWidth;
};
template <Divergence kKind>
struct Kind {
  static constexpr Divergence value = kKind;
};

// Calls fn(Width<type of the logits, words in a pack>) for what the pointers and the row length allow.
template <class Fn>
void with_width(const ConsistencyParams& p, const Fn& fn) {
  const bool wide = p.columns % 4 == 0 && is_aligned16(p.policy) && is_aligned16(p.reference) &&
                    is_aligned16(p.policy_bias) && is_aligned16(p.reference_bias);
  if (p.dtype == Dtype::kDouble) {
    fn(Width<double, 1>());
  } else if (wide) {
    fn(Width<float, 4>());
  } else {
    fn(Width<float, 1>());
  }
}
template <class Fn>
void with_kind(Divergence kind, const Fn& fn) {
  if (kind == Divergence::kForward) return fn(Kind<Divergence::kForward>());
  if (kind == Divergence::kReverse) return fn(Kind<Divergence::kReverse>());
  fn(Kind<Divergence::kMixture>());
}

template <class Kernel>
void launch_rows(const Kernel& kernel, const ConsistencyParams& p, cudaStream_t stream) {
  launch(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0, stream, p);
}

}  // namespace

void consistency_statistics_cuda(const ConsistencyParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  with_width(p, [&](auto width) {
    with_kind(p.kind, [&](auto kind) {
      using W = decltype(width);
      launch_rows(statistics_kernel<typename W::type, W::value, decltype(kind)::value>, p, stream);
    });
  });
}

void consistency_mixture_cuda(const ConsistencyParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  with_width(p, [&](auto width) {
    using W = decltype(width);
    launch_rows(mixture_kernel<typename W::type, W::value>, p, stream);
  });
}

void consistency_gradient_cuda(const ConsistencyParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return;
  with_kind(p.kind, [&](auto kind) {
    constexpr Divergence kKind = decltype(kind)::value;
    const auto rounded = [&](auto element) {
      using G = decltype(element);
      const bool wide = p.columns % kPackWidth<G> == 0 && is_aligned16(p.policy) && is_aligned16(p.reference) &&
                        is_aligned16(p.gradient);
      launch_rows(wide ? gradient_kernel<float, G, kPackWidth<G>, kKind> : gradient_kernel<float, G, 1, kKind>, p,
                  stream);
    };
    if (p.gradient != nullptr) return p.gradient_dtype == Dtype::kHalf ? rounded(Half{}) : rounded(BFloat16{});
    with_width(p, [&](auto width) {
      using W = decltype(width);
      launch_rows(gradient_kernel<typename W::type, typename W::type, W::value, kKind>, p, stream);
    });
  });
}

void consistency_result_cuda(const ConsistencyResultParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch(result_kernel, dim3(static_cast<unsigned>((p.rows + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, p);
}

}  // namespace vico
