// The doors of consistency's kernels: checks, threads or launch. The whole loss, which multiplies chunks of hidden
// states and heads between them, is composed in vico_ext/ops/consistency.py.
#include <tuple>

#include "consistency/consistency.h"
#include "door/door.h"

namespace vico {
namespace {

// A word's cost in units of parallel_rows: two exponentials outweigh the memory traffic.
constexpr int64_t kWordCost = 8;

Divergence checked_kind(double beta, const char* op) {
  VICO_CHECK(beta >= 0 && beta <= 1, op, "beta must lie in [0, 1], got ", beta);
  return beta == 0 ? Divergence::kForward : beta == 1 ? Divergence::kReverse : Divergence::kMixture;
}

void check_state(const Tensor& state, int64_t rows, const char* op) {
  check_dtype(state, ScalarType::Double, "state", "float64", op);
  check_shape(state, {rows, kConsistencyFields}, "state", "[rows, 6]", op);
  VICO_CHECK(state.is_contiguous(), op, "state must be contiguous");
}

// Checks what all three kernels share: policy and reference [rows, words], state [rows, 6].
ConsistencyParams checked_params(const Tensor& policy, const Tensor& reference, const Tensor& state, double beta,
                                 double temperature, const char* op) {
  check_kernels(policy, op);
  check_device(reference, policy, "reference", "policy", op);
  check_device(state, policy, "state", "policy", op);
  ConsistencyParams p;
  VICO_CHECK(policy.scalar_type() == ScalarType::Float || policy.scalar_type() == ScalarType::Double, op,
             "policy must be float32 or float64, got ", dtype_string(policy));
  p.dtype = float_dtype(policy, "policy", op);
  check_same_dtype(reference, policy, "reference", "policy", op);
  check_shape(policy, {-1, -1}, "policy", "[rows, words]", op);
  check_shape(reference, {policy.size(0), policy.size(1)}, "reference", "[rows, words]", op);
  VICO_CHECK(policy.is_contiguous() && reference.is_contiguous(), op, "policy and reference must be contiguous");
  check_state(state, policy.size(0), op);
  p.kind = checked_kind(beta, op);
  p.beta = beta;
  VICO_CHECK(temperature > 0 && std::isfinite(temperature), op, "temperature must be positive and finite, got ",
             temperature);
  p.temperature = temperature;
  p.rows = policy.size(0);
  p.columns = policy.size(1);
  // NOTE: written only by the ops whose schema says so.
  p.policy = const_cast<void*>(policy.const_data_ptr());
  p.reference = const_cast<void*>(reference.const_data_ptr());
  p.state = static_cast<ConsistencyRow*>(const_cast<void*>(state.const_data_ptr()));
  return p;
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& policy, const char* name, const char* op) {
  if (!bias) return;
  check_device(*bias, policy, name, "policy", op);
  check_same_dtype(*bias, policy, name, "policy", op);
  check_shape(*bias, {policy.size(1)}, name, "[words]", op);
  VICO_CHECK(bias->is_contiguous(), op, name, " must be contiguous");
}

void consistency_statistics_op(Tensor policy, Tensor reference, Tensor state, const std::optional<Tensor>& policy_bias,
                               const std::optional<Tensor>& reference_bias, double beta, double temperature) {
  constexpr const char* kOp = "consistency_statistics_";
  ConsistencyParams p = checked_params(policy, reference, state, beta, temperature, kOp);
  check_bias(policy_bias, policy, "policy_bias", kOp);
  check_bias(reference_bias, policy, "reference_bias", kOp);
  if (policy.numel() == 0) return;
  p.policy_bias = data_or_null(policy_bias);
  p.reference_bias = data_or_null(reference_bias);
  if (on_cuda(policy)) {
    VICO_CUDA_CALL(consistency_statistics, p, policy);
  } else {
    parallel_rows(p.rows, p.columns * kWordCost,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(consistency_statistics, p, begin, end); });
  }
}

void consistency_mixture_op(const Tensor& policy, const Tensor& reference, Tensor state, double beta) {
  constexpr const char* kOp = "consistency_mixture_";
  const ConsistencyParams p = checked_params(policy, reference, state, beta, 1, kOp);
  VICO_CHECK(p.kind == Divergence::kMixture, kOp, "beta must lie strictly between 0 and 1, got ", beta);
  if (policy.numel() == 0) return;
  if (on_cuda(policy)) {
    VICO_CUDA_CALL(consistency_mixture, p, policy);
  } else {
    parallel_rows(p.rows, p.columns * kWordCost,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(consistency_mixture, p, begin, end); });
  }
}

