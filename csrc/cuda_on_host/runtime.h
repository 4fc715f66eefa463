// What a test program sees of the runtime: how threads are scheduled, counters, memory that kernels work on.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>

#include "cuda_on_host/shim.h"

namespace coh {

// Which ready thread runs next. kPct gives each warp a random priority that seldom changes, so that one runs far ahead.
enum class Schedule { kFifo, kReverse, kRandom, kPct };
// When asynchronous copies and tensor core work take effect: at once, only when waited for, or some time between.
enum class Completion { kEager, kLazy, kRandom };

struct Config {
  Schedule schedule = Schedule::kPct;
  Completion completion = Completion::kRandom;
  uint64_t seed = 1;
  uint64_t max_steps = 400'000'000;  // of one launch, before it counts as waiting for ever
};
extern Config config;
// VICO_COH_SEED, VICO_COH_SCHEDULE (fifo, reverse, random, pct), VICO_COH_COMPLETION (eager, lazy, random).
void configure_from_environment();

struct Stats {
  uint64_t switches = 0;
  uint64_t races = 0;
  std::set<const void*> kernels;                   // that were launched
  uint64_t matrix_phases = 0, bank_conflicts = 0;  // of ldmatrix, 8 rows of 16 bytes each
};
extern Stats stats;

// Global memory that the race checker watches.
void track_global(const void* p, size_t bytes);
void untrack_global(const void* p);

// An exact-size block of "device" memory, filled with 0xff bytes: NaN in every floating type, so what a kernel reads
// or leaves unwritten shows. `offset` elements in front make pointers of any alignment.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, size_t offset = 0) : size_(size), offset_(offset) {
    const size_t bytes = (size + offset) * sizeof(T);
    void* p = nullptr;
    if (posix_memalign(&p, 256, bytes ? bytes : 1)) throw std::bad_alloc();
    memory_ = static_cast<T*>(p);
    poison();
    if (bytes) track_global(memory_, bytes);
  }
  ~Buffer() {
    if (size_ + offset_) untrack_global(memory_);
    std::free(memory_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void poison() { std::memset(static_cast<void*>(memory_), 0xff, (size_ + offset_) * sizeof(T)); }
  T* data() { return memory_ + offset_; }
  const T* data() const { return memory_ + offset_; }
  T& operator[](size_t i) { return memory_[offset_ + i]; }
  const T& operator[](size_t i) const { return memory_[offset_ + i]; }
  size_t size() const { return size_; }

 private:
  size_t size_, offset_;
  T* memory_;
};

}  // namespace coh
