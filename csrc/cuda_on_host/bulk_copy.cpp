// Asynchronous copies: cp.async, mbarriers, and the TMA engine, which works whenever the scheduler lets it.
#include <algorithm>

#include "cuda_on_host/machine.h"

namespace coh {
namespace {

void run_copy(ThreadCopy& c) {
  if (c.done) return;
  c.done = true;
  std::memcpy(c.to, c.from, static_cast<size_t>(c.from_bytes));
  std::memset(static_cast<char*>(c.to) + c.from_bytes, 0, static_cast<size_t>(c.bytes - c.from_bytes));
}

}  // namespace

// ---- cp.async. Until a copy takes effect its target reads as poison.

void copy_async(void* to, const void* from, int bytes, int from_bytes) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes); };
  if (misaligned(to) || misaligned(from)) fail("cp.async: misaligned %d-byte copy", bytes);
  if (from_bytes < 0 || from_bytes > bytes) fail("cp.async: %d source bytes of %d", from_bytes, bytes);
  shared_range(shared_address(to), static_cast<size_t>(bytes), "cp.async");
  maybe_yield();
  const void* pc = __builtin_return_address(0);
  if (race) {
    race->access(to, static_cast<size_t>(bytes), true, false, pc, running_id());
    if (from_bytes) race->access(from, static_cast<size_t>(from_bytes), false, false, pc, running_id());
  }
  ThreadCopy c{to, from, bytes, from_bytes, false};
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  if (config.completion == Completion::kEager || (config.completion == Completion::kRandom && one_in(3))) run_copy(c);
  running()->open_copies.push_back(c);
}

void copy_async_commit() {
  Fiber* f = running();
  f->copy_groups.push_back(std::move(f->open_copies));
  f->open_copies.clear();
  if (config.completion == Completion::kRandom && one_in(3)) {
    for (ThreadCopy& c : f->copy_groups.back()) run_copy(c);
  }
}

void copy_async_wait(int keep) {
  auto& groups = running()->copy_groups;
  while (static_cast<int>(groups.size()) > keep) {
    for (ThreadCopy& c : groups.front()) run_copy(c);
    groups.erase(groups.begin());
  }
  maybe_yield();
}

// ---- mbarrier. A phase ends when no arrival is pending and every expected byte has come.
namespace {

Mbarrier& find_mbarrier(void* barrier, const char* what) {
  const auto it = machine.mbarriers.find(barrier);
  if (it == machine.mbarriers.end()) fail("%s: the mbarrier at %p is not initialised", what, barrier);
  return it->second;
}

bool has_passed(const Mbarrier& b, uint32_t parity) { return (b.phase & 1) != parity; }

void end_phase_if_complete(const void* barrier, Mbarrier& b) {
  if (b.pending != 0 || b.transactions != 0) return;
  ++b.phase;
  b.pending = b.expected;
  auto& waiters = machine.mbarrier_waiters;
  for (size_t i = 0; i < waiters.size();) {
    if (waiters[i].barrier == barrier && has_passed(b, waiters[i].parity)) {
      make_ready(waiters[i].fiber);
      waiters.erase(waiters.begin() + static_cast<long>(i));
    } else {
      ++i;
    }
  }
}

void note_mbarrier_use(void* barrier) {
  if (race) race->atomic(barrier, 8, __builtin_return_address(0));
}

}  // namespace

void mbarrier_init(void* barrier, int count) {
  if (count <= 0 || count >= 1 << 20) fail("mbarrier.init: a count of %d", count);
  shared_range(shared_address(barrier), 8, "mbarrier.init");
  if (race) race->access(barrier, 8, true, false, __builtin_return_address(0), running_id());
  Mbarrier b;
  b.expected = b.pending = count;
  b.owner = running_id();
  machine.mbarriers[barrier] = b;
  maybe_yield();
}

