// The CUDA kernels of compress_sequence against walks over each row, position by position.
#include "compress_sequence/compress_sequence_cuda.cu"
#include "cuda_on_host/tests/decisions.h"

namespace {

using namespace coh_test;

constexpr int64_t kPlaceholder = 7, kFull = 5, kCompressed = 2;

// Rows of text and tiles with padding at either end, which may look like placeholders.
struct Batch {
  int64_t rows, length, tiles = 0;
  std::vector<int64_t> ids;
  std::vector<int> mask, compress;

  Batch(int64_t b, int64_t l, coh::Random& random) : rows(b), length(l) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = random.below(3) ? random.below(length / 3 + 1) : 0;
      const int64_t end = length - (random.below(3) ? random.below(length / 3 + 1) : 0);
      const int64_t text = 1 + random.below(12);
      for (int64_t i = 0; i < length; ++i) {
        const bool is_padding = i < begin || i >= end;
        if (!is_padding && i + kFull <= end && random.below(text) == 0) {
          for (int64_t k = 0; k < kFull; ++k) add(kPlaceholder, 1);
          i += kFull - 1;
          ++tiles;
        } else {
          // A hole in the mask that is no padding: its position stays.
          const bool is_hole = !is_padding && i > begin && i + 1 < end && random.below(9) == 0;
          add(is_padding ? kPlaceholder : 20 + random.below(9), !is_padding && !is_hole);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) compress.push_back(random.below(2) == 0);
  }
  void add(int64_t id, int is_token) {
    ids.push_back(id);
    mask.push_back(is_token);
  }
  size_t at(int64_t b, int64_t i) const { return static_cast<size_t>(b * length + i); }
};

struct Wanted {
  std::vector<int> keep;
  std::vector<int64_t> counts;
};

Wanted walk(const Batch& batch) {
  Wanted w{std::vector<int>(batch.ids.size(), 0), std::vector<int64_t>(static_cast<size_t>(batch.rows), 0)};
  int64_t seen = 0;
  for (int64_t b = 0; b < batch.rows; ++b) {
    int64_t begin = 0, end = batch.length;
    while (begin < end && !batch.mask[batch.at(b, begin)]) ++begin;
    while (end > begin && !batch.mask[batch.at(b, end - 1)]) --end;
    for (int64_t i = begin; i < end; ++i) {
      bool stays = true;
      if (batch.ids[batch.at(b, i)] == kPlaceholder) {
        stays = !batch.compress[static_cast<size_t>(seen / kFull)] || seen % kFull < kCompressed;
        ++seen;
      }
      w.keep[batch.at(b, i)] = stays;
      w.counts[static_cast<size_t>(b)] += stays;
    }
  }
  return w;
}

// A batch on the device, with everything that the kernels write.
struct Keep {
  Buffer<int64_t> ids, begin, end, placeholders, counts;
  Buffer<unsigned char> mask, compress, keep;
  vico::KeepPlaceholdersParams p;

  explicit Keep(const Batch& batch)
      : ids(batch.ids.size()),
        begin(static_cast<size_t>(batch.rows)),
        end(begin.size()),
        placeholders(begin.size()),
        counts(begin.size()),
        mask(batch.mask.size(), 1),
        compress(batch.compress.size(), 1),
        keep(batch.ids.size(), 1) {
    fill(ids, batch.ids);
    fill(mask, batch.mask);
    fill(compress, batch.compress);
    p.rows = batch.rows;
    p.length = batch.length;
    p.tiles = batch.tiles;
    p.placeholder = kPlaceholder;
    p.full_tokens = kFull;
    p.compressed_tokens = kCompressed;
    p.input_ids = ids.data();
    p.mask = mask.data();
    p.compress = compress.data();
    p.begin = begin.data();
    p.end = end.data();
    p.placeholders = placeholders.data();
    p.keep = keep.data();
    p.counts = counts.data();
  }
  void run() { vico::keep_placeholders_cuda(p, nullptr); }
};

// Rows and length: the long ones take several chunks.
constexpr int64_t kLong = 10301;
std::vector<std::pair<int64_t, int64_t>> sizes() {
  return {{1, 1}, {3, 17}, {4, 60}, {1, 1500}, {2, kLong}, {1, kLong}, {0, 5}, {2, 0}, {1, 0}};
}

}  // namespace

COH_CASE(keep) {
  coh::Random random(1);
  for (const auto& [rows, length] : sizes()) {
    Batch batch(rows, length, random);
    for (bool masked : {true, false}) {
      if (!masked) {
        batch.mask.assign(batch.mask.size(), 1);
        for (int64_t& id : batch.ids) id += id == kPlaceholder;  // padding is text now: no placeholders, no tiles
        batch.tiles = 0;
        batch.compress.clear();
      }
      const Wanted wanted = walk(batch);
      Keep device(batch);
      if (!masked) device.p.mask = nullptr;
      device.run();
      expect_equal(device.keep, wanted.keep, "keep");
      expect_equal(device.counts, wanted.counts, "counts");
    }
  }
}

