// The race checker: every access of instrumented kernels is held against the clocks of clocks.h.
//
// Kernels of the race build are compiled with -fsanitize=thread but not linked to its runtime: the callbacks at the end
// of this file take its place. This file itself is not instrumented. Shared memory remembers its last write and all
// reads since; global memory, which all blocks see, the last write and a few reads and atomics.
#include <memory>
#include <set>

#include "cuda_on_host/clocks.h"
#include "cuda_on_host/machine.h"

namespace coh {
namespace {

constexpr size_t kCellBytes = 2;

struct Epoch {
  int block = -1, thread = -1;
  uint32_t clock = 0;
  const void* pc = nullptr;
};

// The latest accesses of a kind that are not ordered before one another, as far as there is room.
template <int kRoom>
struct Recent {
  Epoch epochs[kRoom];
  uint8_t count = 0, next = 0;
};

struct Cell {
  uint32_t launch = 0;  // or block, for shared memory: what is remembered from another is void
  bool async_write = false;
  Epoch write;
  Recent<2> atomics, reads;
  std::unique_ptr<std::vector<Epoch>> all_reads;  // shared memory: the latest of each thread
};

struct Region {
  const char *begin, *end;
  bool shared;
  std::vector<Cell> cells;
};

Clocks clocks;
std::vector<std::unique_ptr<Region>> global_regions, shared_regions;
Region* latest_hit;
uint32_t generation;  // counts launches and blocks
uint32_t launch_generation;
std::set<std::pair<const void*, const void*>> reported;

Region* find_region(const void* p) {
  const auto* q = static_cast<const char*>(p);
  if (latest_hit && q >= latest_hit->begin && q < latest_hit->end) return latest_hit;
  for (auto* regions : {&shared_regions, &global_regions}) {
    for (const auto& r : *regions) {
      if (q >= r->begin && q < r->end) return latest_hit = r.get();
    }
  }
  return nullptr;
}

std::unique_ptr<Region> make_region(const void* p, size_t bytes, bool shared) {
  auto r = std::make_unique<Region>();
  r->begin = static_cast<const char*>(p);
  r->end = r->begin + bytes;
  r->shared = shared;
  r->cells.resize((bytes + kCellBytes - 1) / kCellBytes);
  return r;
}

std::string describe(int block, int thread, const void* pc) {
  const bool proxy = block == clocks.block() && thread >= clocks.threads();
  std::string s = proxy ? "the async proxy of mbarrier " + std::to_string(thread - clocks.threads())
                        : "thread " + std::to_string(thread);
  s += " of the block that ran as number " + std::to_string(block);
  char address[32];
  std::snprintf(address, sizeof(address), " (pc %p)", pc);
  return s + address;
}

void report(const char* kind, const Region& r, size_t byte, int thread, const void* pc, const Epoch& earlier) {
  ++stats.races;
  if (!reported.insert({pc, earlier.pc}).second || reported.size() > 12) return;
  std::fprintf(stderr, "race: %s, %s memory byte %zu: %s, and earlier %s\n", kind, r.shared ? "shared" : "global", byte,
               describe(clocks.block(), thread, pc).c_str(),
               describe(earlier.block, earlier.thread, earlier.pc).c_str());
}

struct Access {
  int thread;
  bool write, atomic, async_proxy;
  const void* pc;
};

bool ordered(const Epoch& e, int thread) {
  return e.block < 0 || (e.block == clocks.block() && e.thread == thread) ||
         clocks.has_seen(thread, e.block, e.thread, e.clock);
}

template <int kRoom>
void remember(Recent<kRoom>& recent, const Epoch& e, int thread) {
  for (int i = 0; i < recent.count; ++i) {
    if (ordered(recent.epochs[i], thread)) {
      recent.epochs[i] = e;
      return;
    }
  }
  if (recent.count < kRoom) {
    recent.epochs[recent.count++] = e;
  } else {
    recent.epochs[recent.next] = e;
    recent.next = static_cast<uint8_t>((recent.next + 1) % kRoom);
  }
}

void remember_read(Cell& c, const Epoch& e, bool shared) {
  const bool first = c.reads.count == 0 && !c.all_reads;
  if (!shared || first || (!c.all_reads && ordered(c.reads.epochs[0], e.thread))) {
    remember(c.reads, e, e.thread);
    return;
  }
  if (!c.all_reads) {
    c.all_reads = std::make_unique<std::vector<Epoch>>(clocks.threads() + kAsyncProxies);
    for (int i = 0; i < c.reads.count; ++i) (*c.all_reads)[c.reads.epochs[i].thread] = c.reads.epochs[i];
    c.reads = {};
  }
  (*c.all_reads)[e.thread] = e;
}

void check_cell(const Region& r, Cell& c, size_t byte, const Access& a) {
  const uint32_t valid_for = r.shared ? generation : launch_generation;
  if (c.launch != valid_for) {
    c = Cell{};
    c.launch = valid_for;
  }
  const bool writes = a.write || a.atomic;
  if (!ordered(c.write, a.thread)) {
    report(writes ? "write after write" : "read after write", r, byte, a.thread, a.pc, c.write);
  } else if (a.async_proxy && !a.write && r.shared && c.write.block >= 0 && !c.async_write &&
             !clocks.has_seen_fenced(a.thread, c.write.thread, c.write.clock)) {
    report("fence.proxy.async is missing", r, byte, a.thread, a.pc, c.write);
  }
  if (!a.atomic) {
    for (int i = 0; i < c.atomics.count; ++i) {
      if (ordered(c.atomics.epochs[i], a.thread)) continue;
      report(writes ? "write after atomic" : "read after atomic", r, byte, a.thread, a.pc, c.atomics.epochs[i]);
      break;
    }
  }
  const Epoch now{clocks.block(), a.thread, clocks.now(a.thread), a.pc};
  if (!writes) return remember_read(c, now, r.shared);
  const auto check_read = [&](const Epoch& e) {
    if (ordered(e, a.thread)) return true;
    report("write after read", r, byte, a.thread, a.pc, e);
    return false;
  };
  for (int i = 0; i < c.reads.count && check_read(c.reads.epochs[i]); ++i) {
  }
  if (c.all_reads) {
    for (const Epoch& e : *c.all_reads) {
      if (!check_read(e)) break;
    }
  }
  c.reads = {};
  c.all_reads.reset();
  if (a.atomic) return remember(c.atomics, now, a.thread);
  c.write = now;
  c.async_write = a.async_proxy;
  c.atomics = {};
}

void check(const void* p, size_t bytes, const Access& a) {
  Region* r = find_region(p);
  if (!r || a.thread < 0) return;
  const size_t at = static_cast<size_t>(static_cast<const char*>(p) - r->begin);
  for (size_t i = at / kCellBytes; i <= (at + bytes - 1) / kCellBytes && i < r->cells.size(); ++i) {
    check_cell(*r, r->cells[i], i * kCellBytes, a);
  }
}

const RaceChecker checker = {
    .track_global = [](const void* p, size_t n) { global_regions.push_back(make_region(p, n, false)); },
    .untrack_global =
        [](const void* p) {
          latest_hit = nullptr;
          for (size_t i = 0; i < global_regions.size(); ++i) {
            if (global_regions[i]->begin == p) global_regions.erase(global_regions.begin() + static_cast<long>(i--));
          }
        },
    .begin_launch =
        [] {
          launch_generation = ++generation;
          clocks.begin_launch();
        },
    .begin_block =
        [](int threads) {
          ++generation;
          latest_hit = nullptr;
          shared_regions.clear();
          clocks.begin_block(threads);
        },
    .add_shared = [](const void* p, size_t n) { shared_regions.push_back(make_region(p, n, true)); },
    .access = [](const void* p, size_t n, bool write, bool async_proxy, const void* pc,
                 int thread) { check(p, n, {thread, write, false, async_proxy, pc}); },
    .atomic =
        [](const void* p, size_t n, const void* pc) {
          check(p, n, {running_id(), false, true, false, pc});
          clocks.atomic(p, running_id());
        },
    .fence = [] { clocks.fence(running_id()); },
    .proxy_fence = [] { clocks.proxy_fence(running_id()); },
    .join = [](const int* from, int n_from, const int* to, int n_to) { clocks.join(from, n_from, to, n_to); },
    .object = [](const void* p) { return clocks.object(p); },
    .release = [](int object) { clocks.release(object, running_id()); },
    .acquire = [](int object) { clocks.acquire(object, running_id()); },
    .issue_async = [](int object) { clocks.issue_async(object, running_id()); },
    .complete_async = [](int object) { clocks.complete_async(object); },
};

[[maybe_unused]] const bool linked_in = (race = &checker);

void instrumented(const void* p, size_t bytes, bool write, const void* pc) {
  if (!current) return;
  const Fiber* f = running();
  const auto* q = static_cast<const char*>(p);
  if (q >= f->stack && q < f->stack + kStackBytes) return;
  if (!find_region(p)) return;
  check(p, bytes, {f->id, write, false, false, pc});
  maybe_yield();
}

}  // namespace
}  // namespace coh

// ---- what GCC calls in instrumented code
#define COH_PC __builtin_return_address(0)
#define COH_TSAN_CALLBACKS(n)                                                        \
  void __tsan_read##n(void* p) { coh::instrumented(p, n, false, COH_PC); }           \
  void __tsan_write##n(void* p) { coh::instrumented(p, n, true, COH_PC); }           \
  void __tsan_unaligned_read##n(void* p) { coh::instrumented(p, n, false, COH_PC); } \
  void __tsan_unaligned_write##n(void* p) { coh::instrumented(p, n, true, COH_PC); }
extern "C" {
COH_TSAN_CALLBACKS(1)
COH_TSAN_CALLBACKS(2)
COH_TSAN_CALLBACKS(4)
COH_TSAN_CALLBACKS(8)
COH_TSAN_CALLBACKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { coh::instrumented(p, n, false, COH_PC); }
void __tsan_write_range(void* p, size_t n) { coh::instrumented(p, n, true, COH_PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
