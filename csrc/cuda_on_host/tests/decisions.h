// What the programs for routing, merging and compressing share: buffers from lists, and checks that must fail.
#pragma once

#include <functional>
#include <vector>

#include "cuda_on_host/tests/harness.h"

namespace coh_test {

using coh::Buffer;
using coh::expect;

template <class T>
constexpr vico::Dtype kDtype = std::is_same_v<T, double>           ? vico::Dtype::kDouble
                               : std::is_same_v<T, float>          ? vico::Dtype::kFloat
                               : std::is_same_v<T, vico::BFloat16> ? vico::Dtype::kBFloat16
                                                                   : vico::Dtype::kHalf;

// A list as device memory.
template <class T, class U>
void fill(Buffer<T>& to, const std::vector<U>& from) {
  expect(to.size() == from.size(), "a buffer of %zu for a list of %zu", to.size(), from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = static_cast<T>(from[i]);
}

template <class T, class U>
void expect_equal(const Buffer<T>& got, const std::vector<U>& wanted, const char* what) {
  expect(got.size() == wanted.size(), "%s: %zu elements, wanted %zu", what, got.size(), wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    expect(got[i] == static_cast<T>(wanted[i]), "%s: element %zu is %lld, wanted %lld", what, i,
           static_cast<long long>(got[i]), static_cast<long long>(wanted[i]));
  }
}

// The kernel ends with a message that has `text` in it.
inline void expect_refusal(const std::function<void()>& run, const char* text) {
  std::string said;
  try {
    run();
  } catch (const std::exception& e) {
    said = e.what();
  }
  expect(said.find(text) != std::string::npos, "wanted a refusal with '%s', got '%s'", text, said.c_str());
}

}  // namespace coh_test
