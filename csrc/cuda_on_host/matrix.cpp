// Matrix instructions: ldmatrix, mma.sync, wgmma. Sums are taken in order of k, in float; the hardware's
// order is not documented.
#include "common/dtype.h"
#include "cuda_on_host/machine.h"

namespace coh {
namespace {

float value_of(uint16_t bits, Element element) {
  return element == Element::kHalf ? vico::to_float(vico::Half{bits}) : vico::to_float(vico::BFloat16{bits});
}
float low(uint32_t pair, Element element) { return value_of(static_cast<uint16_t>(pair), element); }
float high(uint32_t pair, Element element) { return value_of(static_cast<uint16_t>(pair >> 16), element); }

// ---- ldmatrix: lane 8 i + r brings the address of row r of matrix i

struct RowSlot {
  uint32_t address;
  uint32_t* r;
  const void* pc;
};
constexpr int kTransposed = 16;

const void* matrix_row(void* const* slots, int lane) {
  const RowSlot& slot = *static_cast<RowSlot*>(slots[lane]);
  if (slot.address & 15) fail("ldmatrix: the row address 0x%x is not aligned to 16 bytes", slot.address);
  void* p = shared_range(slot.address, 16, "ldmatrix");
  if (race) race->access(p, 16, false, false, slot.pc, running()->warp * 32 + lane);
  return p;
}

void count_bank_conflicts(void* const* slots, int matrices) {
  for (int i = 0; i < matrices; ++i) {
    unsigned groups = 0;  // of 4 banks
    for (int r = 0; r < 8; ++r) groups |= 1u << (static_cast<RowSlot*>(slots[i * 8 + r])->address >> 4 & 7);
    ++stats.matrix_phases;
    stats.bank_conflicts += groups != 255;
  }
}

// Lane l holds elements (l / 4, 2 (l % 4)) and its neighbour to the right; transposed, the mirror image.
void load_rows(void* const* slots, unsigned, int tag) {
  const int matrices = tag & 15;
  const bool transposed = tag & kTransposed;
  count_bank_conflicts(slots, matrices);
  for (int i = 0; i < matrices; ++i) {
    uint16_t m[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(m[r], matrix_row(slots, i * 8 + r), 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane >> 2, c = (lane & 3) * 2;
      const uint32_t first = transposed ? m[c][r] : m[r][c], second = transposed ? m[c + 1][r] : m[r][c + 1];
      static_cast<RowSlot*>(slots[lane])->r[i] = first | second << 16;
    }
  }
}

// ---- mma.sync m16n8k16

struct MmaSlot {
  float* d;
  const uint32_t *a, *b;
};

void run_mma(void* const* slots, unsigned, int tag) {
  const auto element = static_cast<Element>(tag);
  float a[16][16], b[16][8], d[16][8];
  const auto slot = [&](int lane) -> MmaSlot& { return *static_cast<MmaSlot*>(slots[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), column = t + 8 * (i >> 1);
      a[row][column] = low(slot(lane).a[i], element);
      a[row][column + 1] = high(slot(lane).a[i], element);
    }
    for (int i = 0; i < 2; ++i) {
      b[t + 8 * i][g] = low(slot(lane).b[i], element);
      b[t + 8 * i + 1][g] = high(slot(lane).b[i], element);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i >> 1)][t + (i & 1)] = slot(lane).d[i];
  }
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      for (int k = 0; k < 16; ++k) d[r][c] += a[r][k] * b[k][c];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) slot(lane).d[i] = d[(lane >> 2) + 8 * (i >> 1)][(lane & 3) * 2 + (i & 1)];
  }
}

}  // namespace

void load_matrix(uint32_t* r, int matrices, bool transposed, const void* row) {
  RowSlot slot{shared_address(row), r, __builtin_return_address(0)};
  warp_op(~0u, Op::kLoadMatrix, matrices | (transposed ? kTransposed : 0), &slot, load_rows);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element) {
  MmaSlot slot{d, a, b};
  warp_op(~0u, Op::kMma, static_cast<int>(element), &slot, run_mma);
}

