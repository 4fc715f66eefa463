// consistency: the divergence of a policy's next-token distribution q from a reference's p, and its gradient for the
// policy's logits, over chunks of the vocabulary.
//
//   z = (logits + bias) / temperature of each model, p = softmax(reference z), q = softmax(policy z), over the
//   vocabulary
//
//   kForward:  L = KL(p || q)
//              dL/dlogit = (q - p) / temperature
//   kReverse:  L = KL(q || p)
//              dL/dlogit = q (log q - log p - L) / temperature
//   kMixture:  L = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
//              dL/dlogit = (1 - beta) q (log q - log m - KL(q || m)) / temperature
//
// A row is a token. Each chunk of the vocabulary is first taken into the row's running maxima and sums (statistics); a
// mixture, which needs the normalised p and q, then sums its divergences in another round; the gradient is the last
// round. 0 log 0 is 0, so words whose logits are -inf in both models count for nothing.
#pragma once

#include <cmath>

#include "common/cpu_arch.h"
#include "common/cuda_stream.h"
#include "common/dtype.h"

namespace vico {

enum class Divergence : int8_t { kForward, kReverse, kMixture };

// What is known of one token. Doubles, whatever the logits are: only sums within a chunk are kept in their type.
struct ConsistencyRow {
  double policy_max, policy_sum;        // over the words seen: max z, sum exp(z - max); -inf and 0 before the first
  double reference_max, reference_sum;  // likewise
  // kForward: sum exp(z_ref - reference_max) (z_ref - z_policy). kMixture: KL(p || m), so far.
  double reference_cross;
  // kReverse: sum exp(z_policy - policy_max) (z_policy - z_ref). kMixture: KL(q || m), so far.
  double policy_cross;
};
constexpr int64_t kConsistencyFields = sizeof(ConsistencyRow) / sizeof(double);

VICO_INLINE double policy_lse(const ConsistencyRow& r) { return r.policy_max + std::log(r.policy_sum); }
VICO_INLINE double reference_lse(const ConsistencyRow& r) { return r.reference_max + std::log(r.reference_sum); }

// KL(q || p), or KL(q || m) for a mixture: what the gradient subtracts. Not used by kForward.
VICO_INLINE double policy_divergence(const ConsistencyRow& r, Divergence kind) {
  if (kind == Divergence::kMixture) return r.policy_cross;
  return r.policy_cross / r.policy_sum - policy_lse(r) + reference_lse(r);
}

VICO_INLINE double divergence(const ConsistencyRow& r, Divergence kind, double beta) {
  switch (kind) {
    case Divergence::kForward:
      return r.reference_cross / r.reference_sum - reference_lse(r) + policy_lse(r);
    case Divergence::kReverse:
      return policy_divergence(r, kind);
    default:
      return beta * r.reference_cross + (1 - beta) * r.policy_cross;
  }
}

// What exp(z) is taken relative to: the maximum, unless there is none.
VICO_INLINE double base_of(double max) { return max == -HUGE_VAL ? 0 : max; }

// Moves sums that are relative to `max` to a larger maximum.
VICO_INLINE void raise_max(double& max, double new_max, double& sum, double& cross) {
  if (!(new_max > max)) return;
  const double factor = std::exp(max - new_max);  // of the first words: exp(-inf) = 0
  sum *= factor;
  cross *= factor;
  max = new_max;
}

struct ConsistencyParams {
  Dtype dtype = Dtype::kFloat;  // of logits and biases: kFloat or kDouble
  Divergence kind = Divergence::kForward;
  double beta = 0;  // of kMixture, strictly between 0 and 1
  double temperature = 1;
  int64_t rows = 0;
  int64_t columns = 0;  // words in this chunk
  // [rows, columns], contiguous. statistics reads logits and leaves z; gradient leaves dL/dlogit in `policy`, or, on
  // CUDA alone, rounded in `gradient`.
  void* policy = nullptr;
  void* reference = nullptr;
  void* gradient = nullptr;                 // [rows, columns], contiguous; null: none
  Dtype gradient_dtype = Dtype::kBFloat16;  // kBFloat16 or kHalf
  const void* policy_bias = nullptr;        // [columns]; null: none. Read by statistics alone
  const void* reference_bias = nullptr;     // [columns]; null: none
  ConsistencyRow* state = nullptr;          // [rows]; changed by statistics and mixture
};

struct ConsistencyResultParams {
  Divergence kind = Divergence::kForward;
  double beta = 0;
  int64_t rows = 0;
  const ConsistencyRow* state = nullptr;  // [rows], of the whole vocabulary
  double* loss = nullptr;                 // [rows], like the two below
  double* policy_lse = nullptr;
  double* reference_lse = nullptr;
};

// The result of one row, the same on every device.
VICO_INLINE void consistency_result(const ConsistencyResultParams& p, int64_t row) {
  p.loss[row] = divergence(p.state[row], p.kind, p.beta);
  p.policy_lse[row] = policy_lse(p.state[row]);
  p.reference_lse[row] = reference_lse(p.state[row]);
}

// Rows [begin, end).
VICO_CPU_KERNEL(consistency_statistics, const ConsistencyParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(consistency_mixture, const ConsistencyParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(consistency_gradient, const ConsistencyParams&, int64_t begin, int64_t end)

void consistency_statistics_cuda(const ConsistencyParams&, cudaStream_t);
void consistency_mixture_cuda(const ConsistencyParams&, cudaStream_t);
void consistency_gradient_cuda(const ConsistencyParams&, cudaStream_t);
void consistency_result_cuda(const ConsistencyResultParams&, cudaStream_t);

}  // namespace vico
