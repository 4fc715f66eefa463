// Which sequences of launches are kept as graphs: replay.h's rule, apart from what a graph is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/replay.h"

namespace vico {

// Graph: a pointer, null for none. Not for two threads at once.
template <class Graph>
class ReplayPolicy {
 public:
  static constexpr int kTimesBeforeCapture = 2;
  static constexpr size_t kMostSeen = 64;  // that are waited for to come again: what comes once drives out no graph

  // Whether a graph of the key's launches has been launched; where not, they are to be made one by one.
  //   capture() -> Graph, null where it cannot be done;  launch(Graph) -> bool;  destroy(Graph)
  template <class Capture, class Launch, class Destroy>
  bool replay(const LaunchKey& key, int device, const Capture& capture, const Launch& launch, const Destroy& destroy) {
    ++calls_;
    Sequence* sequence = find(graphs_, key, device);
    if (!sequence) {
      Sequence* seen = find(seen_, key, device);
      if (!seen) seen = &keep(seen_, kMostSeen, Sequence{key, device}, destroy);
      seen->last_use = calls_;
      if (seen->times++ != kTimesBeforeCapture) return false;  // before, or after a capture that failed
      const Graph graph = capture();
      if (!graph) return false;
      seen->times = 0;  // if the graph gives way, it may come again
      sequence = &keep(graphs_, kMostGraphs, Sequence{key, device, calls_, 0, graph}, destroy);
    }
    sequence->last_use = calls_;
    return launch(sequence->graph);
  }

 private:
  struct Sequence {
    LaunchKey key;
    int device = 0;
    uint64_t last_use = 0;  // in calls
    int times = 0;          // it was launched one by one
    Graph graph = nullptr;
  };

  // The sequence of a key among `some`; null where it is not there.
  static Sequence* find(std::vector<Sequence>& some, const LaunchKey& key, int device) {
    const auto at =
        std::find_if(some.begin(), some.end(), [&](const Sequence& q) { return q.device == device && q.key == key; });
    return at == some.end() ? nullptr : &*at;
  }
  // Puts a sequence among `some`; where there are `most`, in the place of the least recently used.
  template <class Destroy>
  static Sequence& keep(std::vector<Sequence>& some, size_t most, Sequence sequence, const Destroy& destroy) {
    if (some.size() < most) return some.emplace_back(std::move(sequence));
    Sequence& oldest = *std::min_element(some.begin(), some.end(),
                                         [](const Sequence& a, const Sequence& b) { return a.last_use < b.last_use; });
    if (oldest.graph) destroy(oldest.graph);
    return oldest = std::move(sequence);
  }

  std::vector<Sequence> seen_, graphs_;
  uint64_t calls_ = 0;
};

}  // namespace vico
