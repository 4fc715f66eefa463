// A block of 256 threads takes a row: it is read once into registers, for the mean, for the squares around it and for
// the result. What does not fit is read again from the caches.
#include <stdexcept>

#include "common/block_reduce.cuh"
#include "common/layer_norm.h"
#include "common/pack.cuh"

namespace vico {
namespace {

constexpr unsigned kNormThreads = 256;
constexpr int kNormPacks = 2;  // per thread, in registers: rows of up to 4096 16-bit elements

// kN: elements per access.
template <class T, int kN>
__global__ void __launch_bounds__(kNormThreads) layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  using A = accumulate_t<T>;
  VICO_SHARED(A, scratch, [2][kMaxWarps]);
  ptx::let_next_kernel_begin();
  ptx::wait_for_earlier_kernels();
  const int64_t begin = int64_t{blockIdx.x} * p.channels;
  const auto load = [&](A(&values)[kN], int64_t c) {
    if constexpr (sizeof(T) == 2) {
      if (p.parts > 0) {
        const float* part = static_cast<const float*>(p.x) + begin + c;
        values_of(values, load_pack<T, kN>(static_cast<const T*>(p.part_bias) + c));
        for (int64_t i = 0; i < p.parts; ++i, part += p.rows * p.channels) {
          float more[kN];
          load_values(more, part);
#pragma unroll
          for (int j = 0; j < kN; ++j) values[j] += more[j];
        }
        return;
      }
    }
    values_of(values, load_pack<T, kN>(static_cast<const T*>(p.x) + begin + c));
  };
  const int64_t first = int64_t{threadIdx.x} * kN, step = int64_t{kNormThreads} * kN;

  A kept[kNormPacks][kN] = {};
#pragma unroll
  for (int i = 0; i < kNormPacks; ++i) {
    const int64_t c = first + i * step;
    if (c >= p.channels) break;
    load(kept[i], c);
  }
  // visit(c, values) for each of the thread's packs.
  const auto for_each_pack = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) {
      if (first + i * step < p.channels) visit(first + i * step, kept[i]);
    }
    for (int64_t c = first + kNormPacks * step; c < p.channels; c += step) {
      A values[kN];
      load(values, c);
      visit(c, values);
    }
  };

  A sum[1] = {};
  for_each_pack([&](int64_t, const A(&values)[kN]) {
#pragma unroll
    for (int j = 0; j < kN; ++j) sum[0] += values[j];
  });
  block_sum(sum, scratch[0]);
  const A mean = sum[0] / static_cast<A>(p.channels);
  A squares[1] = {};
  for_each_pack([&](int64_t, const A(&values)[kN]) {
#pragma unroll
    for (int j = 0; j < kN; ++j) squares[0] += (values[j] - mean) * (values[j] - mean);
  });
  block_sum(squares, scratch[1]);
  const A rstd = static_cast<A>(1) / sqrt(squares[0] / static_cast<A>(p.channels) + static_cast<A>(p.eps));

  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + begin : nullptr;
  T* y = static_cast<T*>(p.y) + begin;
  for_each_pack([&](int64_t c, const A(&values)[kN]) {
    const auto w = load_pack<T, kN>(weight + c), b = load_pack<T, kN>(bias + c);
    A out[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) out[j] = (values[j] - mean) * rstd * value_of(w.at[j]) + value_of(b.at[j]);
    if (residual) {
      const auto r = load_pack<T, kN>(residual + c);
#pragma unroll
      for (int j = 0; j < kN; ++j) out[j] += value_of(r.at[j]);
    }
    store_pack(y + c, pack_of<T, kN>(out));
  });
}

}  // namespace

void layer_norm_cuda(const LayerNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.channels == 0) return;
  if (p.rows > INT32_MAX) throw std::runtime_error("layer_norm takes up to 2^31 - 1 rows");
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool wide = p.channels % kPackWidth<T> == 0;
    for (const void* t : {p.x, p.part_bias, p.residual, p.weight, p.bias, static_cast<const void*>(p.y)}) {
      wide = wide && is_aligned16(t);
    }
    const auto kernel = wide ? layer_norm_kernel<T, kPackWidth<T>> : layer_norm_kernel<T, 1>;
    launch_early(p.chained, kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kNormThreads), 0, stream, p);
  });
}

}  // namespace vico
