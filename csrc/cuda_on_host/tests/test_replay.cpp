// Which launches are replayed as graphs: the rule, with graphs that are mere numbers.
#include "common/replay_cuda.cu"
#include "cuda_on_host/tests/harness.h"

namespace {

using coh::expect;

// Graphs are pointers into here.
struct Graphs {
  int made[1000];
  int captures = 0, launches = 0, destroyed = 0;
  bool can_capture = true, can_launch = true;
  vico::ReplayPolicy<int*> policy;

  bool call(int key, int device = 0) {
    return policy.replay(
        vico::LaunchKey(key, 2.5, this), device,
        [&]() -> int* {
          if (!can_capture) return nullptr;
          made[captures] = key;
          return &made[captures++];
        },
        [&](int* graph) {
          expect(*graph == key, "the graph of %d is launched for %d", *graph, key);
          launches += can_launch;
          return can_launch;
        },
        [&](int* graph) {
          expect(*graph >= 0, "a graph is destroyed twice");
          *graph = -1;
          ++destroyed;
        });
  }
  void calls(int key, int times) {
    for (int i = 0; i < times; ++i) call(key);
  }
};

}  // namespace

COH_CASE(the_third_time_is_captured) {
  Graphs g;
  expect(!g.call(1) && !g.call(1) && g.captures == 0, "captured too early");
  expect(g.call(1) && g.call(1) && g.captures == 1 && g.launches == 2, "not captured the third time");
  expect(!g.call(1, 1) && !g.call(2), "another device or key has the graph");
}

COH_CASE(the_least_recently_used_gives_way) {
  Graphs g;
  for (int key = 0; key < vico::kMostGraphs; ++key) g.calls(key, 3);
  g.call(0);
  // Two new ones in turn, as the router's halves come.
  for (int i = 0; i < 3; ++i) {
    g.call(100);
    g.call(101);
  }
  expect(g.destroyed == 2 && g.call(100) && g.call(101) && g.call(0), "new keys starve, or a used graph gave way");
  expect(!g.call(1), "the oldest graph is still there");
  expect(!g.call(1) && g.call(1) && g.destroyed == 3, "what gave way cannot come again");
}

COH_CASE(what_comes_once_drives_out_no_graph) {
  Graphs g;
  g.calls(0, 3);
  for (int key = 1; key < 500; ++key) g.call(key);
  expect(g.call(0) && g.captures == 1 && g.destroyed == 0, "the graph is gone");
}

COH_CASE(failures_leave_the_launches) {
  Graphs g;
  g.can_capture = false;
  for (int i = 0; i < 9; ++i) expect(!g.call(1), "launched without a graph");
  g.can_capture = true;
  expect(!g.call(1), "what could not be captured is tried at every call");
  g.calls(2, 3);
  g.can_launch = false;
  expect(!g.call(2), "a launch that failed counts as one");
}

COH_CASE(keys_hold_every_field) {
  const double a = 0.0, b = -0.0;
  expect(vico::LaunchKey(1, a) == vico::LaunchKey(1, a), "equal keys differ");
  expect(!(vico::LaunchKey(1, a) == vico::LaunchKey(1, b)), "fields of other bits are equal");
  expect(!(vico::LaunchKey(1) == vico::LaunchKey(1, 0)), "keys of other lengths are equal");
  int launches = 0;
  vico::replayed(vico::LaunchKey(1), nullptr, [&](cudaStream_t) { ++launches; });
  expect(launches == 1, "the emulator launches one by one");
}

COH_MAIN
