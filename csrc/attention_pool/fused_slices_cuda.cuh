// What a warp of the fused kernel of attention_pool does with its slice of the channels.
#pragma once

#include "attention_pool/partial_cuda.cuh"
#include "common/mma.cuh"

namespace vico {

// The geometry of a block whose warps hold kTiles tiles of 8 channels each: 4 kTiles registers of sums per thread.
template <int kTiles, int kStepTokens = kTiles <= 16 ? 16 : 8, int kBlocksPerMultiprocessor = kTiles <= 16 ? 2 : 1,
          int kStepsAhead = 2>
struct FusedPool {
  static constexpr int kSpan = 8 * kTiles;  // channels per warp
  static constexpr int kTokens = kStepTokens;
  static constexpr int kMostWarps = 8, kThreads = 32 * kMostWarps;  // those without channels help with the softmax
  static constexpr int kBlocks = kBlocksPerMultiprocessor;
  static constexpr int kStages = kStepsAhead;                          // steps in shared memory at a time, or 1
  static constexpr int kScoreStride = kTokens == 8 ? 8 : kTokens + 8;  // of a head's scores and weights: no conflicts
  // A thread of the softmax has kItems scores of a head, which kLanes of them share.
  static constexpr int kItems = kPoolHeads * kTokens > kThreads ? kPoolHeads* kTokens / kThreads : 1;
  static constexpr int kLanes = kTokens / kItems;

