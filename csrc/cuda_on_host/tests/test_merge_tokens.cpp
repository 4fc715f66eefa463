// The CUDA kernels of merge_tokens: bit-equal, except for sums of rows used repeatedly.
#include "cuda_on_host/tests/decisions.h"
#include "merge_tokens/merge_tokens_cuda.cu"

namespace {

using namespace coh_test;

struct MergeProblem {
  int64_t embed_rows, token_rows, hidden;
  int64_t padding = 0;  // elements between rows
  size_t offset = 0;    // elements before the first
  std::vector<int64_t> source = {};
};

std::vector<MergeProblem> merge_problems() {
  std::vector<MergeProblem> all = {
      {1, 0, 1, 0, 0, {0, -1}},          {3, 2, 8, 0, 0, {4, -1, 0, 0, 3, 2}},
      {3, 2, 8, 8, 0, {4, -1, 2}},       {3, 2, 8, 3, 0, {1, 1, 1, 0, 1}},
      {3, 2, 24, 0, 1, {4, 3, 2, 1, 0}}, {2, 3, 5, 0, 0, {4, 4, -1, 0}},
      {0, 2, 2056, 0, 0, {1, -1, 1, 0}}, {2, 0, 129, 0, 0, {}},
      {2, 2, 0, 0, 0, {1, 2}},           {0, 0, 4, 0, 0, {-1, -1}},
  };
  MergeProblem many{2, 3, 16, 0, 0, {}};  // uses near and far, more than a warp searches at once
  coh::Random random(5);
  for (int i = 0; i < 150; ++i) many.source.push_back(random.below(16) < 12 ? 2 : random.below(6) - 1);
  all.push_back(many);
  return all;
}

template <class T>
struct Rows {
  int64_t rows, hidden, stride;
  Buffer<T> data;
  Rows(int64_t r, const MergeProblem& p, coh::Random& random)
      : rows(r),
        hidden(p.hidden),
        stride(p.hidden + p.padding),
        data(r > 0 && p.hidden > 0 ? static_cast<size_t>(r * stride - p.padding) : 0, p.offset) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < hidden; ++c) {
        if constexpr (std::is_integral_v<T>) {
          at(i, c) = static_cast<T>(random.bits());
        } else {
          at(i, c) = coh::element_from<T>(random.normal());
        }
      }
    }
  }
  T& at(int64_t i, int64_t c) { return data[static_cast<size_t>(i * stride + c)]; }
};

template <class T>
bool same(T a, T b) {
  return !std::memcmp(&a, &b, sizeof(T));
}

template <class T>
void forward() {
  coh::Random random(1);
  for (const MergeProblem& p : merge_problems()) {
    Rows<T> embeds(p.embed_rows, p, random), tokens(p.token_rows, p, random);
    Buffer<int64_t> source(p.source.size());
    fill(source, p.source);
    Buffer<T> out(p.source.size() * static_cast<size_t>(p.hidden), p.offset);
    vico::MergeTokensParams params;
    params.rows = static_cast<int64_t>(p.source.size());
    params.embed_rows = p.embed_rows;
    params.token_rows = p.token_rows;
    params.hidden = p.hidden;
    params.embed_stride = params.token_stride = p.hidden + p.padding;
    params.element_size = sizeof(T);
    params.embeds = reinterpret_cast<const char*>(embeds.data.data());
    params.tokens = reinterpret_cast<const char*>(tokens.data.data());
    params.source = source.data();
    params.out = reinterpret_cast<char*>(out.data());
    vico::merge_tokens_cuda(params, nullptr);
    for (size_t i = 0; i < p.source.size(); ++i) {
      for (int64_t c = 0; c < p.hidden; ++c) {
        const int64_t s = p.source[i];
        const T wanted = s < 0 ? T{} : s < p.embed_rows ? embeds.at(s, c) : tokens.at(s - p.embed_rows, c);
        expect(same(out[i * static_cast<size_t>(p.hidden) + static_cast<size_t>(c)], wanted), "row %zu channel %lld", i,
               static_cast<long long>(c));
      }
    }
  }
}