COH_CASE(all_padding) {
  coh::Random random(2);
  Batch batch(2, 9, random);
  batch.mask.assign(18, 0);
  batch.tiles = 0;
  batch.compress.clear();
  Keep device(batch);
  device.run();
  expect_equal(device.keep, std::vector<int>(18, 0), "keep");
  expect_equal(device.counts, std::vector<int>{0, 0}, "counts");
}

COH_CASE(bad_batches) {
  coh::Random random(3);
  const auto refuses = [&](const std::vector<int64_t>& ids, int64_t tiles, const char* text) {
    Batch batch(1, static_cast<int64_t>(ids.size()), random);
    batch.ids = ids;
    batch.mask.assign(ids.size(), 1);
    batch.tiles = tiles;
    batch.compress.assign(static_cast<size_t>(tiles), 1);
    expect_refusal([&] { Keep(batch).run(); }, text);
  };
  const int64_t x = kPlaceholder;
  refuses({x, x, x, x, x, 1}, 2, "must hold 10 placeholders (id 7)");
  refuses({x, x, x, x, x, x, x, x, x, x}, 1, "1 tiles of the plan times 5, got 10. Is the plan that of this batch");
  refuses({1, x, x, 1, x, x, x}, 1, "got only 2 at row 0, position 1, before another token");
  refuses({x, x, x, 1, 1, 1, 1, 1, 1, x, x}, 1, "got only 3 at row 0, position 0, before another token");
}

COH_CASE(positions) {
  coh::Random random(4);
  for (const auto& [rows, length] : sizes()) {
    const Batch batch(rows, length, random);
    const Wanted wanted = walk(batch);
    int64_t longest = 0;
    for (int64_t count : wanted.counts) longest = std::max(longest, count);
    for (bool pad_left : {true, false}) {
      for (int64_t spare : {0, 3}) {
        if (length == kLong && pad_left == (spare == 0)) continue;
        const int64_t out_length = longest + spare;
        std::vector<int64_t> position, source;
        int64_t visual = rows * length;
        for (int64_t b = 0; b < rows; ++b) {
          const size_t padding = static_cast<size_t>(out_length - wanted.counts[static_cast<size_t>(b)]);
          if (pad_left) {
            position.insert(position.end(), padding, -1);
            source.insert(source.end(), padding, -1);
          }
          for (int64_t i = 0; i < length; ++i) {
            if (!wanted.keep[batch.at(b, i)]) continue;
            position.push_back(b * length + i);
            source.push_back(batch.ids[batch.at(b, i)] == kPlaceholder ? visual++ : b * length + i);
          }
          if (!pad_left) {
            position.insert(position.end(), padding, -1);
            source.insert(source.end(), padding, -1);
          }
        }
        Buffer<int64_t> ids(batch.ids.size()), counts(static_cast<size_t>(rows)), kept_visual(counts.size());
        Buffer<unsigned char> keep(batch.ids.size(), 1);
        Buffer<int64_t> got_position(position.size()), got_source(source.size());
        fill(ids, batch.ids);
        fill(keep, wanted.keep);
        vico::CompressSequenceParams p;
        p.rows = rows;
        p.length = length;
        p.out_length = out_length;
        p.placeholder = kPlaceholder;
        p.pad_left = pad_left;
        p.input_ids = ids.data();
        p.keep = keep.data();
        p.counts = counts.data();
        p.visual = kept_visual.data();
        p.position = got_position.data();
        p.source = got_source.data();
        vico::compress_sequence_cuda(p, nullptr);
        expect_equal(got_position, position, "position");
        expect_equal(got_source, source, "source");
        if (longest == 0 || length == kLong) continue;
        p.out_length = longest - 1;
        expect_refusal([&] { vico::compress_sequence_cuda(p, nullptr); }, "length must be at least the ");
      }
    }
  }
}

