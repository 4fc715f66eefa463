// consistency: the divergence of a policy's next-token distribution q from a reference's p, and its gradient for the
// policy's logits, over chunks of the vocabulary.
//
//   z = (logits + bias) / temperature of each model, p = softmax(reference z), q = softmax(policy z), over the
//   vocabulary kForward   L = KL(p || q)                               dL/dlogit = (q - p) / temperature kReverse   L =
//   KL(q || p)                               dL/dlogit = q (log q - log p - L) / temperature kMixture   L = beta KL(p
//   || m) + (1 - beta) KL(q || m)  dL/dlogit = (1 - beta) q (log q - log m - KL(q || m))
//              with m = beta p + (1 - beta) q                           / temperature
//
// A row is a token. Each chunk of the vocabulary is first taken into the row's running maxima and sums (statistics); a
// mixture, which needs the normalised p and q, then sums its divergences in another round; the gradient is the last
// round. 0 log 0 is 0, so words whose logits are -inf in both models count for nothing.
#pragma once

#include <cmath>

#include "common/cpu_arch.h"
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

inline double policy_lse(const ConsistencyRow& r) { return r.policy_max + std::log(r.policy_sum); }
inline double reference_lse(const ConsistencyRow& r) { return r.reference_max + std::log(r.reference_sum); }

// KL(q || p), or KL(q || m) for a mixture: what the gradient subtracts. Not used by kForward.
inline double policy_divergence(const ConsistencyRow& r, Divergence kind) {
  if (kind == Divergence::kMixture) return r.policy_cross;
  return r.policy_cross / r.policy_sum - policy_lse(r) + reference_lse(r);
}

inline double divergence(const ConsistencyRow& r, Divergence kind, double beta) {
  switch (kind) {
    case Divergence::kForward:
      return r.reference_cross / r.reference_sum - reference_lse(r) + policy_lse(r);
    case Divergence::kReverse:
      return policy_divergence(r, kind);
    default:
      return beta * r.reference_cross + (1 - beta) * r.policy_cross;
  }
}

struct ConsistencyParams {
  Dtype dtype = Dtype::kFloat;  // of logits and biases: kFloat or kDouble
  Divergence kind = Divergence::kForward;
  double beta = 0;  // of kMixture, strictly between 0 and 1
  double temperature = 1;
  int64_t columns = 0;  // words in this chunk
  // [rows, columns], contiguous. statistics reads logits and leaves z; gradient leaves dL/dlogit in `policy`.
  void* policy = nullptr;
  void* reference = nullptr;
  const void* policy_bias = nullptr;     // [columns]; null: none. Read by statistics alone
  const void* reference_bias = nullptr;  // [columns]; null: none
  ConsistencyRow* state = nullptr;       // [rows]; changed by statistics and mixture
};

// Rows [begin, end).
VICO_CPU_KERNEL(consistency_statistics, const ConsistencyParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(consistency_mixture, const ConsistencyParams&, int64_t begin, int64_t end)
VICO_CPU_KERNEL(consistency_gradient, const ConsistencyParams&, int64_t begin, int64_t end)

}  // namespace vico