// ---- wgmma: each warp of the four computes 16 of the 64 rows
namespace {

constexpr int kRows = 16, kDepth = 16;

// Address of element (row along M or N, k) under matrix descriptor d (PTX ISA, "Shared memory matrix layout"). In atoms
// of 8 rows by `span` bytes; `leading` and `stride` are the descriptor's byte offsets between atoms.
uint32_t element_address(uint64_t d, uint32_t row, uint32_t k, bool mn_major) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(d >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (d >> 49 & 7) fail("wgmma: descriptors with a base offset are not emulated");
  const int mode = static_cast<int>(d >> 62);                          // 0 none, 1..3 for 128, 64, 32 bytes
  const uint32_t span = mode == 0 ? 16u : 256u >> mode, n = span / 2;  // bytes and elements in a row of an atom
  uint32_t address;
  if (!mn_major) {
    // The leading offset counts only without a swizzle: k's 16 elements fit one atom otherwise.
    address = start + (row >> 3) * stride + (row & 7) * span + (mode == 0 ? (k >> 3) * leading + (k & 7) * 2 : k * 2);
  } else if (mode == 0) {
    address = start + (row >> 3) * stride + (k >> 3) * leading + (k & 7) * 16 + (row & 7) * 2;
  } else {
    address = start + row / n * leading + (k >> 3) * stride + (k & 7) * span + row % n * 2;
  }
  return mode == 0 ? address : address ^ (address >> 7 & ((8u >> (mode - 1)) - 1)) << 4;
}

float read_operand(uint64_t d, int row, int k, bool mn_major, Element element, int thread) {
  const uint32_t address = element_address(d, static_cast<uint32_t>(row), static_cast<uint32_t>(k), mn_major);
  void* p = shared_range(address, 2, "wgmma operand");
  if (race) race->access(p, 2, false, true, nullptr, thread);
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return value_of(bits, element);
}

void run_wgmma(WarpMma& w, int warp) {
  if (w.commit || w.done) return;
  w.done = true;
  const MmaAsync& m = w.lanes[0];
  std::vector<float> b(static_cast<size_t>(kDepth * m.n)), d(static_cast<size_t>(kRows * m.n));
  float a[kRows][kDepth];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      a[r][k] = read_operand(m.a, (warp & 3) * kRows + r, k, m.a_mn_major, m.element, warp * 32);
    }
  }
  for (int c = 0; c < m.n; ++c) {
    for (int k = 0; k < kDepth; ++k) b[k * m.n + c] = read_operand(m.b, c, k, m.b_mn_major, m.element, warp * 32);
  }
  // Register i of lane l is element (l / 4 + 8 (i / 2 % 2), 8 (i / 4) + 2 (l % 4) + i % 2).
  const auto place = [&](int lane, int i) -> float& {
    return d[((lane >> 2) + 8 * (i >> 1 & 1)) * m.n + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1)];
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < m.n / 2; ++i) place(lane, i) = m.accumulate ? w.lanes[lane].d[i] : 0.0f;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      for (int c = 0; c < m.n; ++c) d[r * m.n + c] += a[r][k] * b[k * m.n + c];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < m.n / 2; ++i) w.lanes[lane].d[i] = place(lane, i);
  }
}

void issue_wgmma(void* const* slots, unsigned, int) {
  const int warp = running()->warp;
  Warp& w = machine.warps[warp];
  if (!w.mma_fenced) fail("wgmma.mma_async: no wgmma.fence since the accumulators were last free to be used");
  w.mma_queue.emplace_back();
  WarpMma& m = w.mma_queue.back();
  for (int lane = 0; lane < 32; ++lane) {
    m.lanes[lane] = *static_cast<MmaAsync*>(slots[lane]);
    if (m.lanes[lane].a != m.lanes[0].a || m.lanes[lane].b != m.lanes[0].b) {
      fail("wgmma: the descriptors differ between lanes");
    }
  }
  if (config.completion == Completion::kEager || (config.completion == Completion::kRandom && one_in(2))) {
    for (WarpMma& x : w.mma_queue) run_wgmma(x, warp);
  }
}

}  // namespace

void mma_async(const MmaAsync& mma) {
  MmaAsync slot = mma;
  warp_op(~0u, Op::kWgmma, mma.n, &slot, issue_wgmma);
}

void mma_async_fence() { machine.warps[running()->warp].mma_fenced = true; }

void mma_async_commit() {
  warp_op(~0u, Op::kWgmmaCommit, 0, nullptr, [](void* const*, unsigned, int) {
    Warp& w = machine.warps[running()->warp];
    w.mma_queue.emplace_back();
    w.mma_queue.back().commit = true;
  });
}

void mma_async_wait(int keep) {
  warp_op(~0u, Op::kWgmmaWait, keep, nullptr, [](void* const*, unsigned, int keep_groups) {
    Warp& w = machine.warps[running()->warp];
    int groups = 0;
    for (const WarpMma& m : w.mma_queue) groups += m.commit;
    while (groups > keep_groups) {
      groups -= w.mma_queue.front().commit;
      run_wgmma(w.mma_queue.front(), running()->warp);
      w.mma_queue.pop_front();
    }
    w.mma_fenced = false;
  });
}

}  // namespace coh