COH_CASE(tiles) {
  coh::Random random(6);
  for (const int64_t embed_rows : {0, 7}) {
    for (const int64_t tiles : {0, 1, 5, 40}) {
      for (const int64_t text : {1, 30, 9000}) {  // rows between tiles, up to more than a chunk of the scan
        std::vector<int64_t> source, cu_tokens = {0}, wanted;
        for (int64_t t = 0; t < tiles; ++t) {
          for (int64_t n = random.below(3) ? 0 : random.below(text + 1); n > 0; --n) {
            source.push_back(embed_rows > 0 && random.below(5) ? random.below(embed_rows) : -1);
          }
          const int64_t tokens = random.below(4) ? 5 : 1 + random.below(900);
          wanted.push_back(static_cast<int64_t>(source.size()));
          for (int64_t j = 0; j < tokens; ++j) source.push_back(embed_rows + cu_tokens.back() + j);
          cu_tokens.push_back(cu_tokens.back() + tokens);
        }
        for (int64_t n = random.below(9); n > 0; --n) source.push_back(-1);
        Buffer<int64_t> sources(source.size()), offsets(cu_tokens.size()), out(wanted.size());
        fill(sources, source);
        fill(offsets, cu_tokens);
        vico::TileRowsParams p;
        p.rows = static_cast<int64_t>(source.size());
        p.tiles = tiles;
        p.embed_rows = embed_rows;
        p.source = sources.data();
        p.cu_tokens = offsets.data();
        p.out = out.data();
        vico::tile_rows_cuda(p, nullptr);
        expect_equal(out, wanted, "rows of tiles");
        if (tiles != 5) continue;
        const auto refuses = [&](int64_t& value, int64_t bad) {
          const int64_t good = value;
          value = bad;
          expect_refusal([&] { vico::tile_rows_cuda(p, nullptr); }, "source must hold the tokens of tile ");
          value = good;
        };
        refuses(sources[static_cast<size_t>(wanted[2])], -1);  // its first token
        refuses(sources[static_cast<size_t>(wanted[2] + cu_tokens[3] - cu_tokens[2] - 1)], embed_rows);  // its last
        for (int64_t bad : {int64_t{-1}, offsets[3], p.rows + 1, INT64_MAX, INT64_MIN}) refuses(offsets[2], bad);
      }
    }
  }
}

COH_CASE(renumber) {
  coh::Random random(5);
  for (const auto& [rows, length] : sizes()) {
    const Batch batch(rows, length, random);
    const Wanted wanted = walk(batch);
    for (int kind = 0; kind < 3; ++kind) {
      // Consecutive numbers; starting again now and then; anything at all. One row for all of them, or each its own.
      const bool is_shared = kind == 1;
      if (length == kLong && !is_shared) continue;
      std::vector<int64_t> numbers;
      for (int64_t b = 0; b < (is_shared ? std::min<int64_t>(rows, 1) : rows); ++b) {
        for (int64_t i = 0, number = random.below(5); i < length; ++i, ++number) {
          if (kind > 0 && random.below(kind == 1 ? 30 : 2) == 0) number = random.below(9);
          numbers.push_back(number);
        }
      }
      int64_t longest = 0;
      for (int64_t count : wanted.counts) longest = std::max(longest, count);
      const int64_t out_length = longest + 1;
      std::vector<int64_t> position, out;
      for (int64_t b = 0; b < rows; ++b) {
        const int64_t* own = numbers.data() + (is_shared ? 0 : b * length);
        position.push_back(-1);
        out.push_back(0);
        int64_t dropped = -1;  // -1: nothing kept yet
        for (int64_t i = 0; i < length; ++i) {
          if (i > 0 && own[i] != own[i - 1] + 1 && dropped >= 0) dropped = 0;
          if (!wanted.keep[batch.at(b, i)]) {
            dropped += dropped >= 0;
            continue;
          }
          dropped = std::max<int64_t>(dropped, 0);
          position.push_back(b * length + i);
          out.push_back(own[i] - dropped);
        }
        position.resize(static_cast<size_t>((b + 1) * out_length), -1);
        out.resize(position.size(), 0);
      }
      Buffer<int64_t> position_ids(numbers.size()), positions(position.size()), got(out.size());
      Buffer<int64_t> column(static_cast<size_t>(rows * length));
      fill(position_ids, numbers);
      fill(positions, position);
      vico::RenumberPositionsParams p;
      p.rows = rows;
      p.length = length;
      p.out_length = out_length;
      p.row_stride = is_shared ? 0 : length;
      p.position_ids = position_ids.data();
      p.position = positions.data();
      p.out = got.data();
      p.column = column.data();
      vico::renumber_positions_cuda(p, nullptr);
      expect_equal(got, out, "position ids");
      if (rows == 0 || out_length < 2 || length == kLong) continue;
      for (int64_t bad : {rows * length, int64_t{0}}) {
        if (bad == 0 && rows == 1 && longest == 1) continue;  // the row's only position
        positions[position.size() - 1] = bad;                 // past its row; before an earlier one, or of another row
        expect_refusal([&] { vico::renumber_positions_cuda(p, nullptr); },
                       "position must hold flat positions of its own row, ascending, or -1: row ");
      }
    }
  }
}

COH_MAIN
