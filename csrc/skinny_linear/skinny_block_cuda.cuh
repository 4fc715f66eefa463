// What the kernels of skinny_linear share: the part of the problem that is a block's, and how it stores results.
#pragma once

#include <stdexcept>
#include <string>

#include "common/normal.cuh"
#include "common/pack.cuh"
#include "skinny_linear/skinny_linear.h"

namespace vico {

// What block (blockIdx.x, blockIdx.y) works on: some features and rows, one part of the depth. Blocks that share
// features follow one another: their weights come from the L2 cache.
struct SkinnyBlock {
  int64_t group, feature, row;
  int64_t first, depth;  // of the part
  int features, rows;

  VICO_DEVICE SkinnyBlock(const SkinnyLinearParams& p, int most_features, int most_rows) {
    const int64_t row_blocks = (p.rows + most_rows - 1) / most_rows;
    const int64_t feature_blocks = (p.features + most_features - 1) / most_features;
    const int64_t block = blockIdx.x / row_blocks;
    row = blockIdx.x % row_blocks * most_rows;
    group = block / feature_blocks;
    feature = block % feature_blocks * most_features;
    features = static_cast<int>(p.features - feature < most_features ? p.features - feature : most_features);
    rows = static_cast<int>(p.rows - row < most_rows ? p.rows - row : most_rows);
    depth = p.depth / p.parts;
    first = blockIdx.y * depth;
  }
  template <class T>
  VICO_DEVICE const T* x(const SkinnyLinearParams& p) const {
    return static_cast<const T*>(p.x) + (row * p.groups + group) * p.depth + first;
  }
  template <class T>
  VICO_DEVICE const T* weight(const SkinnyLinearParams& p) const {
    return static_cast<const T*>(p.weight) + group * p.group_stride + feature * p.feature_stride +
           first * p.depth_stride;
  }
  template <class T>
  VICO_DEVICE T bias(const SkinnyLinearParams& p, int f) const {
    return p.bias && f < features ? static_cast<const T*>(p.bias)[group * p.features + feature + f] : T{};
  }
  template <class T>
  VICO_DEVICE void store(const SkinnyLinearParams& p, int r, int f, accumulate_t<T> sum) const {
    store<T>(p, r, f, sum, bias<T>(p, f));
  }
  template <class T>
  VICO_DEVICE void store(const SkinnyLinearParams& p, int r, int f, accumulate_t<T> sum, T bias) const {
    const int64_t at = group * p.features + feature + f;
    if (p.parts > 1) {
      static_cast<float*>(p.y)[(blockIdx.y * p.rows + row + r) * p.features + at] = static_cast<float>(sum);
      return;
    }
    accumulate_t<T> y[1] = {sum + value_of(bias)};
    y[0] *= static_cast<accumulate_t<T>>(p.scale);
    if (p.gelu) y[0] = gelu_of(y[0]);
    store_pack(static_cast<T*>(p.y) + (row + r) * p.groups * p.features + at, pack_of<T, 1>(y));
  }
  // Features f .. f + 7 of 16 bits, aligned.
  template <class T, bool kGelu>
  VICO_DEVICE void store8(const SkinnyLinearParams& p, int r, int f, float (&sum)[8]) const {
    const float scale = static_cast<float>(p.scale);
    const int64_t at = group * p.features + feature + f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (p.bias) sum[j] += value_of(static_cast<const T*>(p.bias)[at + j]);
      sum[j] *= scale;
    }
    if (kGelu && p.gelu) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = gelu_of(sum[j]);
    }
    store_pack(static_cast<T*>(p.y) + (row + r) * p.groups * p.features + at, pack_of<T, 8>(sum));
  }
};

inline unsigned skinny_blocks(const SkinnyLinearParams& p, int64_t most_features, int64_t most_rows) {
  const int64_t blocks =
      p.groups * ((p.features + most_features - 1) / most_features) * ((p.rows + most_rows - 1) / most_rows);
  if (blocks > INT32_MAX) {
    throw std::runtime_error("skinny_linear of " + std::to_string(p.rows) + " rows, " + std::to_string(p.groups) +
                             " groups and " + std::to_string(p.features) +
                             " features: its CUDA kernels take up to 2^31 - 1 blocks");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace vico