// text_rows: rows of tokens stay as they were.
template <class T>
void text() {
  coh::Random random(4);
  for (const MergeProblem& p : merge_problems()) {
    Rows<T> embeds(p.embed_rows, p, random), out(static_cast<int64_t>(p.source.size()), {1, 0, p.hidden}, random);
    Rows<T> before(out.rows, {1, 0, p.hidden}, random);
    if (out.data.size() > 0) {
      std::memcpy(static_cast<void*>(before.data.data()), out.data.data(), out.data.size() * sizeof(T));
    }
    Buffer<int64_t> source(p.source.size());
    fill(source, p.source);
    vico::MergeTokensParams params;
    params.rows = out.rows;
    params.embed_rows = p.embed_rows;
    params.token_rows = p.token_rows;
    params.hidden = p.hidden;
    params.embed_stride = p.hidden + p.padding;
    params.element_size = sizeof(T);
    params.embeds = reinterpret_cast<const char*>(embeds.data.data());
    params.source = source.data();
    params.out = reinterpret_cast<char*>(out.data.data());
    vico::merge_tokens_cuda(params, nullptr);
    for (int64_t i = 0; i < out.rows; ++i) {
      const int64_t s = p.source[static_cast<size_t>(i)];
      for (int64_t c = 0; c < p.hidden; ++c) {
        const T wanted = s < 0 ? T{} : s < p.embed_rows ? embeds.at(s, c) : before.at(i, c);
        expect(same(out.at(i, c), wanted), "row %lld channel %lld", static_cast<long long>(i),
               static_cast<long long>(c));
      }
    }
  }
}

template <class T>
void backward() {
  using A = vico::accumulate_t<T>;
  coh::Random random(2);
  for (const MergeProblem& p : merge_problems()) {
    Rows<T> grad_out(static_cast<int64_t>(p.source.size()), p, random);
    Buffer<int64_t> source(p.source.size());
    fill(source, p.source);
    for (int needed = 1; needed < 4; ++needed) {
      const bool need_embeds = needed & 1, need_tokens = needed & 2;
      const auto size = [&](bool needs, int64_t rows) {
        return needs ? static_cast<size_t>(rows * p.hidden) : size_t{0};
      };
      Buffer<T> grad_embeds(size(need_embeds, p.embed_rows), p.offset);
      Buffer<T> grad_tokens(size(need_tokens, p.token_rows), p.offset);
      Buffer<int64_t> uses(static_cast<size_t>(3 * (p.embed_rows + p.token_rows)));
      vico::MergeTokensBackwardParams params;
      params.dtype = kDtype<T>;
      params.rows = static_cast<int64_t>(p.source.size());
      params.embed_rows = p.embed_rows;
      params.token_rows = p.token_rows;
      params.hidden = p.hidden;
      params.grad_stride = grad_out.stride;
      params.need_embeds = need_embeds;
      params.need_tokens = need_tokens;
      params.grad_out = grad_out.data.data();
      params.grad_embeds = grad_embeds.data();
      params.grad_tokens = grad_tokens.data();
      params.source = source.data();
      params.uses = uses.data();
      vico::merge_tokens_backward_cuda(params, nullptr);
      const auto check = [&](const Buffer<T>& grad, int64_t rows, int64_t first) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < p.hidden; ++c) {
            int uses_of_row = 0;
            T wanted{};
            A total = 0;  // in ascending order, as the contract has it: equal in every bit
            for (size_t i = 0; i < p.source.size(); ++i) {
              if (p.source[i] != first + r) continue;
              const T g = grad_out.at(static_cast<int64_t>(i), c);
              total =
                  uses_of_row ? total + static_cast<A>(coh::element_value(g)) : static_cast<A>(coh::element_value(g));
              wanted = ++uses_of_row == 1 ? g : coh::element_from<T>(static_cast<double>(total));
            }
            expect(same(grad[static_cast<size_t>(r * p.hidden + c)], wanted), "row %lld channel %lld",
                   static_cast<long long>(first + r), static_cast<long long>(c));
          }
        }
      };
      if (need_embeds) check(grad_embeds, p.embed_rows, 0);
      if (need_tokens) check(grad_tokens, p.token_rows, p.embed_rows);
    }
  }
}

