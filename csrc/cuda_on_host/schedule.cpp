// The scheduler: launches, blocks, which thread runs next, and what is said when none can.
#include <cstdarg>

#include "cuda_on_host/machine.h"

namespace coh {

Thread* current;
dim3 grid_dim, block_dim;
Config config;
Stats stats;
Machine machine;
const RaceChecker* race;

uint64_t random_bits() {
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r * 0x2545f4914f6cdd1dull >> 16;
}

void make_ready(Fiber* f) {
  if (config.schedule != Schedule::kPct) return machine.ready.push_back(f);
  machine.warps[f->warp].ready.push_back(f);
  machine.ready_warps |= 1u << f->warp;
}

namespace {

// Any lane of the ready warp with the highest priority.
Fiber* next_by_priority() {
  Machine& m = machine;
  if (!m.ready_warps) return nullptr;
  if (one_in(256)) m.priority[random_bits() % m.priority.size()] = static_cast<uint32_t>(random_bits());
  int best = -1;
  for (uint32_t rest = m.ready_warps; rest; rest &= rest - 1) {
    const int warp = __builtin_ctz(rest);
    if (best < 0 || m.priority[warp] > m.priority[best]) best = warp;
  }
  std::vector<Fiber*>& ready = m.warps[best].ready;
  std::swap(ready[random_bits() % ready.size()], ready.back());
  Fiber* f = ready.back();
  ready.pop_back();
  if (ready.empty()) m.ready_warps &= ~(1u << best);
  return f;
}

Fiber* next_ready() {
  if (config.schedule == Schedule::kPct) return next_by_priority();
  std::deque<Fiber*>& ready = machine.ready;
  if (ready.empty()) return nullptr;
  if (config.schedule == Schedule::kRandom) std::swap(ready[random_bits() % ready.size()], ready.front());
  Fiber* f = config.schedule == Schedule::kReverse ? ready.back() : ready.front();
  config.schedule == Schedule::kReverse ? ready.pop_back() : ready.pop_front();
  return f;
}

std::string describe_deadlock() {
  const std::vector<Fiber>& fibers = machine.fibers;
  std::string s = "deadlock in block (" + std::to_string(fibers[0].block.x) + ", " + std::to_string(fibers[0].block.y) +
                  ", " + std::to_string(fibers[0].block.z) + "):";
  for (size_t i = 0; i < fibers.size();) {
    size_t j = i;
    const auto same = [&](const Fiber& f) {
      return !f.done && f.waits_for == fibers[i].waits_for && f.waits_on == fibers[i].waits_on;
    };
    while (j < fibers.size() && same(fibers[j])) ++j;
    if (j > i && s.size() < 1000) {
      s += " threads " + std::to_string(i) + "-" + std::to_string(j - 1) + " wait at " + fibers[i].waits_for + " " +
           std::to_string(fibers[i].waits_on) + ";";
    }
    i = j > i ? j : i + 1;
  }
  return s;
}

// Leaves the running fiber for another, or for the host when the block is over.
void dispatch() {
  Fiber* from = running();
  ++stats.switches;
  if (++machine.steps > config.max_steps) {
    fail("no end after %llu steps: a thread that spins until another block has run?",
         static_cast<unsigned long long>(config.max_steps));
  }
  if (config.completion == Completion::kRandom && machine.bulk_pending && one_in(8)) step_bulk_copy();
  Fiber* to = next_ready();
  while (!to && !machine.failing && machine.live && step_bulk_copy()) to = next_ready();
  if (machine.failing) leave_last(from);
  if (!to) {
    if (machine.live) {
      machine.error = describe_deadlock();
      machine.failing = true;
    }
    leave_last(from);
  }
  if (to != from) switch_fiber(from, to);
}

void fiber_entry() {
  note_fiber_started();
  machine.body(machine.arguments);
  Fiber* f = running();
  f->done = true;
  --machine.live;
  finish_thread(f);
  dispatch();
  __builtin_trap();
}

void run_block(uint3 block, dim3 size) {
  Machine& m = machine;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  m.live = threads;
  m.ready.clear();
  m.ready_warps = 0;
  m.mbarriers.clear();
  m.mbarrier_waiters.clear();
  m.bulk_copies.clear();
  m.bulk_pending = 0;
  m.failing = false;
  m.error.clear();
  m.barrier = {};
  reset_static_shared();
  if (race) race->begin_block(threads);
  if (m.dynamic) {
    std::memset(m.dynamic, 0xff, m.dynamic_bytes);
    if (race) race->add_shared(m.dynamic, m.dynamic_bytes);
  }
  m.fibers = std::vector<Fiber>(threads);
  m.warps = std::vector<Warp>((threads + 31) / 32);
  m.priority.resize(m.warps.size());
  for (uint32_t& p : m.priority) p = static_cast<uint32_t>(random_bits());
  for (int t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    const unsigned u = static_cast<unsigned>(t);
    f.index = {u % size.x, u / size.x % size.y, u / (size.x * size.y)};
    f.block = block;
    f.id = t;
    f.lane = t & 31;
    f.warp = t >> 5;
    prepare_fiber(f, fiber_entry);
    m.warps[f.warp].exist |= 1u << f.lane;
    make_ready(&f);
  }
  enter_first(next_ready());
  if (!m.failing) finish_block_copies();
  if (!m.failing) return;
  clean_stacks();
  throw std::runtime_error(m.error);
}

}  // namespace

void block_on(const char* what, long on) {
  Fiber* f = running();
  f->waits_for = what;
  f->waits_on = on;
  dispatch();
  f->waits_for = nullptr;
}

void maybe_yield() {
  if (!current || config.schedule == Schedule::kFifo || config.schedule == Schedule::kReverse || !one_in(16)) return;
  make_ready(running());
  dispatch();
}

void fail(const char* format, ...) {
  char text[512];
  int n = 0;
  if (current) {
    n = std::snprintf(text, sizeof(text), "block (%u, %u, %u) thread %d: ", current->block.x, current->block.y,
                      current->block.z, running_id());
  }
  va_list list;
  va_start(list, format);
  std::vsnprintf(text + n, sizeof(text) - static_cast<size_t>(n), format, list);
  va_end(list);
  if (!current) throw std::runtime_error(text);
  machine.error = text;
  machine.failing = true;
  leave_last(running());
}

void wait_for_earlier_kernels() { ++machine.waited; }

void launch(const void* kernel, void (*body)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes,
            bool early) {
  if (block.x * block.y * block.z > 1024) fail("a block of %u threads", block.x * block.y * block.z);
  if (block.x * block.y * block.z == 0 || grid.x * grid.y * grid.z == 0) fail("an empty launch");
  if (grid.y > 65535 || grid.z > 65535) fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (shared_bytes > kMaxShared) fail("%zu bytes of dynamic shared memory, more than 227 KiB", shared_bytes);
  Machine& m = machine;
  stats.kernels.insert(kernel);
  m.body = body;
  m.arguments = arguments;
  m.steps = 0;
  m.waited = 0;
  grid_dim = grid;
  block_dim = block;
  m.random = config.seed * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  m.dynamic_bytes = shared_bytes;
  if (shared_bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, shared_bytes)) throw std::bad_alloc();
    m.dynamic = static_cast<char*>(p);
  }
  if (race) race->begin_launch();
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (config.schedule != Schedule::kFifo) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  }
  const auto clean_up = [&] {
    std::free(m.dynamic);
    m.dynamic = nullptr;
    current = nullptr;
  };
  try {
    for (uint64_t i : order) {
      run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                 static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))},
                block);
    }
  } catch (...) {
    clean_up();
    throw;
  }
  clean_up();
  const uint64_t threads = order.size() * block.x * block.y * block.z;
  if (early && m.waited < threads) {
    fail("%zu of %zu threads of a kernel that was launched early did not wait for the kernels before it",
         static_cast<size_t>(threads - m.waited), static_cast<size_t>(threads));
  }
}

void track_global(const void* p, size_t bytes) {
  if (race) race->track_global(p, bytes);
}
void untrack_global(const void* p) {
  if (race) race->untrack_global(p);
}

void configure_from_environment() {
  const auto choose = [](const char* name, std::initializer_list<const char*> values) {
    const char* s = std::getenv(name);
    int i = 0;
    for (const char* v : values) {
      if (s && !std::strcmp(s, v)) return i;
      ++i;
    }
    if (s) throw std::runtime_error(std::string(name) + " has no value " + s);
    return -1;
  };
  if (const char* s = std::getenv("VICO_COH_SEED")) config.seed = std::strtoull(s, nullptr, 0);
  const int schedule = choose("VICO_COH_SCHEDULE", {"fifo", "reverse", "random", "pct"});
  if (schedule >= 0) config.schedule = static_cast<Schedule>(schedule);
  const int completion = choose("VICO_COH_COMPLETION", {"eager", "lazy", "random"});
  if (completion >= 0) config.completion = static_cast<Completion>(completion);
}

}  // namespace coh
