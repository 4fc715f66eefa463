#include "cuda_on_host/clocks.h"

namespace coh {
namespace {

void join_into(VectorClock& a, const VectorClock& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (b[i] > a[i]) a[i] = b[i];
  }
}

void merge_into(Knowledge& a, const Knowledge& b) {
  for (const auto& [block, clock] : b) {
    auto& mine = a[block];
    if (mine == clock) continue;
    if (!mine) {
      mine = clock;
      continue;
    }
    auto merged = std::make_shared<VectorClock>(*mine);
    join_into(*merged, *clock);
    mine = std::move(merged);
  }
}

}  // namespace

void Clocks::begin_launch() {
  block_ = -1;
  fences_used_ = false;
  atomics_.clear();
}

void Clocks::begin_block(int threads) {
  ++block_;
  threads_ = threads;
  slots_ = threads + kAsyncProxies;
  const VectorClock zero(slots_, 0);
  clock_.assign(slots_, zero);
  fenced_ = clock_;
  object_clock_.assign(kAsyncProxies, zero);
  object_fenced_ = object_clock_;
  objects_.clear();
  for (int i = 0; i < slots_; ++i) clock_[i][i] = 1;
  known_.assign(slots_, {});
  pending_.assign(slots_, {});
  published_.assign(slots_, {});
}

bool Clocks::has_seen(int thread, int block, int other, uint32_t clock) const {
  if (block == block_) return clock_[thread][other] >= clock;
  const auto it = known_[thread].find(block);
  return it != known_[thread].end() && (*it->second)[other] >= clock;
}

void Clocks::join(const int* from, int n_from, const int* to, int n_to) {
  VectorClock all(slots_, 0), fenced(slots_, 0);
  Knowledge known, pending;
  for (int i = 0; i < n_from; ++i) {
    join_into(all, clock_[from[i]]);
    join_into(fenced, fenced_[from[i]]);
    if (!fences_used_) continue;
    merge_into(known, known_[from[i]]);
    merge_into(pending, pending_[from[i]]);
  }
  for (int i = 0; i < n_to; ++i) {
    clock_[to[i]] = all;
    fenced_[to[i]] = fenced;
    if (!fences_used_) continue;
    known_[to[i]] = known;
    pending_[to[i]] = pending;
  }
  for (int i = 0; i < n_from; ++i) ++clock_[from[i]][from[i]];
}

int Clocks::object(const void* p) {
  return objects_.emplace(p, static_cast<int>(objects_.size())).first->second % kAsyncProxies;
}

void Clocks::release(int object, int thread) {
  join_into(object_clock_[object], clock_[thread]);
  join_into(object_fenced_[object], fenced_[thread]);
  ++clock_[thread][thread];
}

void Clocks::acquire(int object, int thread) {
  join_into(clock_[thread], object_clock_[object]);
  join_into(fenced_[thread], object_fenced_[object]);
}

void Clocks::issue_async(int object, int thread) {
  const int proxy = threads_ + object;
  join_into(clock_[proxy], clock_[thread]);
  join_into(fenced_[proxy], fenced_[thread]);
  ++clock_[thread][thread];
}

void Clocks::complete_async(int object) {
  const int proxy = threads_ + object;
  join_into(object_clock_[object], clock_[proxy]);
  ++clock_[proxy][proxy];
}

void Clocks::proxy_fence(int thread) {
  join_into(fenced_[thread], clock_[thread]);
  ++clock_[thread][thread];
}

void Clocks::fence(int thread) {
  fences_used_ = true;
  merge_into(known_[thread], pending_[thread]);
  pending_[thread].clear();
  const auto own = known_[thread].find(block_);
  if (own != known_[thread].end()) join_into(clock_[thread], *own->second);
  published_[thread] = known_[thread];
  published_[thread][block_] = std::make_shared<VectorClock>(clock_[thread]);
  ++clock_[thread][thread];
}

void Clocks::atomic(const void* p, int thread) {
  Knowledge& carried = atomics_[p];
  merge_into(carried, published_[thread]);
  merge_into(pending_[thread], carried);
}

}  // namespace coh
