// The sm_90a projection kernel against fp64 loops: both tile sizes, rings that wrap, views, groups, epilogues.
#include "cuda_on_host/tests/projection_problem.h"
#include "projection/projection_sm90_cuda.cuh"

namespace {

using namespace coh_test;
using vico::BFloat16;
using vico::Half;

// On three multiprocessors, so that persistent blocks have several tiles each.
void kernel(const vico::ProjectionParams& p, cudaStream_t stream) { vico::launch_projection_sm90(p, 3, stream); }

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
  return q;
}

}  // namespace

// One tile of 128 x 128 with tails everywhere.
COH_CASE(small_tiles) {
  GroupProblem q = rows(1, 70, 104, 72);
  q.bias = true;
  q.a_padding = 8;
  q.out_padding = 8;
  project<BFloat16>(kernel, {q});
  project<Half>(kernel, {rows(1, 1, 1, 8)});
}
// Seven steps through six stages.
COH_CASE(small_ring_wraps) { project<Half>(kernel, {rows(1, 5, 8, 7 * 64)}); }
// Four tiles of 128 x 256 for three blocks: the ring goes on from tile to tile.
COH_CASE(large_tiles_persist) {
  GroupProblem q = rows(1, 130, 264, 168);
  q.bias = q.gelu = true;
  project<BFloat16>(kernel, {q});
}
COH_CASE(two_groups_mapped) {
  GroupProblem full = rows(2, 48, 40, 64), compressed = rows(3, 16, 24, 128);
  full.bias = compressed.bias = full.mapped = compressed.mapped = compressed.ordered = true;
  project<BFloat16>(kernel, {full, compressed});
}
COH_CASE(odd_columns_and_dropout) {
  GroupProblem q = rows(1, 37, 43, 16);
  q.bias = q.gelu = true;
  q.dropout = 0.4;
  project<BFloat16>(kernel, {q});
}
COH_CASE(empty_groups) {
  project<BFloat16>(kernel, {rows(0, 4, 8, 8), rows(1, 0, 8, 7)});
  project<BFloat16>(kernel, {rows(0, 4, 8, 8), rows(2, 3, 16, 24)});
}
// Output grids of 8 x 8, 4 x 16 and its transpose; three boxes, so that the second tile's lower one is outside.
COH_CASE(shuffled_view) {
  project<BFloat16>(kernel, {view({5, 16, 16, 32, 2, 1, false, Gather::kSome}, 16)});
  project<Half>(kernel, {view({1, 8, 32, 32, 2, 1, true}, 16)});
}
COH_CASE(folded_norm) {
  GroupProblem full = view({3, 8, 32, 32, 2, 1, false, Gather::kSome}, 24);
  GroupProblem compressed = view({2, 32, 32, 16, 4, 1, false, Gather::kRepeated}, 24);
  full.folded = compressed.folded = full.gelu = compressed.gelu = full.bias = compressed.bias = true;
  full.mapped = true;
  project<BFloat16>(kernel, {full, compressed});
  project<Half>(kernel, {full, rows(3, 64, 24, 200)});  // the connectors' second launch: a view beside rows
}
// What it does not take.
COH_CASE(what_does_not_fit) {
  const auto fits = [](const GroupProblem& q) {
    coh::Random random(1);
    GroupData<BFloat16> d(q, random);
    vico::ProjectionParams p;
    p.group[0] = d.g;
    return vico::fits_sm90(p);
  };
  GroupProblem unaligned = rows(1, 4, 8, 16), padded = rows(1, 4, 8, 16);
  unaligned.offset = 1;
  padded.a_padding = 4;
  expect(fits(rows(1, 4, 3, 16)), "any number of columns fits");
  expect(!fits(unaligned) && !fits(padded), "rows that are not aligned");
  expect(!fits(rows(1, 4, 8, 12)) && !fits(rows(1, 4, 8, 0)), "a depth that is no multiple of 8, or none");
  expect(!fits(view({1, 4, 4, 32, 2, 1}, 8)), "tiles of 4 tokens");
  expect(!fits(view({1, 16, 16, 24, 2, 1}, 8)), "a run of 48 channels");
  expect(!fits(view({1, 16, 16, 32, 2, 1, false, Gather::kNone, 8, 0}, 8)), "gaps between tokens");
  expect(!fits(view({1, 6, 64, 32, 2, 0}, 8)), "32 x 3 output tokens");
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
