// The CUDA kernels of skinny_linear against plain loops in double, and against themselves: a row's bits depend on
// neither the other rows nor the schedule.
#include "cuda_on_host/tests/harness.h"
#include "skinny_linear/skinny_linear_cuda.cu"

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
  int64_t rows, groups, features, depth;
  bool columns = false;  // features next to each other in memory, not the depth
  bool bias = true;
  int64_t padding = 0;  // elements between rows (columns) of the weight
  size_t offset = 0;    // elements before the first, of every buffer
};

// One block and several in every direction, with tails; a depth of less than a step, and of more than all warps read
// ahead; what the packs cannot read.
const Problem kProblems[] = {
    {1, 1, 1, 1},
    {3, 1, 16, 8},
    {0, 1, 16, 8},
    {2, 1, 0, 8},
    {2, 1, 5, 0},
    {9, 2, 19, 40, false, false},
    {33, 1, 18, 72, false, true, 8},
    {2, 1, 17, 1064},
    {5, 3, 7, 13},
    {9, 1, 17, 24, false, true, 0, 1},
    {1, 1, 8, 4, true},
    {10, 2, 72, 20, true, true, 8},
    {33, 1, 8, 68, true, false},
    {9, 1, 40, 580, true},
    {4, 2, 6, 12, true},
    {9, 1, 40, 9, true, true, 3, 1},
};

// For tensor cores: features that make larger blocks.
const Problem kManyFeatures[] = {
    {18, 8, 257, 40, false, true, 8},
    {18, 1, 8200, 24},
    {17, 16, 520, 132, true, true, 8},  // each warp has all the depth, which is more than it reads ahead
};

size_t size(int64_t n) { return static_cast<size_t>(n); }

template <class T>
struct Layer {
  Problem problem;
  vico::SkinnyLinearParams p;
  int64_t weight_rows, weight_columns;
  Buffer<T> x, weight, bias, y;

  Layer(const Problem& d, coh::Random& random)
      : problem(d),
        weight_rows(d.columns ? d.depth : d.features),
        weight_columns(d.columns ? d.features : d.depth),
        x(size(d.rows * d.groups * d.depth), d.offset),
        weight(size(d.groups * weight_rows * (weight_columns + d.padding)), d.offset),
        bias(size(d.groups * d.features), d.offset),
        y(size(d.rows * d.groups * d.features), d.offset) {
    const int64_t pitch = weight_columns + d.padding;
    p.dtype = kDtype<T>;
    p.rows = d.rows;
    p.groups = d.groups;
    p.features = d.features;
    p.depth = d.depth;
    p.x = x.data();
    p.weight = weight.data();
    p.group_stride = weight_rows * pitch;
    p.feature_stride = d.columns ? 1 : pitch;
    p.depth_stride = d.columns ? pitch : 1;
    p.bias = d.bias ? bias.data() : nullptr;
    p.y = y.data();
    p.chained = true;  // every thread has to wait
    coh::fill_normal(x, random);
    coh::fill_normal(bias, random);
    for (int64_t i = 0; i < d.groups * weight_rows; ++i) {  // the padding stays NaN
      for (int64_t j = 0; j < weight_columns; ++j) weight[size(i * pitch + j)] = coh::element_from<T>(random.normal());
    }
  }

  void check() const {
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t g = 0; g < p.groups; ++g) {
        for (int64_t n = 0; n < p.features; ++n) {
          double sum = p.bias ? element_value(bias[size(g * p.features + n)]) : 0, magnitude = std::fabs(sum);
          for (int64_t k = 0; k < p.depth; ++k) {
            const double term =
                element_value(x[size((m * p.groups + g) * p.depth + k)]) *
                element_value(weight[size(g * p.group_stride + n * p.feature_stride + k * p.depth_stride)]);
            sum += term;
            magnitude += std::fabs(term);
          }
          const size_t i = size((m * p.groups + g) * p.features + n);
          const double tolerance =
              2 * coh::kEpsilon<T> * std::fabs(sum) + 8 * coh::kEpsilon<accumulate_t<T>> * magnitude;
          const double got = element_value(y[i]);
          expect(std::fabs(got - sum) <= tolerance, "y %zu is %.9g, not %.9g", i, got, sum);
        }
      }
    }
  }
};

