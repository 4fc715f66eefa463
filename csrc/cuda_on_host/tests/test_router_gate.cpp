// The softmax at router_gate's end against plain loops in double. Its layers are other rooms' kernels, with programs of
// their own; python_tests/test_router.py runs the whole.
#include "common/layer_norm_cuda.cu"
#include "common/replay_cuda.cu"
#include "cuda_on_host/tests/dtype_of.h"
#include "cuda_on_host/tests/harness.h"
#include "router_gate/router_gate_cuda.cu"
#include "skinny_linear/skinny_linear_cuda.cu"

namespace {

using coh::Buffer;
using coh::element_value;
using coh::expect;

template <class T>
void gate() {
  using A = vico::accumulate_t<T>;
  coh::Random random(3);
  for (const auto& [rows, classes] : {std::pair<int64_t, int64_t>{1, 2}, {131, 2}, {3, 1}, {2, 7}, {0, 2}}) {
    constexpr int64_t kChannels = 8;
    Buffer<T> x(static_cast<size_t>(rows * kChannels)), weight(static_cast<size_t>(classes * kChannels)),
        bias(static_cast<size_t>(classes)), norm_weight(kChannels), norm_bias(kChannels),
        logits(static_cast<size_t>(rows * classes)), update(x.size());
    Buffer<A> probability(static_cast<size_t>(rows));
    for (Buffer<T>* t : {&x, &weight, &bias, &norm_weight, &norm_bias}) coh::fill_normal(*t, random);
    vico::RouterGateParams p;
    p.dtype = coh_test::kDtype<T>;
    p.rows = rows;
    p.channels = kChannels;
    p.classes = classes;
    p.x = x.data();
    p.norm_weight = norm_weight.data();
    p.norm_bias = norm_bias.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.eps = 1e-5;
    p.logits = logits.data();
    p.probability = probability.data();
    p.update = update.data();
    if (rows > 0) vico::router_gate_cuda(p, nullptr);
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
      double total = 0;
      const size_t first = row * static_cast<size_t>(classes);
      for (size_t i = 0; i < static_cast<size_t>(classes); ++i) {
        total += std::exp(element_value(logits[first + i]) - element_value(logits[first]));
      }
      const double got = static_cast<double>(probability[row]);
      expect(std::fabs(got - 1 / total) <= 8 * coh::kEpsilon<A>, "p %zu is %.9g, not %.9g", row, got, 1 / total);
    }
  }
}

}  // namespace

COH_CASE(bfloat16) { gate<vico::BFloat16>(); }
COH_CASE(half) { gate<vico::Half>(); }
COH_CASE(float32) { gate<float>(); }
COH_CASE(float64) { gate<double>(); }

COH_MAIN
