// The CUDA kernel of LayerNorm against plain loops in double: widths that fill registers, exceed them, and fit no pack.
#include "common/layer_norm_cuda.cu"
#include "cuda_on_host/tests/dtype_of.h"
#include "cuda_on_host/tests/harness.h"

namespace {

using coh::Buffer;
using coh::element_value;
using coh::expect;

struct Problem {
  int64_t rows, channels;
  bool residual = false;
  bool in_place = false;  // y is the residual, or else x
  size_t offset = 0;      // elements before the first, of every buffer
};

const Problem kProblems[] = {{1, 1},
                             {0, 8},
                             {3, 40, true},
                             {2, 1024, true, true},
                             {2, 13, true, true},
                             {2, 4104, false},
                             {1, 4096, false, true},
                             {2, 64, true, false, 1},
                             {1, 5003, true}};

template <class T>
void layer_norm() {
  coh::Random random(5);
  for (const Problem& d : kProblems) {
    const size_t size = static_cast<size_t>(d.rows * d.channels), channels = static_cast<size_t>(d.channels);
    Buffer<T> x(size, d.offset), residual(size, d.offset), weight(channels, d.offset), bias(channels, d.offset),
        y(size, d.offset);
    for (Buffer<T>* t : {&x, &residual, &weight, &bias}) coh::fill_normal(*t, random);
    const std::vector<T> before(x.data(), x.data() + size), added(residual.data(), residual.data() + size);
    vico::LayerNormParams p;
    p.dtype = coh_test::kDtype<T>;
    p.rows = d.rows;
    p.channels = d.channels;
    p.x = x.data();
    p.residual = d.residual ? residual.data() : nullptr;
    p.weight = weight.data();
    p.bias = bias.data();
    p.eps = 1e-5;
    Buffer<T>& out = !d.in_place ? y : d.residual ? residual : x;
    p.y = out.data();
    p.chained = true;  // every thread has to wait
    vico::layer_norm_cuda(p, nullptr);
    for (int64_t row = 0; row < d.rows; ++row) {
      const size_t first = static_cast<size_t>(row) * channels;
      double mean = 0, squares = 0;
      for (size_t c = 0; c < channels; ++c) mean += element_value(before[first + c]) / static_cast<double>(channels);
      for (size_t c = 0; c < channels; ++c) squares += std::pow(element_value(before[first + c]) - mean, 2);
      const double rstd = 1 / std::sqrt(squares / static_cast<double>(channels) + 1e-5);
      for (size_t c = 0; c < channels; ++c) {
        const double normal = (element_value(before[first + c]) - mean) * rstd * element_value(weight[c]);
        const double want = normal + element_value(bias[c]) + (d.residual ? element_value(added[first + c]) : 0);
        const double size_of_terms = std::fabs(normal) + std::fabs(element_value(bias[c])) + std::fabs(want) +
                                     std::fabs(mean * rstd * element_value(weight[c]));
        const double tolerance =
            2 * coh::kEpsilon<T> * std::fabs(want) + 32 * coh::kEpsilon<vico::accumulate_t<T>> * size_of_terms;
        const double got = element_value(out[first + c]);
        expect(std::fabs(got - want) <= tolerance, "%lld x %lld: y %zu is %.9g, not %.9g",
               static_cast<long long>(d.rows), static_cast<long long>(d.channels), first + c, got, want);
      }
    }
  }
}

// x in parts with a bias of their own: as x of their sum in float.
template <class T>
void in_parts() {
  coh::Random random(6);
  for (const Problem& d :
       {Problem{3, 1024, true}, Problem{2, 13}, Problem{1, 5003, true}, Problem{2, 4104, false, true}}) {
    const size_t size = static_cast<size_t>(d.rows * d.channels), channels = static_cast<size_t>(d.channels);
    constexpr size_t kParts = 3;
    Buffer<float> parts(kParts * size), sum(size), wide_weight(channels), wide_bias(channels), added(size), want(size);
    Buffer<T> part_bias(channels), residual(size), weight(channels), bias(channels), y(size);
    for (size_t i = 0; i < kParts * size; ++i) parts[i] = static_cast<float>(random.normal());
    for (Buffer<T>* t : {&part_bias, &residual, &weight, &bias}) coh::fill_normal(*t, random);
    for (size_t i = 0; i < size; ++i) {
      sum[i] = static_cast<float>(element_value(part_bias[i % channels]));
      for (size_t part = 0; part < kParts; ++part) sum[i] += parts[part * size + i];
      added[i] = static_cast<float>(element_value(residual[i]));
    }
    for (size_t i = 0; i < channels; ++i) {
      wide_weight[i] = static_cast<float>(element_value(weight[i]));
      wide_bias[i] = static_cast<float>(element_value(bias[i]));
    }
    vico::LayerNormParams p;
    p.dtype = coh_test::kDtype<T>;
    p.rows = d.rows;
    p.channels = d.channels;
    p.x = parts.data();
    p.parts = kParts;
    p.part_bias = part_bias.data();
    p.residual = d.residual ? residual.data() : nullptr;
    p.weight = weight.data();
    p.bias = bias.data();
    p.eps = 1e-5;
    p.y = y.data();
    p.chained = true;
    vico::layer_norm_cuda(p, nullptr);
    p.dtype = vico::Dtype::kFloat;
    p.x = sum.data();
    p.parts = 0;
    p.residual = d.residual ? added.data() : nullptr;
    p.weight = wide_weight.data();
    p.bias = wide_bias.data();
    p.y = want.data();
    vico::layer_norm_cuda(p, nullptr);
    for (size_t i = 0; i < size; ++i) {
      const double got = element_value(y[i]), wanted = static_cast<double>(want[i]);
      expect(std::fabs(got - wanted) <= coh::kEpsilon<T> * std::fabs(wanted) + 1e-5, "y %zu is %.9g, not %.9g", i, got,
             wanted);
    }
  }
}

}  // namespace

COH_CASE(in_parts_bfloat16) { in_parts<vico::BFloat16>(); }
COH_CASE(in_parts_half) { in_parts<vico::Half>(); }
COH_CASE(bfloat16) { layer_norm<vico::BFloat16>(); }
COH_CASE(half) { layer_norm<vico::Half>(); }
COH_CASE(float32) { layer_norm<float>(); }
COH_CASE(float64) { layer_norm<double>(); }

COH_MAIN