void mbarrier_arrive(void* barrier, int transaction_bytes) {
  maybe_yield();
  Mbarrier& b = find_mbarrier(barrier, "mbarrier.arrive");
  note_mbarrier_use(barrier);
  if (race) race->release(race->object(barrier));
  b.transactions += transaction_bytes;
  if (b.pending == 0) fail("mbarrier.arrive: more arrivals in a phase than the count of %d", b.expected);
  --b.pending;
  end_phase_if_complete(barrier, b);
}

void mbarrier_wait(void* barrier, uint32_t parity) {
  maybe_yield();
  Mbarrier& b = find_mbarrier(barrier, "mbarrier.try_wait");
  note_mbarrier_use(barrier);
  if (!has_passed(b, parity)) {
    machine.mbarrier_waiters.push_back({barrier, parity, running()});
    block_on("mbarrier parity", static_cast<long>(parity));
  }
  if (race) race->acquire(race->object(barrier));
}

void fence_mbarrier_init() {
  for (auto& [p, b] : machine.mbarriers) b.fenced |= b.owner == running_id();
}

void fence_proxy_async() {
  fence_mbarrier_init();
  if (race) race->proxy_fence();
}

// ---- TMA
namespace {

// One row of the box (its innermost dimension) from global to shared memory, 16 bytes at a time because that is
// what the swizzle moves about: address bits 4.. are xored with bits 7...
void copy_box_row(const TensorMap& t, const BulkCopy& c, bool inside, int64_t offset, uint32_t shared, int thread) {
  const size_t row_bytes = size_t{t.box[0]} * static_cast<size_t>(t.element_bytes);
  for (size_t at = 0; at < row_bytes; at += 16) {
    uint32_t address = shared + static_cast<uint32_t>(at);
    address ^= (address >> 7 & ((1u << t.swizzle) - 1)) << 4;
    const size_t bytes = std::min<size_t>(16, row_bytes - at);
    char* s = static_cast<char*>(shared_range(address, bytes, "TMA"));
    if (race) race->access(s, bytes, true, true, nullptr, thread);
    for (size_t e = 0; e < bytes; e += static_cast<size_t>(t.element_bytes)) {
      const int64_t x = c.at[0] + static_cast<int64_t>(at + e) / t.element_bytes;
      const bool ok = inside && x >= 0 && static_cast<uint64_t>(x) < t.size[0];
      const char* g = t.base + offset + x * t.element_bytes;
      const size_t n = static_cast<size_t>(t.element_bytes);
      if (race && ok) race->access(g, n, false, true, nullptr, thread);
      if (ok) {
        std::memcpy(s + e, g, n);
      } else {
        std::memset(s + e, 0, n);
      }
    }
  }
}

size_t box_bytes(const TensorMap& t) {
  size_t bytes = static_cast<size_t>(t.element_bytes);
  for (int d = 0; d < t.rank; ++d) bytes *= t.box[d];
  return bytes;
}

void copy_box(const BulkCopy& c, int thread) {
  const TensorMap& t = c.map;
  const size_t row_bytes = size_t{t.box[0]} * static_cast<size_t>(t.element_bytes), rows = box_bytes(t) / row_bytes;
  shared_range(c.shared, box_bytes(t), "TMA");
  for (size_t row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t offset = 0;
    size_t rest = row;
    for (int d = 1; d < t.rank; rest /= t.box[d], ++d) {
      const int64_t x = c.at[d] + static_cast<int64_t>(rest % t.box[d]);
      inside = inside && x >= 0 && static_cast<uint64_t>(x) < t.size[d];
      offset += x * static_cast<int64_t>(t.stride[d]);
    }
    copy_box_row(t, c, inside, offset, c.shared + static_cast<uint32_t>(row * row_bytes), thread);
  }
}

void run_bulk_copy(size_t i) {
  BulkCopy& c = machine.bulk_copies[i];
  if (c.done) return;
  c.done = true;
  --machine.bulk_pending;
  const int threads = static_cast<int>(machine.fibers.size());
  const int object = race ? race->object(c.barrier) : 0;
  copy_box(c, threads + object);
  Mbarrier& b = find_mbarrier(c.barrier, "TMA completes");
  if (race) race->complete_async(object);
  b.transactions -= static_cast<long>(box_bytes(c.map));
  end_phase_if_complete(c.barrier, b);
}

}  // namespace

