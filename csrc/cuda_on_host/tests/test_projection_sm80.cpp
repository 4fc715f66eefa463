// The sm_80 projection kernel against fp64 loops: every shape, alignment, view and epilogue.
#include "cuda_on_host/tests/projection_problem.h"
#include "projection/projection_sm80_cuda.cuh"

namespace {

using namespace coh_test;
using vico::BFloat16;
using vico::Half;

constexpr Projection kernel = vico::launch_projection_sm80;

GroupProblem rows(int64_t tiles, int64_t tile_rows, int64_t columns, int64_t depth) {
  GroupProblem q;
  q.tiles = tiles;
  q.tile_rows = tile_rows;
  q.columns = columns;
  q.depth = depth;
  return q;
}
GroupProblem view(const ShuffleProblem& shuffle, int64_t columns) {
  GroupProblem q = rows(0, 0, columns, 0);
  q.view = shuffle;
  q.bias = true;
  return q;
}

}  // namespace

// More tiles than one in both directions, more steps than stages, tails everywhere.
COH_CASE(rows_with_tails) {
  GroupProblem q = rows(1, 131, 136, 168);
  q.bias = true;
  project<BFloat16>(kernel, {q});
  q = rows(1, 3, 40, 40);
  q.a_padding = 8;
  q.out_padding = 8;
  project<Half>(kernel, {q});
}
COH_CASE(odd_sizes) {
  project<BFloat16>(kernel, {rows(1, 1, 1, 1)});
  GroupProblem q = rows(1, 5, 37, 43);
  q.bias = q.gelu = true;
  q.dropout = 0.4;
  project<Half>(kernel, {q});
}
COH_CASE(unaligned) {
  GroupProblem q = rows(1, 5, 40, 72);
  q.offset = 1;
  q.bias = true;
  project<BFloat16>(kernel, {q});
  q.offset = 0;
  q.a_padding = 3;
  q.out_padding = 5;
  project<BFloat16>(kernel, {q});
}
COH_CASE(no_depth) {
  GroupProblem q = rows(1, 3, 16, 0);
  q.bias = q.gelu = true;
  project<BFloat16>(kernel, {q});
}
COH_CASE(empty_groups) {
  project<BFloat16>(kernel, {rows(0, 4, 8, 8), rows(1, 0, 8, 8)});
  project<BFloat16>(kernel, {rows(0, 4, 8, 7), rows(2, 3, 16, 24)});
  project<Half>(kernel, {rows(2, 3, 0, 8), rows(0, 3, 8, 8)});
}
// Both connectors' middle layers, and their last ones into one order.
COH_CASE(two_groups) {
  GroupProblem full = rows(3, 16, 72, 64), compressed = rows(5, 4, 48, 96);
  full.bias = compressed.bias = full.gelu = compressed.gelu = true;
  compressed.dropout = 0.1;
  project<BFloat16>(kernel, {full, compressed});
  full.gelu = compressed.gelu = false;
  full.mapped = compressed.mapped = compressed.ordered = true;
  compressed.dropout = 0;
  project<Half>(kernel, {full, compressed});
}
COH_CASE(dropout) {
  GroupProblem q = rows(1, 33, 160, 32);
  q.bias = q.gelu = true;
  q.dropout = 0.5;
  project<BFloat16>(kernel, {q});
}
COH_CASE(shuffled_view) {
  project<BFloat16>(kernel, {view({3, 4, 8, 8, 2, 1, false, Gather::kSome}, 24)});
  project<Half>(kernel, {view({2, 8, 8, 16, 4, 1, true, Gather::kRepeated}, 24)});
  project<BFloat16>(kernel, {view({2, 6, 3, 5, 3, 2}, 9)});
  project<BFloat16>(kernel, {view({2, 4, 4, 16, 2, 1, false, Gather::kNone, 16, 48}, 8)});
}
COH_CASE(folded_norm) {
  GroupProblem full = view({4, 8, 8, 16, 2, 1, false, Gather::kSome}, 40);
  GroupProblem compressed = view({4, 8, 8, 16, 4, 1, false, Gather::kRepeated}, 48);
  full.folded = compressed.folded = full.gelu = compressed.gelu = true;
  compressed.mapped = true;
  project<BFloat16>(kernel, {full, compressed});
  project<Half>(kernel, {full, rows(3, 4, 24, 72)});  // the connectors' second launch: a view beside rows
}
COH_CASE(no_bank_conflicts) {
  const uint64_t before = coh::stats.bank_conflicts;
  project<BFloat16>(kernel, {rows(1, 128, 128, 32)});
  expect(coh::stats.bank_conflicts == before, "ldmatrix had bank conflicts");
}

// A place or a tile that does not exist ends the kernel, as index checks on the device do.
COH_CASE(bad_indices) {
  const auto message = [](const GroupProblem& q, int64_t out_rows, int64_t tile) -> std::string {
    coh::Random random(1);
    GroupData<BFloat16> d(q, random);
    vico::ProjectionParams p;
    p.group[0] = d.g;
    Buffer<int64_t> tile_index(1);
    tile_index[0] = tile;
    if (q.view) p.group[0].shape.tile_index = tile_index.data();
    p.group[0].out_rows = out_rows;
    try {
      kernel(p, nullptr);
    } catch (const std::exception& e) {
      return e.what();
    }
    return "";
  };
  GroupProblem q = rows(1, 2, 8, 8), shuffled = view({1, 16, 16, 32, 2, 1, false, Gather::kSome}, 8);
  q.mapped = true;
  const std::string place = message(q, 2, 0), tile = message(shuffled, 64, 1);
  expect(place.find("places in [0, 2), row 1 would go to 2") != std::string::npos, "got: %s", place.c_str());
  expect(tile.find("tile_index must lie in [0, 1), got 1") != std::string::npos, "got: %s", tile.c_str());
}

COH_MAIN