template <class T, size_t kCount>
void linear(const Problem (&problems)[kCount]) {
  coh::Random random(9);
  int number = 0;
  for (const Problem& problem : problems) {
    try {
      Layer<T> d(problem, random);
      vico::skinny_linear_cuda(d.p, nullptr);
      d.check();
      // The last rows alone, in every number that takes another kernel or block.
      const std::vector<T> all(d.y.data(), d.y.data() + d.y.size());
      for (int64_t rows : {1, 9, 17}) {
        if (rows >= problem.rows) break;
        d.y.poison();
        vico::SkinnyLinearParams some = d.p;
        const int64_t skip = problem.rows - rows;
        some.rows = rows;
        // One row of x further on, 16-byte packs may no longer fit: these take the path of all rows only if they do.
        some.x = d.x.data() + skip * problem.groups * problem.depth;
        some.y = d.y.data() + skip * problem.groups * problem.features;
        if (vico::is_aligned16(some.x) != vico::is_aligned16(d.p.x)) continue;
        coh::config.seed += 1000;  // another schedule
        vico::skinny_linear_cuda(some, nullptr);
        coh::config.seed -= 1000;
        for (size_t i = size(skip * problem.groups * problem.features); i < all.size(); ++i) {
          expect(!std::memcmp(&all[i], &d.y[i], sizeof(T)), "y %zu has other bits among %lld rows", i,
                 static_cast<long long>(rows));
        }
      }
    } catch (const std::exception& e) {
      throw std::runtime_error("problem " + std::to_string(number) + ": " + e.what());
    }
    ++number;
  }
}

// A depth in parts: their sums in order, without bias, are those of the whole, and a row's bits its own.
template <class T>
void parts() {
  coh::Random random(11);
  for (const Problem& problem : {Problem{19, 1, 40, 2112}, Problem{9, 1, 1032, 2080, false, false, 8}}) {
    Layer<T> d(problem, random);
    vico::SkinnyLinearParams p = d.p;
    expect(vico::depth_parts(p) == 4, "the depth is cut into %lld", static_cast<long long>(vico::depth_parts(p)));
    p.parts = 4;
    p.bias = nullptr;
    const int64_t each = p.rows * p.features;
    Buffer<float> sums(size(p.parts * each));
    p.y = sums.data();
    vico::skinny_linear_cuda(p, nullptr);
    for (int64_t i = 0; i < each; ++i) {
      double sum = problem.bias ? element_value(d.bias[size(i % p.features)]) : 0;
      for (int64_t part = 0; part < p.parts; ++part) sum += static_cast<double>(sums[size(part * each + i)]);
      d.y[size(i)] = coh::element_from<T>(sum);
    }
    d.check();
    Buffer<float> last(size(p.parts * p.features));
    p.x = d.x.data() + (p.rows - 1) * p.depth;
    p.rows = 1;
    p.y = last.data();
    vico::skinny_linear_cuda(p, nullptr);
    for (int64_t i = 0; i < p.parts * p.features; ++i) {
      const size_t at = size(i / p.features * each + each - p.features + i % p.features);
      expect(!std::memcmp(&last[size(i)], &sums[at], sizeof(float)), "sum %zu has other bits alone", at);
    }
  }
  Layer<T> shallow(Problem{9, 1, 17, 1024}, random);
  expect(vico::depth_parts(shallow.p) == 1, "a shallow layer is cut");
}

}  // namespace

COH_CASE(parts_bfloat16) { parts<vico::BFloat16>(); }
COH_CASE(parts_half) { parts<vico::Half>(); }
COH_CASE(linear_bfloat16) { linear<vico::BFloat16>(kProblems); }
COH_CASE(linear_half) { linear<vico::Half>(kProblems); }
COH_CASE(many_features_bfloat16) { linear<vico::BFloat16>(kManyFeatures); }
COH_CASE(linear_float) { linear<float>(kProblems); }
COH_CASE(linear_double) { linear<double>(kProblems); }

COH_MAIN
