// Happens-before of the race checker: vector clocks of the running block's threads, and what they know of other blocks.
//
// Time inside a block flows through barriers and mbarriers. Between blocks it flows only as the PTX memory model lets
// relaxed atomics carry it: fence, atomic on one side; atomic on the same address, fence on the other.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace coh {

using VectorClock = std::vector<uint32_t>;
// For other blocks (by the order in which they ran): how far each of their threads is known to have come.
using Knowledge = std::map<int, std::shared_ptr<const VectorClock>>;

constexpr int kAsyncProxies = 64;  // slots behind the threads, one for each mbarrier

class Clocks {
 public:
  void begin_launch();
  void begin_block(int threads);

  int block() const { return block_; }
  int threads() const { return threads_; }
  uint32_t now(int thread) const { return clock_[thread][thread]; }
  // Whether `thread` of the running block has seen time `clock` of thread `other` of `block`.
  bool has_seen(int thread, int block, int other, uint32_t clock) const;
  // The same for what `other` did before a fence.proxy.async, of the running block.
  bool has_seen_fenced(int thread, int other, uint32_t clock) const { return fenced_[thread][other] >= clock; }
  const VectorClock& of(int thread) const { return clock_[thread]; }

  void join(const int* from, int n_from, const int* to, int n_to);
  int object(const void* p);
  void release(int object, int thread);
  void acquire(int object, int thread);
  void issue_async(int object, int thread);
  void complete_async(int object);
  void proxy_fence(int thread);
  void fence(int thread);
  void atomic(const void* p, int thread);

 private:
  int block_ = -1, threads_ = 0, slots_ = 0;
  bool fences_used_ = false;
  std::vector<VectorClock> clock_, fenced_;  // of each slot
  std::vector<VectorClock> object_clock_, object_fenced_;
  std::unordered_map<const void*, int> objects_;
  std::vector<Knowledge> known_, pending_, published_;  // pending: from atomics, not yet fenced
  std::unordered_map<const void*, Knowledge> atomics_;
};

}  // namespace coh