  static VICO_INLINE int warps(int channels) { return (channels + kSpan - 1) / kSpan; }
  // Elements between rows in shared memory: an odd number of 16-byte units, so that ldmatrix meets no bank twice.
  static VICO_INLINE int row_stride(int channels) { return warps(channels) * kSpan + 8; }
  static VICO_INLINE size_t shared_bytes(int channels, int stages) {
    const size_t rows = static_cast<size_t>(kPoolHeads + stages * kTokens) * static_cast<size_t>(row_stride(channels));
    return 2 * rows + kPoolHeads * (kMostWarps * kScoreStride * sizeof(float) + kScoreStride * 2 + sizeof(float));
  }
};

// By one warp: channels [begin, begin + 8 kTiles) of rows [0, kRows) into shared memory, zeros where there is none.
// `wide`: 16 bytes at a time, asynchronously.
template <int kRows, int kTiles, class T>
VICO_DEVICE void stage_slice(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int channels,
                             int begin, bool wide) {
  constexpr int kAbreast = kTiles < 32 ? kTiles : 32, kRowsAbreast = 32 / kAbreast;  // lanes in a row, rows
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / kAbreast, c = begin + lane % kAbreast * 8;
  if (wide && rows >= kRows && begin + 8 * kTiles <= channels) {
    to += r * to_stride + c;
    from += r * from_stride + c;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAbreast) {
#pragma unroll
      for (int j = 0; j < kTiles; j += kAbreast) {
        if (j + kAbreast <= kTiles || j + lane % kAbreast < kTiles) ptx::cp_async_16(to + j * 8, from + j * 8);
      }
      to += kRowsAbreast * to_stride;
      from += kRowsAbreast * from_stride;
    }
  } else if (wide) {
#pragma unroll 1
    for (int i = r; i < kRows; i += kRowsAbreast) {
#pragma unroll 1
      for (int j = c; j < begin + 8 * kTiles; j += kAbreast * 8) {
        const bool there = i < rows && j < channels;
        ptx::cp_async_16(to + i * to_stride + j, there ? from + i * from_stride + j : from, there ? 16 : 0);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
#pragma unroll 1
      for (int j = begin + lane; j < begin + 8 * kTiles; j += 32) {
        to[i * to_stride + j] = i < rows && j < channels ? from[i * from_stride + j] : T{};
      }
    }
  }
}

// scores[heads, tokens] of a warp's slice. `query` and `x` are its first elements in shared memory.
template <class T, class F>
VICO_DEVICE void score_slice(float (&scores)[F::kTokens / 8][4], const T* query, const T* x, int stride, int lane) {
  constexpr int kHalves = F::kTokens / 8, kSteps = F::kSpan / 16;
  constexpr int kChains = kHalves >= 4 ? 1 : 4 / kHalves;  // sums that do not wait for each other
  const T* a_row = query + (lane & 15) * stride + (lane >> 4) * 8;
  float part[kChains][kHalves][4] = {};
  if constexpr (kHalves == 1) {
    const T* row = x + (lane & 7) * stride + (lane >> 3) * 8;
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      uint32_t b[4];
      if (k + 1 < kSteps) {
        ptx::ldmatrix(b, row + 16 * k);
      } else {
        uint32_t last[2];
        ptx::ldmatrix(last, x + (lane & 7) * stride + (lane >> 3 & 1) * 8 + 16 * k);
        b[0] = last[0];
        b[1] = last[1];
      }
#pragma unroll
      for (int i = 0; i < 2 && k + i < kSteps; ++i) {
        uint32_t a[4];
        ptx::ldmatrix(a, a_row + 16 * (k + i));
        mma<T>(part[(k + i) % kChains][0], a, {b[2 * i], b[2 * i + 1]});
      }
    }
  } else {
    const T* row = x + ((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      ptx::ldmatrix(a, a_row + 16 * k);
#pragma unroll
      for (int n = 0; n < kHalves; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix(b, row + n * 8 * stride + 16 * k);
        mma<T>(part[k % kChains][n], a, {b[0], b[1]});
        mma<T>(part[k % kChains][n + 1], a, {b[2], b[3]});
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kHalves; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = part[0][n][i];
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) scores[n][i] += part[chain][n][i];
    }
  }
}

// sums[heads, channels] += weights[heads, tokens] x of a warp's slice.
template <class T, class F, int kTiles>
VICO_DEVICE void add_slice(float (&sums)[kTiles][4], const T* weights, const T* x, int stride, int lane) {
  static_assert(kTiles % 2 == 0, "a matrix load has two tiles or four");
  const T* row_weights = weights + (lane & 15) * F::kScoreStride;
  if constexpr (F::kTokens == 8) {
    uint32_t a[2];
    ptx::ldmatrix(a, row_weights);
    const T* row = x + (lane & 7) * stride;
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t b[4] = {};
      if (j + 2 < kTiles) {
        ptx::ldmatrix_transposed(b, row + (lane >> 3) * 8 + j * 8);
      } else {
        uint32_t last[2];
        ptx::ldmatrix_transposed(last, row + (lane >> 3 & 1) * 8 + j * 8);
        b[0] = last[0];
        b[1] = last[1];
      }
#pragma unroll
      for (int i = 0; i < 4 && j + i < kTiles; ++i) mma<T>(sums[j + i], {a[0], a[1], 0u, 0u}, {b[i], 0u});
    }
  } else {
#pragma unroll
    for (int token = 0; token < F::kTokens; token += 16) {
      uint32_t a[4];
      ptx::ldmatrix(a, row_weights + (lane >> 4) * 8 + token);
      const T* row = x + (token + (lane & 15)) * stride + (lane >> 4) * 8;
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_transposed(b, row + j * 8);
        mma<T>(sums[j], a, {b[0], b[1]});
        mma<T>(sums[j + 1], a, {b[2], b[3]});
      }
    }
  }
}

// means[heads, channels] = factors sums, of a warp's slice, to `to`, the first of its channels, of which it has `own`.
// They go through shared memory, so that rows are written 16 bytes next to 16 bytes.
template <class T, int kTiles>
VICO_DEVICE void store_slice(T* to, int padded, int own, const float (&sums)[kTiles][4], const float (&factors)[2],
                             T* shared, int stride, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = sums[j][2 * r] * factors[r], high = sums[j][2 * r + 1] * factors[r];
      *reinterpret_cast<uint32_t*>(shared + (g + 8 * r) * stride + j * 8 + t * 2) =
          std::is_same_v<T, Half> ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
    }
  }
  __syncwarp();
  constexpr int kAbreast = kTiles < 32 ? kTiles : 32, kRowsAbreast = 32 / kAbreast;  // lanes in a row, rows
  static_assert(kPoolHeads % kRowsAbreast == 0, "no row is cut");
  const int row = lane / kAbreast, c = lane % kAbreast * 8;
#pragma unroll 4
  for (int i = row; i < kPoolHeads; i += kRowsAbreast) {
#pragma unroll
    for (int j = 0; j < kTiles; j += kAbreast) {
      if (j * 8 + c < own) ptx::store16(to + i * padded + j * 8 + c, ptx::load16(shared + i * stride + j * 8 + c));
    }
  }
}

}  // namespace vico
