// What threads of a warp or block do together: warp-wide operations, shuffles, votes, barriers.
#include "cuda_on_host/machine.h"

namespace coh {
namespace {

const char* name_of(Op op) {
  switch (op) {
    case Op::kShuffle:
      return "shuffle";
    case Op::kBallot:
      return "vote";
    case Op::kSyncwarp:
      return "__syncwarp";
    case Op::kLoadMatrix:
      return "ldmatrix";
    case Op::kMma:
      return "mma.sync";
    case Op::kWgmma:
      return "wgmma.mma_async";
    case Op::kWgmmaCommit:
      return "wgmma.commit_group";
    case Op::kWgmmaWait:
      return "wgmma.wait_group";
  }
  return "?";
}

// .aligned instructions: all 32 lanes, all in the same one.
bool is_aligned(Op op) { return op >= Op::kLoadMatrix; }

void run_rendezvous(Rendezvous& r) {
  r.active = false;
  if (r.fn) r.fn(r.slots, r.arrived, r.tag);
}

void release_lanes(int warp, unsigned lanes, int except) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) && lane != except) make_ready(&machine.fibers[warp * 32 + lane]);
  }
}

void join_lanes(int warp, unsigned lanes) {
  int ids[32], n = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) ids[n++] = warp * 32 + lane;
  }
  race->join(ids, n, ids, n);
}

void open_barrier(Barrier& b) {
  if (race) {
    const int n = static_cast<int>(b.members.size());
    race->join(b.members.data(), n, b.members.data(), n);
  }
  int result = b.votes;
  if (b.vote == Vote::kOr) result = b.votes > 0;
  if (b.vote == Vote::kAnd) result = b.votes == b.arrived;
  for (int* r : b.results) *r = result;
  for (Fiber* f : b.waiting) make_ready(f);
  b = Barrier{};
}

}  // namespace

int lane_id() { return running()->lane; }

void warp_op(unsigned mask, Op op, int tag, void* slot, WarpFunction fn) {
  Fiber* f = running();
  Warp& w = machine.warps[f->warp];
  const char* name = name_of(op);
  if (!(mask >> f->lane & 1)) fail("%s: the calling lane %d is not in mask %08x", name, f->lane, mask);
  const unsigned wanted = mask & w.exist & ~w.exited;
  if (is_aligned(op) && wanted != ~0u) fail("%s needs the whole warp, only lanes %08x are left", name, wanted);
  Rendezvous* r = nullptr;
  for (Rendezvous& x : w.rendezvous) {
    if (x.active && x.mask == mask) r = &x;
  }
  if (!r) {
    for (Rendezvous& x : w.rendezvous) {
      if (!x.active) {
        r = &x;
      } else if (is_aligned(op) || is_aligned(x.op)) {
        fail("divergent warp: lane %d in %s, lanes %08x in %s", f->lane, name, x.arrived, name_of(x.op));
      }
    }
    if (!r) fail("divergent warp: more than 8 operations with different masks at once");
    *r = {true, mask, 0, op, tag, fn, {}};
  }
  if (r->op != op || r->tag != tag) {
    fail("divergent warp: lane %d in %s, lanes %08x in %s", f->lane, name, r->arrived, name_of(r->op));
  }
  r->arrived |= 1u << f->lane;
  r->slots[f->lane] = slot;
  if (r->arrived != wanted) return block_on(name, static_cast<long>(mask));
  const unsigned arrived = r->arrived;
  if (race && op == Op::kSyncwarp) join_lanes(f->warp, arrived);
  run_rendezvous(*r);
  release_lanes(f->warp, arrived, f->lane);
}

// A thread that has returned is waited for no more, neither by its warp nor by the block's barrier.
void finish_thread(Fiber* f) {
  Warp& w = machine.warps[f->warp];
  w.exited |= 1u << f->lane;
  for (Rendezvous& r : w.rendezvous) {
    if (!r.active || !r.arrived || r.arrived != (r.mask & w.exist & ~w.exited)) continue;
    if (is_aligned(r.op)) fail("%s needs the whole warp, but lane %d has returned", name_of(r.op), f->lane);
    const unsigned arrived = r.arrived;
    if (race && r.op == Op::kSyncwarp) join_lanes(f->warp, arrived);
    run_rendezvous(r);
    release_lanes(f->warp, arrived, -1);
  }
  Barrier& b = machine.barrier;
  if (b.arrived && b.arrived == machine.live) open_barrier(b);
}

int block_barrier(int predicate, Vote vote) {
  Fiber* f = running();
  Barrier& b = machine.barrier;
  if (b.arrived && b.vote != vote) fail("__syncthreads: threads arrive at different kinds of it");
  int result = 0;
  b.vote = vote;
  b.votes += predicate != 0;
  ++b.arrived;
  b.members.push_back(f->id);
  b.results.push_back(&result);
  if (b.arrived == machine.live) {
    open_barrier(b);
    maybe_yield();
  } else {
    b.waiting.push_back(f);
    block_on("__syncthreads", 0);
  }
  return result;
}

void shuffle_lanes(void* const* slots, unsigned mask, int bytes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* to = static_cast<ShuffleSlot*>(slots[lane]);
    if (!(mask >> to->source & 1)) fail("shuffle: lane %d reads lane %d, which is not in it", lane, to->source);
    std::memcpy(to->result, static_cast<const ShuffleSlot*>(slots[to->source])->value, static_cast<size_t>(bytes));
  }
}

unsigned ballot(unsigned mask, int predicate) {
  struct Slot {
    bool predicate;
    unsigned result;
  } slot{predicate != 0, 0};
  warp_op(mask, Op::kBallot, 0, &slot, [](void* const* slots, unsigned lanes, int) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) votes |= unsigned{static_cast<Slot*>(slots[lane])->predicate} << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) static_cast<Slot*>(slots[lane])->result = votes;
    }
  });
  return slot.result;
}

void note_fence() {
  if (race) race->fence();
  maybe_yield();
}

void note_atomic(void* p, size_t bytes) {
  if (++machine.steps > config.max_steps) fail("no end: a thread that spins until another block has run?");
  maybe_yield();
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("atomic: misaligned address of %zu bytes", bytes);
  if (race) race->atomic(p, bytes, __builtin_return_address(0));
}

}  // namespace coh
