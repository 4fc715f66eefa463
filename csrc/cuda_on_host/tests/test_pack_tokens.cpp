// The CUDA kernels of pack_tokens against its definition, bit for bit where nothing is added; and plans of other tiles,
// which the kernels must not follow.
#include <memory>

#include "common/column_sum_cuda.cu"
#include "cuda_on_host/tests/dtype_of.h"
#include "cuda_on_host/tests/harness.h"
#include "pack_tokens/pack_tokens_cuda.cu"

namespace {

using namespace coh_test;
using coh::Buffer;
using coh::expect;
using vico::accumulate_t;

struct Problem {
  const char* tiles;  // in packed order: f full, c compressed
  int64_t full_tokens, compressed_tokens, hidden;
  bool biases = true;
  size_t offset = 0;
};

const Problem kProblems[] = {
    {"f", 1, 1, 1},      {"fcfc", 4, 1, 8},       {"ccf", 6, 5, 24, false},
    {"cfffc", 9, 2, 40}, {"ffc", 4, 3, 7},        {"cf", 5, 2, 16, true, 1},
    {"fc", 7, 3, 2056},  {"fff", 3, 1, 8, false}, {"cc", 3, 2, 16},
    {"", 4, 1, 8},       {"fc", 4, 1, 0},
};

struct Plan {
  vico::PackShape shape;
  Buffer<int64_t> cu_tokens, order;

  explicit Plan(const Problem& p) : cu_tokens(std::strlen(p.tiles) + 1), order(std::strlen(p.tiles)) {
    const size_t tiles = std::strlen(p.tiles);
    for (size_t t = 0; t < tiles; ++t) (p.tiles[t] == 'f' ? shape.full_tiles : shape.compressed_tiles) += 1;
    shape.full_tokens = p.full_tokens;
    shape.compressed_tokens = p.compressed_tokens;
    shape.hidden = p.hidden;
    cu_tokens[0] = 0;
    size_t full = 0, compressed = static_cast<size_t>(shape.full_tiles);
    for (size_t t = 0; t < tiles; ++t) {
      const bool is_full = p.tiles[t] == 'f';
      order[is_full ? full++ : compressed++] = static_cast<int64_t>(t);
      cu_tokens[t + 1] = cu_tokens[t] + (is_full ? p.full_tokens : p.compressed_tokens);
    }
    shape.first_row = cu_tokens.data();
    shape.order = order.data();
  }
  size_t full_size() const { return static_cast<size_t>(shape.full_rows() * shape.hidden); }
  size_t compressed_size() const { return static_cast<size_t>(shape.compressed_rows() * shape.hidden); }

