// Inside the runtime: the one multiprocessor that is emulated, and what its parts call of each other.
//
// Every CUDA thread of the running block is a fiber; blocks run one after another. A fiber gives up the processor only
// at calls of the runtime, and there the scheduler may pick any that is ready.
#pragma once

#include <deque>
#include <functional>
#include <unordered_map>
#include <vector>

#include "cuda_on_host/ptx_host.h"
#include "cuda_on_host/runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#define COH_ASAN 1
#endif

namespace coh {

// One cp.async of a thread.
struct ThreadCopy {
  void* to;
  const void* from;
  int bytes, from_bytes;  // the rest is zero-filled
  bool done;
};

struct Fiber : Thread {
  int id, lane, warp;
  bool done = false;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  const char* waits_for = nullptr;
  long waits_on = 0;
  std::vector<std::vector<ThreadCopy>> copy_groups;
  std::vector<ThreadCopy> open_copies;
};

// Lanes of a warp on their way into one warp_op.
struct Rendezvous {
  bool active = false;
  unsigned mask, arrived;
  Op op;
  int tag;
  WarpFunction fn;
  void* slots[32];
};

// A wgmma of one warp: its 16 rows of the warp group's 64. A commit ends a group.
struct WarpMma {
  bool commit = false, done = false;
  MmaAsync lanes[32];
};

struct Warp {
  unsigned exist = 0, exited = 0;
  Rendezvous rendezvous[8];
  std::deque<WarpMma> mma_queue;
  bool mma_fenced = false;
  std::vector<Fiber*> ready;
};

struct Barrier {
  int arrived = 0;
  Vote vote = Vote::kNone;
  int votes = 0;
  std::vector<Fiber*> waiting;
  std::vector<int> members;  // thread ids
  std::vector<int*> results;
};

struct Mbarrier {
  uint64_t phase = 0;
  int expected, pending;
  long transactions = 0;  // bytes expected and not yet arrived
  int owner;              // the thread that initialised it
  bool fenced = false;    // its initialisation is visible to the async proxy
};

struct MbarrierWaiter {
  const void* barrier;
  uint32_t parity;
  Fiber* fiber;
};

// A TMA load under way.
struct BulkCopy {
  int at[5];
  uint32_t shared;
  void* barrier;
  TensorMap map;  // as it was at the issue
  bool done;
};

struct Machine {
  // the launch
  void (*body)(void*);
  void* arguments;
  uint64_t random;
  uint64_t steps;
  uint64_t waited;  // threads of this launch that called wait_for_earlier_kernels
  // the block
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint32_t> priority;  // of each warp
  std::deque<Fiber*> ready;        // in order of arrival; kPct uses the warps' own lists instead
  uint32_t ready_warps;
  int live;
  bool failing;
  std::string error;
  Barrier barrier;
  std::unordered_map<const void*, Mbarrier> mbarriers;
  std::vector<MbarrierWaiter> mbarrier_waiters;
  std::vector<BulkCopy> bulk_copies;
  size_t bulk_pending;
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<char*> stacks;
};
extern Machine machine;

inline Fiber* running() { return static_cast<Fiber*>(current); }
inline int running_id() { return current ? running()->id : -1; }

// fiber.cpp
constexpr size_t kStackBytes =
#ifdef COH_ASAN
    512 << 10;
#else
    128 << 10;
#endif
void prepare_fiber(Fiber& f, void (*entry)());
void clean_stacks();         // after a block whose fibers were abandoned
void enter_first(Fiber* f);  // from the host; comes back when leave_last is called
void switch_fiber(Fiber* from, Fiber* to);
[[noreturn]] void leave_last(Fiber* from);  // to the host
void note_fiber_started();

// schedule.cpp
uint64_t random_bits();
inline bool one_in(unsigned n) { return random_bits() % n == 0; }
void make_ready(Fiber* f);
void block_on(const char* what, long on);  // runs others until this fiber is made ready
void maybe_yield();

// sync.cpp
void finish_thread(Fiber* f);

// shared_memory.cpp
constexpr size_t kMaxShared = 227 * 1024;
void reset_static_shared();
void* shared_range(uint32_t address, size_t bytes, const char* what);  // fails outside

// bulk_copy.cpp
bool step_bulk_copy();  // one random copy under way takes effect; false: there is none
void finish_block_copies();
void mark_mbarriers_fenced();

// The race checker, if it is linked in. Threads are numbered in their block; numbers from the block's size on stand for
// the async proxy, one for each mbarrier.
struct RaceChecker {
  void (*track_global)(const void* p, size_t bytes);
  void (*untrack_global)(const void* p);
  void (*begin_launch)();
  void (*begin_block)(int threads);
  void (*add_shared)(const void* p, size_t bytes);
  void (*access)(const void* p, size_t bytes, bool write, bool async_proxy, const void* pc, int thread);
  void (*atomic)(const void* p, size_t bytes, const void* pc);
  void (*fence)();  // __threadfence
  void (*proxy_fence)();
  void (*join)(const int* from, int n_from, const int* to, int n_to);  // a barrier
  int (*object)(const void* p);                                        // number of a mbarrier
  void (*release)(int object);
  void (*acquire)(int object);
  void (*issue_async)(int object);  // the async proxy of the object learns what the running thread knows
  void (*complete_async)(int object);
};
extern const RaceChecker* race;

}  // namespace coh
