// The CUDA kernels of bias_gelu against plain loops in double, the dropout mask drawn element by element.
#include "bias_gelu/bias_gelu_cuda.cu"
#include "common/column_sum_cuda.cu"
#include "cuda_on_host/tests/dtype_of.h"
#include "cuda_on_host/tests/harness.h"

namespace {

using namespace coh_test;
using coh::Buffer;
using coh::expect;
using vico::accumulate_t;

struct Problem {
  int64_t rows, columns;
  bool bias = true;
  double dropout = 0;
  size_t offset = 0;           // elements before the first, of every buffer
  bool seed_by_value = false;  // else on the device
  bool element_bias = false;   // the bias in the type of x
};

// Packs and single elements; rows of less than a warp and of several slabs; dropout drawn by fours and one by one.
const Problem kProblems[] = {
    {1, 1},
    {3, 5},
    {2, 8, true, 0.5},
    {6, 64, true, 0.25},
    {5, 96, true, 0.1, 0, true},
    {7, 40, true, 0.3},
    {5, 64, true, 0.3, 1},
    {9, 1056, true, 0.1},
    {1, 1, false},
    {4, 24, false, 0.4},
    {3, 32, false, 0.4},
    {5, 7, false, 0.4, 3},
    {70, 16},
    {0, 8},
    {3, 33, true, 1.0},
    {11, 72, true, 0, 0, false, true},
    {5, 9, true, 0.2, 0, false, true},
};

vico::DropoutMask mask_of(const Problem& p, const Buffer<int64_t>& seed) {
  vico::DropoutMask mask;
  if (p.dropout == 0) return mask;
  mask.active = true;
  mask.keep_below = static_cast<uint32_t>(std::min(std::round((1 - p.dropout) * 4294967296.0), 4294967295.0));
  mask.scale = p.dropout < 1 ? 1 / (1 - p.dropout) : 0;
  if (p.seed_by_value) {
    mask.seed = static_cast<uint64_t>(seed[0]);
  } else {
    mask.seed_on_device = seed.data();
  }
  return mask;
}

double keep(const Problem& p, const vico::DropoutMask& mask, int64_t e) {
  if (!mask.active) return 1;
  const uint64_t counter = static_cast<uint64_t>(e / 32 * 8 + e % 8);
  uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  vico::philox4x32_10(words, mask.current_seed());
  return words[e % 32 / 8] < mask.keep_below ? 1 / (1 - p.dropout) : 0;
}

template <class Fn>
void for_every_problem(const Fn& fn) {
  coh::Random random(5);
  int number = 0;
  for (const Problem& p : kProblems) {
    try {
      fn(p, random);
    } catch (const std::exception& e) {
      throw std::runtime_error("problem " + std::to_string(number) + ": " + e.what());
    }
    ++number;
  }
}

// Normal numbers, and the same in the type of x if the problem's bias is of that type.
template <class T>
struct Bias {
  Buffer<accumulate_t<T>> values;
  Buffer<T> elements;
  bool as_elements;