void tensor_load(void* to, const void* map, const int* at, int rank, void* barrier) {
  BulkCopy c{{}, shared_address(to), barrier, {}, false};
  TensorMap& t = c.map;
  std::memcpy(&t, map, sizeof(t));
  if (t.magic != TensorMap::kMagic) fail("TMA: not a tensor map");
  if (t.rank != rank) fail("TMA: a copy of rank %d with a tensor map of rank %d", rank, t.rank);
  if (c.shared & 127) fail("TMA: the shared address is not aligned to 128 bytes");
  if (t.swizzle && (c.shared & ((128u << t.swizzle) - 1))) {
    fail("TMA: the shared address is not aligned to the swizzle's period of %u bytes", 128u << t.swizzle);
  }
  std::copy(at, at + rank, c.at);
  if (!find_mbarrier(barrier, "TMA load").fenced) {
    fail("TMA load: no fence since mbarrier.init made the mbarrier visible to the async proxy");
  }
  if (race) race->issue_async(race->object(barrier));
  machine.bulk_copies.push_back(c);
  ++machine.bulk_pending;
  if (config.completion == Completion::kEager) run_bulk_copy(machine.bulk_copies.size() - 1);
  maybe_yield();
}

bool step_bulk_copy() {
  if (!machine.bulk_pending) return false;
  size_t pick = random_bits() % machine.bulk_pending;
  for (size_t i = 0; i < machine.bulk_copies.size(); ++i) {
    if (machine.bulk_copies[i].done || pick-- != 0) continue;
    run_bulk_copy(i);
    return true;
  }
  return false;
}

// At the end of a block: nothing may still be on its way into its shared memory.
void finish_block_copies() {
  if (machine.bulk_pending) fail("the block ended with a TMA load still under way");
  for (const auto& [p, b] : machine.mbarriers) {
    if (b.transactions) fail("the block ended with %ld bytes still expected by a mbarrier", b.transactions);
  }
}

void encode_tensor_map(void* map, int element_bytes, int rank, void* base, const uint64_t* size, const uint64_t* stride,
                       const uint32_t* box, int swizzle) {
  TensorMap t{};
  t.magic = TensorMap::kMagic;
  t.base = static_cast<char*>(base);
  t.rank = rank;
  t.element_bytes = element_bytes;
  t.swizzle = swizzle;
  if (rank < 1 || rank > 5) fail("tensor map: rank %d", rank);
  if (reinterpret_cast<uintptr_t>(base) & 15) fail("tensor map: the base is not aligned to 16 bytes");
  for (int d = 0; d < rank; ++d) {
    if (!size[d] || size[d] > 1ull << 32) fail("tensor map: size[%d]", d);
    if (!box[d] || box[d] > 256) fail("tensor map: box[%d] = %u", d, box[d]);
    t.size[d] = size[d];
    t.box[d] = static_cast<uint16_t>(box[d]);
    t.stride[d] = d ? stride[d - 1] : static_cast<uint64_t>(element_bytes);
    if (d && (t.stride[d] & 15)) fail("tensor map: stride %d is no multiple of 16 bytes", d);
  }
  const uint32_t inner = box[0] * static_cast<uint32_t>(element_bytes);
  if (inner % 16) fail("tensor map: %u bytes in the box's rows, no multiple of 16", inner);
  if (swizzle && inner > 16u << swizzle) fail("tensor map: %u bytes in the box's rows, more than the swizzle", inner);
  static_assert(sizeof(TensorMap) <= 128, "a tensor map has 128 bytes");
  std::memset(map, 0, 128);
  std::memcpy(map, &t, sizeof(t));
}

}  // namespace coh
