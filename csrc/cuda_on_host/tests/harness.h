// Test programs of cuda_on_host: named cases, run once for every seed of the scheduler.
//
//   PROGRAM [--seeds N] [--planted] [--list] [CASE...]
//
// --planted asks for the variant of a case that has a bug in it; the program must then fail.
#pragma once

#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

#include "common/dtype.h"
#include "cuda_on_host/runtime.h"

namespace coh {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};
#define COH_CASE(name)                                                  \
  static void case_##name();                                            \
  static const ::coh::Registration register_##name{#name, case_##name}; \
  static void case_##name()

inline bool planted = false;

template <class... Args>
void expect(bool ok, const char* format, Args... args) {
  if (ok) return;
  char text[256];
  if constexpr (sizeof...(Args) == 0) {
    std::snprintf(text, sizeof(text), "%s", format);
  } else {
    std::snprintf(text, sizeof(text), format, args...);
  }
  throw std::runtime_error(text);
}

// Deterministic numbers for inputs; not the scheduler's.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252ull) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() >> 8) % n; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

template <class T>
T element_from(double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return vico::from_float<T>(static_cast<float>(x));
  }
}
template <class T>
double element_value(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return static_cast<double>(vico::to_float(x));
  }
}
template <class T>
void fill_normal(Buffer<T>& b, Random& random, double scale = 1, double shift = 0) {
  for (size_t i = 0; i < b.size(); ++i) b[i] = element_from<T>(shift + scale * random.normal());
}
// Relative spacing of numbers of type T.
template <class T>
constexpr double kEpsilon = std::is_same_v<T, double>       ? 0x1p-53
                            : std::is_same_v<T, float>      ? 0x1p-24
                            : std::is_same_v<T, vico::Half> ? 0x1p-11
                                                            : 0x1p-8;

inline bool run_case(const Case& c, uint64_t seeds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const uint64_t first = config.seed;
  std::string error;
  for (uint64_t seed = first; seed < first + seeds && error.empty(); ++seed) {
    config.seed = seed;
    const uint64_t races = stats.races;
    try {
      c.run();
      if (stats.races != races) error = "races were found";
    } catch (const std::exception& e) {
      error = e.what();
    }
    if (!error.empty()) error = "seed " + std::to_string(seed) + ": " + error;
  }
  config.seed = first;
  const double s = std::chrono::duration<double>(Clock::now() - start).count();
  std::printf("%s %s (%.2f s)%s%s\n", error.empty() ? "ok  " : "FAIL", c.name, s, error.empty() ? "" : ": ",
              error.c_str());
  std::fflush(stdout);
  return error.empty();
}

inline int run_cases(int argc, char** argv) {
  configure_from_environment();
  uint64_t seeds = 1;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--list") {
      for (const Case& c : cases()) std::puts(c.name);
      return 0;
    }
    if (a == "--planted") {
      planted = true;
    } else if (a == "--seeds" && i + 1 < argc) {
      seeds = std::strtoull(argv[++i], nullptr, 10);
    } else {
      wanted.push_back(a);
    }
  }
  bool ok = true;
  size_t found = 0;
  for (const Case& c : cases()) {
    bool run = wanted.empty();
    for (const std::string& w : wanted) run = run || w == c.name;
    found += run;
    if (run) ok = run_case(c, seeds) && ok;
  }
  if (found == 0 || (!wanted.empty() && found != wanted.size())) {
    std::fprintf(stderr, "no such case\n");
    return 2;
  }
  for (const void* kernel : stats.kernels) std::printf("kernel %p\n", kernel);
  return ok ? 0 : 1;
}

}  // namespace coh

#define COH_MAIN \
  int main(int argc, char** argv) { return ::coh::run_cases(argc, argv); }