void consistency_gradient_op(Tensor policy, const Tensor& reference, const Tensor& state, double beta,
                             double temperature, std::optional<Tensor> out) {
  constexpr const char* kOp = "consistency_gradient_";
  ConsistencyParams p = checked_params(policy, reference, state, beta, temperature, kOp);
  if (out) {
    VICO_CHECK(on_cuda(policy), kOp, "out is for CUDA alone: on the CPU the gradient takes the place of policy");
    check_device(*out, policy, "out", "policy", kOp);
    p.gradient_dtype = float_dtype(*out, "out", kOp);
    VICO_CHECK(element_size(p.gradient_dtype) == 2 && p.dtype == Dtype::kFloat, kOp,
               "out must be bfloat16 or float16 beside float32 policy, got ", dtype_string(*out), " beside ",
               dtype_string(policy));
    check_shape(*out, {p.rows, p.columns}, "out", "[rows, words]", kOp);
    VICO_CHECK(out->is_contiguous(), kOp, "out must be contiguous");
    VICO_CHECK(!may_share_memory(*out, policy) && !may_share_memory(*out, reference), kOp,
               "out must share no memory with policy or reference");
    p.gradient = out->mutable_data_ptr();
  }
  if (policy.numel() == 0) return;
  if (on_cuda(policy)) {
    VICO_CUDA_CALL(consistency_gradient, p, policy);
  } else {
    parallel_rows(p.rows, p.columns * kWordCost,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(consistency_gradient, p, begin, end); });
  }
}

std::tuple<Tensor, Tensor, Tensor> consistency_result_op(const Tensor& state, double beta) {
  constexpr const char* kOp = "consistency_result";
  check_kernels(state, kOp);
  check_shape(state, {-1, kConsistencyFields}, "state", "[rows, 6]", kOp);
  check_state(state, state.size(0), kOp);
  ConsistencyResultParams p;
  p.kind = checked_kind(beta, kOp);
  p.beta = beta;
  p.rows = state.size(0);
  Tensor loss = make_tensor(state, {p.rows}), lse = make_tensor(state, {p.rows}),
         ref_lse = make_tensor(state, {p.rows});
  if (p.rows == 0) return {loss, lse, ref_lse};
  p.state = static_cast<const ConsistencyRow*>(state.const_data_ptr());
  p.loss = static_cast<double*>(loss.mutable_data_ptr());
  p.policy_lse = static_cast<double*>(lse.mutable_data_ptr());
  p.reference_lse = static_cast<double*>(ref_lse.mutable_data_ptr());
  if (on_cuda(state)) {
    VICO_CUDA_CALL(consistency_result, p, state);
  } else {
    for (int64_t row = 0; row < p.rows; ++row) consistency_result(p, row);
  }
  return {loss, lse, ref_lse};
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("consistency_statistics_", TORCH_BOX(&vico::consistency_statistics_op));
  m.impl("consistency_mixture_", TORCH_BOX(&vico::consistency_mixture_op));
  m.impl("consistency_gradient_", TORCH_BOX(&vico::consistency_gradient_op));
  m.impl("consistency_result", TORCH_BOX(&vico::consistency_result_op));
}