  Bias(const Problem& p, coh::Random& random)
      : values(static_cast<size_t>(p.columns), p.offset),
        elements(p.element_bias ? values.size() : 0, p.offset),
        as_elements(p.element_bias && sizeof(T) == 2) {
    coh::fill_normal(values, random);
    for (size_t c = 0; c < elements.size(); ++c) {
      elements[c] = coh::element_from<T>(static_cast<double>(values[c]));
      values[c] = static_cast<accumulate_t<T>>(coh::element_value(elements[c]));
    }
  }
  const void* data() const { return as_elements ? static_cast<const void*>(elements.data()) : values.data(); }
};

template <class T>
void forward(bool in_place) {
  for_every_problem([&](const Problem& problem, coh::Random& random) {
    using A = accumulate_t<T>;
    const size_t size = static_cast<size_t>(problem.rows * problem.columns);
    Buffer<T> x(size, problem.offset), out(in_place ? 0 : size, problem.offset);
    Buffer<int64_t> seed(1);
    coh::fill_normal(x, random, 2);
    const Bias<T> given_bias(problem, random);
    const Buffer<A>& bias = given_bias.values;
    seed[0] = static_cast<int64_t>(random.bits());
    std::vector<T> before(x.data(), x.data() + size);
    vico::BiasGeluParams p;
    p.dtype = kDtype<T>;
    p.columns = problem.columns;
    p.elements = static_cast<int64_t>(size);
    p.x = x.data();
    p.bias = problem.bias ? given_bias.data() : nullptr;
    p.element_bias = given_bias.as_elements;
    Buffer<T>& result = in_place ? x : out;
    p.out = result.data();
    p.mask = mask_of(problem, seed);
    vico::bias_gelu_cuda(p, nullptr);
    for (size_t e = 0; e < size; ++e) {
      const double z = coh::element_value(before[e]) + (problem.bias ? static_cast<double>(bias[e % bias.size()]) : 0);
      const double factor = keep(problem, p.mask, static_cast<int64_t>(e));
      const double wanted = factor == 0 ? 0 : z * 0.5 * std::erfc(-z * 0.70710678118654752440) * factor;
      const double error = std::fabs(coh::element_value(result[e]) - wanted);
      // exp(-z^2 / 2) carries the rounding of its argument; halves below 2^-14 have an absolute spacing.
      expect(error <= 2 * coh::kEpsilon<T> * std::fabs(wanted) + 0x1p-25 * coh::kEpsilon<T> / 0x1p-11 +
                          (8 + z * z) * coh::kEpsilon<A> * std::fabs(wanted),
             "element %zu is off by %g of %g", e, error, wanted);
    }
  });
}

template <class T>
void backward() {
  for_every_problem([](const Problem& problem, coh::Random& random) {
    using A = accumulate_t<T>;
    const size_t size = static_cast<size_t>(problem.rows * problem.columns);
    const size_t columns = static_cast<size_t>(problem.columns);
    Buffer<T> x(size, problem.offset), grad_out(size, problem.offset), grad_x(size, problem.offset);
    Buffer<A> grad_bias(columns);
    Buffer<int64_t> seed(1);
    coh::fill_normal(x, random, 2);
    coh::fill_normal(grad_out, random);
    const Bias<T> given_bias(problem, random);
    const Buffer<A>& bias = given_bias.values;
    seed[0] = static_cast<int64_t>(random.bits());
    vico::BiasGeluBackwardParams p;
    p.dtype = kDtype<T>;
    p.columns = problem.columns;
    p.elements = static_cast<int64_t>(size);
    p.chunk_rows = vico::cuda_chunk_rows(problem.rows, problem.columns, p.dtype, vico::kCudaBackwardRows);
    const int64_t chunks = vico::chunk_count(problem.rows, p.chunk_rows);
    Buffer<A> partials(static_cast<size_t>(chunks) * columns);
    p.grad_out = grad_out.data();
    p.x = x.data();
    p.bias = problem.bias ? given_bias.data() : nullptr;
    p.element_bias = given_bias.as_elements;
    p.grad_x = grad_x.data();
    p.partials = problem.bias ? partials.data() : nullptr;
    p.mask = mask_of(problem, seed);
    vico::bias_gelu_backward_cuda(p, nullptr);
    std::vector<double> wanted_bias(columns), magnitude(columns);
    for (size_t e = 0; e < size; ++e) {
      const double z = coh::element_value(x[e]) + (problem.bias ? static_cast<double>(bias[e % columns]) : 0);
      const double slope =
          0.5 * std::erfc(-z * 0.70710678118654752440) + z * std::exp(-z * z / 2) * 0.39894228040143267794;
      const double factor = keep(problem, p.mask, static_cast<int64_t>(e));
      const double g = factor == 0 ? 0 : coh::element_value(grad_out[e]) * factor;
      const double error = std::fabs(coh::element_value(grad_x[e]) - g * slope);
      // The slope is a difference near its zero: absolute there.
      expect(error <= 2 * coh::kEpsilon<T> * std::fabs(g * slope) + 0x1p-25 * coh::kEpsilon<T> / 0x1p-11 +
                          8 * coh::kEpsilon<A> * std::fabs(g),
             "gradient %zu is off by %g of %g", e, error, g * slope);
      wanted_bias[e % columns] += g * slope;
      magnitude[e % columns] += std::fabs(g);
    }
    if (!problem.bias) return;
    vico::ColumnSumParams sum;
    sum.dtype = kDtype<A>;
    sum.columns = problem.columns;
    sum.chunks = chunks;
    sum.chunk_stride = problem.columns;
    sum.partials = partials.data();
    sum.out = grad_bias.data();
    vico::combine_chunks_cuda(sum, nullptr);
    for (size_t c = 0; c < columns; ++c) {
      const double error = std::fabs(coh::element_value(grad_bias[c]) - wanted_bias[c]);
      expect(error <= 16 * coh::kEpsilon<A> * magnitude[c], "bias gradient %zu is off by %g", c, error);
    }
  });
}

}  // namespace

COH_CASE(forward_bfloat16) { forward<vico::BFloat16>(false); }
COH_CASE(forward_half) { forward<vico::Half>(false); }
COH_CASE(forward_float) { forward<float>(false); }
COH_CASE(forward_double) { forward<double>(false); }
COH_CASE(in_place_bfloat16) { forward<vico::BFloat16>(true); }
COH_CASE(in_place_float) { forward<float>(true); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }

COH_MAIN
