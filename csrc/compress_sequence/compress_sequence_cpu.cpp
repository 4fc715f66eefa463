// CPU kernels of compress_sequence.
#include <cstring>

#include "common/vec.h"
#include "compress_sequence/compress_sequence.h"

namespace vico::VICO_CPU_ARCH {

void count_placeholders(const KeepPlaceholdersParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* ids = p.input_ids + b * p.length;
    int64_t first = 0, last = p.length;
    if (p.mask) {
      const unsigned char* mask = p.mask + b * p.length;
      while (first < last && !mask[first]) ++first;
      while (last > first && !mask[last - 1]) --last;
    }
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) count += ids[i] == p.placeholder;
    p.begin[b] = first;
    p.end[b] = last;
    p.placeholders[b] = count;
  }
}

void keep_placeholders(const KeepPlaceholdersParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* ids = p.input_ids + b * p.length;
    unsigned char* keep = p.keep + b * p.length;
    const int64_t first = p.begin[b], last = p.end[b];
    for (int64_t i = 0; i < p.length; ++i) keep[i] = (i >= first) & (i < last);
    int64_t tile = p.first_tile[b], kept = last - first;
    p.broken[b] = -1;
    for (int64_t i = first; i < last;) {
      if (ids[i] != p.placeholder) {
        ++i;
        continue;
      }
      int64_t n = 1;
      while (n < p.full_tokens && i + n < last && ids[i + n] == p.placeholder) ++n;
      if (n < p.full_tokens) {
        p.broken[b] = i;
        break;
      }
      if (p.compress[tile++]) {
        std::memset(keep + i + p.compressed_tokens, 0, p.full_tokens - p.compressed_tokens);
        kept -= p.full_tokens - p.compressed_tokens;
      }
      i += n;
    }
    p.counts[b] = kept;
  }
}

void count_kept(const CompressSequenceParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* ids = p.input_ids + b * p.length;
    const unsigned char* keep = p.keep + b * p.length;
    int64_t kept = 0, visual = 0;
    for (int64_t i = 0; i < p.length; ++i) {
      kept += keep[i];
      visual += keep[i] & (ids[i] == p.placeholder);
    }
    p.counts[b] = kept;
    p.visual[b] = visual;
  }
}

void compress_sequence(const CompressSequenceParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* ids = p.input_ids + b * p.length;
    const unsigned char* keep = p.keep + b * p.length;
    int64_t* position = p.position + b * p.out_length;
    int64_t* source = p.source + b * p.out_length;
    int64_t out = p.pad_left ? p.out_length - p.counts[b] : 0;
    for (int64_t i = 0; i < out; ++i) position[i] = source[i] = -1;
    int64_t visual = p.rows * p.length + p.first_visual[b];
    for (int64_t i = 0; i < p.length; ++i) {
      if (!keep[i]) continue;
      position[out] = b * p.length + i;
      source[out++] = ids[i] == p.placeholder ? visual++ : b * p.length + i;
    }
    for (; out < p.out_length; ++out) position[out] = source[out] = -1;
  }
}

void renumber_positions(const RenumberPositionsParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* ids = p.position_ids + b * p.row_stride;
    const int64_t* position = p.position + b * p.out_length;
    int64_t* out = p.out + b * p.out_length;
    // `next` runs over the row; `dropped` counts the positions left out since the last reset. What is left out before
    // the first kept position is padding: the row's first number stays as it is.
    int64_t next = -1, dropped = 0;
    p.broken[b] = -1;
    for (int64_t j = 0; j < p.out_length; ++j) {
      out[j] = 0;
      if (position[j] < 0) continue;
      const int64_t kept = position[j] - b * p.length;
      if (kept < (next < 0 ? 0 : next) || kept >= p.length) {
        if (p.broken[b] < 0) p.broken[b] = j;
        continue;
      }
      if (next < 0) next = kept;
      for (; next <= kept; ++next) {
        if (next > 0 && ids[next] != ids[next - 1] + 1) dropped = 0;
        if (next < kept) ++dropped;
      }
      out[j] = ids[kept] - dropped;
    }
  }
}

void tile_rows(const TileRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = p.cu_tokens[t], last = p.cu_tokens[t + 1];
    p.out[t] = -1;
    if (first < 0 || last <= first || last > p.rows) continue;
    const int64_t tokens = last - first, number = p.embed_rows + first;
    int64_t row = first;
    while (row < p.rows && p.source[row] != number) ++row;
    if (row > p.rows - tokens) continue;
    int64_t j = 0;
    while (j < tokens && p.source[row + j] == number + j) ++j;
    if (j == tokens) p.out[t] = row;
  }
}

}  // namespace vico::VICO_CPU_ARCH