  // Calls fn(is_full, source row, packed row, tile) for every row, from the definition alone.
  template <class Fn>
  void for_every_row(const Problem& p, const Fn& fn) const {
    int64_t full = 0, compressed = 0, packed = 0;
    for (const char* t = p.tiles; *t; ++t) {
      const int64_t tokens = *t == 'f' ? p.full_tokens : p.compressed_tokens;
      const size_t tile = static_cast<size_t>(t - p.tiles);
      for (int64_t j = 0; j < tokens; ++j) fn(*t == 'f', *t == 'f' ? full++ : compressed++, packed++, tile);
    }
  }
};

template <class Fn>
void for_every_problem(const Fn& fn) {
  coh::Random random(7);
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

// A buffer with other rows too: tiles from its last rows to its first, a free row after each.
struct Places {
  Buffer<int64_t> first_row;

  explicit Places(const Problem& p, vico::PackShape& shape) : first_row(std::strlen(p.tiles)) {
    for (size_t t = first_row.size(); t-- > 0;) {
      first_row[t] = shape.buffer_rows;
      shape.buffer_rows += (p.tiles[t] == 'f' ? p.full_tokens : p.compressed_tokens) + 1;
    }
    shape.packed = false;
    shape.first_row = first_row.data();
  }
};

// Packed, or into a buffer with `padding` elements between its rows, which must stay as they were.
template <class T>
void forward(bool packed = true, size_t padding = 0) {
  for_every_problem([&](const Problem& problem, coh::Random& random) {
    using A = accumulate_t<T>;
    Plan plan(problem);
    std::unique_ptr<Places> places;
    if (!packed) places = std::make_unique<Places>(problem, plan.shape);
    const size_t hidden = static_cast<size_t>(problem.hidden), stride = hidden + padding;
    Buffer<T> full(plan.full_size(), problem.offset), compressed(plan.compressed_size(), problem.offset);
    Buffer<T> out(static_cast<size_t>(packed ? plan.shape.rows() : plan.shape.buffer_rows) * stride, problem.offset);
    Buffer<A> full_bias(hidden, problem.offset), compressed_bias(hidden, problem.offset);
    coh::fill_normal(full, random);
    coh::fill_normal(compressed, random);
    coh::fill_normal(full_bias, random);
    coh::fill_normal(compressed_bias, random);
    Buffer<T> element_bias(hidden, problem.offset);  // of the compressed tiles, in 16 bits
    if (sizeof(T) == 2) {
      coh::fill_normal(element_bias, random);
      for (size_t c = 0; c < hidden; ++c) compressed_bias[c] = static_cast<A>(coh::element_value(element_bias[c]));
    }
    vico::PackTokensParams p;
    p.shape = plan.shape;
    p.dtype = kDtype<T>;
    p.full = full.data();
    p.compressed = compressed.data();
    p.full_bias = problem.biases ? full_bias.data() : nullptr;
    p.compressed_bias = problem.biases ? compressed_bias.data() : nullptr;
    p.element_compressed_bias = sizeof(T) == 2;
    if (problem.biases && p.element_compressed_bias) p.compressed_bias = element_bias.data();
    p.out = out.data();
    p.out_stride = static_cast<int64_t>(stride);
    T untouched;
    if (out.size() > 0) std::memcpy(&untouched, &out[0], sizeof(T));
    vico::pack_tokens_cuda(p, nullptr);
    std::vector<bool> written(out.size());
    plan.for_every_row(problem, [&](bool is_full, int64_t row, int64_t packed_row, size_t tile) {
      const int64_t place = packed ? packed_row : places->first_row[tile] + packed_row - plan.cu_tokens[tile];
      for (size_t c = 0; c < hidden; ++c) {
        const size_t to = static_cast<size_t>(place) * stride + c;
        const T x = (is_full ? full : compressed)[static_cast<size_t>(row) * hidden + c];
        const T got = out[to];
        written[to] = true;
        // One addition in the sum type and one rounding: exact arithmetic gives the same bits.
        const A sum = static_cast<A>(coh::element_value(x)) + (is_full ? full_bias : compressed_bias)[c];
        const T wanted = problem.biases ? coh::element_from<T>(static_cast<double>(sum)) : x;
        expect(!std::memcmp(&wanted, &got, sizeof(T)), "row %lld, column %zu", static_cast<long long>(place), c);
      }
    });
    for (size_t i = 0; i < out.size(); ++i) {
      expect(written[i] || !std::memcmp(&out[i], &untouched, sizeof(T)), "element %zu of the output was written", i);
    }
  });
}

template <class T>
void backward() {
  for_every_problem([](const Problem& problem, coh::Random& random) {
    using A = accumulate_t<T>;
    const Plan plan(problem);
    const vico::PackShape& s = plan.shape;
    const size_t hidden = static_cast<size_t>(problem.hidden), all = plan.full_size() + plan.compressed_size();
    Buffer<T> grad_out(all, problem.offset), full(plan.full_size(), problem.offset);
    Buffer<T> compressed(plan.compressed_size(), problem.offset);
    coh::fill_normal(grad_out, random);
    vico::PackTokensBackwardParams p;
    p.shape = s;
    p.dtype = kDtype<T>;
    p.chunk_rows = 4;  // several chunks of each
    const int64_t chunks[2] = {vico::chunk_count(s.full_rows(), 4), vico::chunk_count(s.compressed_rows(), 4)};
    Buffer<A> partials(static_cast<size_t>(chunks[0] + chunks[1]) * hidden);
    p.grad_out = grad_out.data();
    p.grad_full = full.data();
    p.grad_compressed = compressed.data();
    p.partials = partials.data();
    vico::pack_tokens_backward_cuda(p, nullptr);
    std::vector<double> sum[2] = {std::vector<double>(hidden), std::vector<double>(hidden)}, magnitude = sum[0];
    plan.for_every_row(problem, [&](bool is_full, int64_t row, int64_t packed, size_t) {
      for (size_t c = 0; c < hidden; ++c) {
        const T wanted = grad_out[static_cast<size_t>(packed) * hidden + c];
        const T got = (is_full ? full : compressed)[static_cast<size_t>(row) * hidden + c];
        expect(!std::memcmp(&wanted, &got, sizeof(T)), "row %lld, column %zu", static_cast<long long>(row), c);
        sum[is_full ? 0 : 1][c] += coh::element_value(wanted);
        magnitude[c] += std::fabs(coh::element_value(wanted));
      }
    });
    for (int kind = 0; kind < 2; ++kind) {
      Buffer<A> bias(hidden);
      vico::ColumnSumParams column_sum;
      column_sum.dtype = kDtype<A>;
      column_sum.columns = problem.hidden;
      column_sum.chunks = chunks[kind];
      column_sum.chunk_stride = problem.hidden;
      column_sum.partials = partials.data() + (kind ? static_cast<size_t>(chunks[0]) * hidden : 0);
      column_sum.out = bias.data();
      vico::combine_chunks_cuda(column_sum, nullptr);
      for (size_t c = 0; c < hidden; ++c) {
        const double error = std::fabs(coh::element_value(bias[c]) - sum[kind][c]);
        expect(error <= 8 * coh::kEpsilon<A> * magnitude[c], "bias gradient %zu is off by %g", c, error);
      }
    }
  });
}

// Runs a plan, and places if there are any, that `spoil` has changed; it must be refused with `message`.
template <class Spoil>
void refused(const char* message, bool packed, const Spoil& spoil) {
  const Problem problem{"fcf", 4, 1, 24};
  Plan plan(problem);
  std::unique_ptr<Places> places;
  if (!packed) places = std::make_unique<Places>(problem, plan.shape);  // 7, 5 and 0 of 12 rows
  Buffer<float> full(plan.full_size()), compressed(plan.compressed_size());
  Buffer<float> out(12 * 24);
  spoil(plan, places ? places->first_row : plan.cu_tokens);
  vico::PackTokensParams p;
  p.out_stride = 24;
  p.shape = plan.shape;
  p.full = full.data();
  p.compressed = compressed.data();
  p.out = out.data();
  std::string error = "nothing was refused";
  try {
    vico::pack_tokens_cuda(p, nullptr);
  } catch (const std::exception& e) {
    error = e.what();
  }
  expect(error.find(message) != std::string::npos, "%s", error.c_str());
}

}  // namespace

COH_CASE(forward_bfloat16) { forward<vico::BFloat16>(); }
COH_CASE(forward_half) { forward<vico::Half>(); }
COH_CASE(forward_float) { forward<float>(); }
COH_CASE(forward_double) { forward<double>(); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }
COH_CASE(in_place_bfloat16) { forward<vico::BFloat16>(false, 8); }
COH_CASE(in_place_half) { forward<vico::Half>(false, 3); }
COH_CASE(in_place_float) { forward<float>(false); }
COH_CASE(in_place_double) { forward<double>(false, 2); }
COH_CASE(bad_plans) {
  using Rows = Buffer<int64_t>;
  for (bool packed : {true, false}) {
    refused("order must hold each tile of [0, 3) once, got 3", packed, [](Plan& plan, Rows&) { plan.order[1] = 3; });
    refused("order must hold each tile of [0, 3) once, got -1", packed, [](Plan& plan, Rows&) { plan.order[2] = -1; });
    refused("order must hold each tile of [0, 3) once, got 0", packed, [](Plan& plan, Rows&) { plan.order[1] = 0; });
  }
  refused("cu_tokens gives tile 2 rows 5 to 1073741824, but it is a full tile of 4 tokens", true,
          [](Plan&, Rows& cu_tokens) { cu_tokens[3] = 1 << 30; });
  refused("is the plan of another batch?", true, [](Plan& plan, Rows&) { std::swap(plan.order[0], plan.order[2]); });
  refused("cu_tokens", true, [](Plan&, Rows& cu_tokens) {  // all rows elsewhere
    for (size_t i = 0; i < cu_tokens.size(); ++i) cu_tokens[i] -= 9;
  });
  for (int64_t row : {int64_t{-1}, int64_t{9}, INT64_MAX, INT64_MIN}) {
    refused("but it has 4 tokens, and out 12 rows", false, [&](Plan&, Rows& first_row) { first_row[0] = row; });
  }
  for (int64_t row : {0, 3, 8}) {
    refused("and some of them to another tile too", false, [&](Plan&, Rows& first_row) { first_row[1] = row; });
  }
  refused("and some of them to another tile too", false, [&](Plan&, Rows& first_row) { first_row[2] = 7; });
}

COH_MAIN