// T here only stands for its size.
template <class T>
void scatter() {
  coh::Random random(3);
  for (const auto& [hidden, padding, offset] : std::vector<std::tuple<int64_t, int64_t, size_t>>{
           {1, 0, 0}, {8, 0, 0}, {8, 8, 0}, {16, 3, 0}, {24, 0, 1}, {2056, 0, 0}}) {
    const MergeProblem p{6, 4, hidden, padding, offset};
    Rows<T> embeds(6, p, random), tokens(4, p, random), before(6, p, random);
    std::memcpy(static_cast<void*>(before.data.data()), embeds.data.data(), embeds.data.size() * sizeof(T));
    const std::vector<int64_t> where = {5, 0, 3, 1};
    Buffer<int64_t> index(4), owner(6);
    fill(index, where);
    vico::ScatterTokensParams params;
    params.rows = 4;
    params.embed_rows = 6;
    params.row_bytes = hidden * static_cast<int64_t>(sizeof(T));
    params.embed_stride = params.token_stride = embeds.stride * static_cast<int64_t>(sizeof(T));
    params.index = index.data();
    params.tokens = reinterpret_cast<const char*>(tokens.data.data());
    params.embeds = reinterpret_cast<char*>(embeds.data.data());
    params.owner = owner.data();
    vico::scatter_tokens_cuda(params, nullptr);
    std::vector<int64_t> from(6, -1);
    for (size_t i = 0; i < where.size(); ++i) from[static_cast<size_t>(where[i])] = static_cast<int64_t>(i);
    for (int64_t r = 0; r < 6; ++r) {
      for (int64_t c = 0; c < embeds.stride && r * embeds.stride + c < static_cast<int64_t>(embeds.data.size()); ++c) {
        const int64_t i = from[static_cast<size_t>(r)];
        const T wanted = i >= 0 && c < hidden ? tokens.at(i, c) : before.at(r, c);
        expect(same(embeds.at(r, c), wanted), "row %lld channel %lld", static_cast<long long>(r),
               static_cast<long long>(c));
      }
    }
    index[2] = 5;
    expect_refusal([&] { vico::scatter_tokens_cuda(params, nullptr); },
                   "index must not name a row twice, got 5 again at position 2");
    index[2] = 6;
    expect_refusal([&] { vico::scatter_tokens_cuda(params, nullptr); },
                   "index must lie in [0, 6), got 6 at position 2");
  }
}

}  // namespace

COH_CASE(forward_16_bits) { forward<uint16_t>(); }
COH_CASE(forward_32_bits) { forward<float>(); }
COH_CASE(forward_64_bits) { forward<double>(); }
COH_CASE(text_16_bits) { text<uint16_t>(); }
COH_CASE(text_32_bits) { text<float>(); }
COH_CASE(text_64_bits) { text<double>(); }
COH_CASE(backward_bfloat16) { backward<vico::BFloat16>(); }
COH_CASE(backward_half) { backward<vico::Half>(); }
COH_CASE(backward_float) { backward<float>(); }
COH_CASE(backward_double) { backward<double>(); }
COH_CASE(scatter_bytes) { scatter<uint8_t>(); }
COH_CASE(scatter_16_bits) { scatter<uint16_t>(); }
COH_CASE(scatter_32_bits) { scatter<float>(); }
COH_CASE(scatter_64_bits) { scatter<double>(); }

COH_CASE(bad_sources) {
  Buffer<float> rows(4), out(4);
  Buffer<int64_t> source(2), uses(6);
  source[0] = 0;
  source[1] = 2;
  vico::MergeTokensParams p;
  p.rows = p.embed_rows = p.hidden = p.embed_stride = p.token_stride = 2;
  p.element_size = 4;
  p.embeds = p.tokens = reinterpret_cast<const char*>(rows.data());
  p.source = source.data();
  p.out = reinterpret_cast<char*>(out.data());
  vico::MergeTokensBackwardParams b;
  b.rows = b.embed_rows = b.hidden = b.grad_stride = 2;
  b.need_embeds = true;
  b.grad_out = rows.data();
  b.grad_embeds = out.data();
  b.source = source.data();
  b.uses = uses.data();
  expect_refusal([&] { vico::merge_tokens_cuda(p, nullptr); }, "source must lie in [-1, 2), got 2 at position 1");
  expect_refusal([&] { vico::merge_tokens_backward_cuda(b, nullptr); },
                 "source must lie in [-1, 2), got 2 at position 1");
  source[1] = -2;
  expect_refusal([&] { vico::merge_tokens_cuda(p, nullptr); }, "source must lie in [-1, 2), got -2 at position 1");
  p.tokens = nullptr;
  expect_refusal([&] { vico::merge_tokens_cuda(p, nullptr); }, "source must lie in [-1, 2), got -2 at position 1");
}

COH_MAIN
