// CUDA C++ for an ordinary host compiler: what kernels use of the language when they are built to run on the CPU.
// common/device.cuh includes this where there is no nvcc. No CUDA header is needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/cuda_stream.h"
#include "cuda_on_host/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

// The driver's tensor map: opaque there, a TensorMap (ptx_host.h) here.
struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

namespace coh {

struct Thread {
  uint3 index;
  uint3 block;
};
extern Thread* current;  // the CUDA thread that runs now, null on the host
extern dim3 grid_dim, block_dim;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// `kernel` is only noted: a test program tells which ones it has run. `early`: the kernel might overlap the one before
// it; here it does not, but every thread of it has to call wait_for_earlier_kernels.
void launch(const void* kernel, void (*body)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes,
            bool early);
void wait_for_earlier_kernels();
void* dynamic_shared();
// The block's variable of this key: each has an allocation of its own, so that ASan sees its ends.
void* static_shared(const void* key, size_t bytes, size_t alignment);

// ---- what threads of a warp do together: each brings a slot, the last to arrive runs `fn` over all of them
enum class Op : int { kShuffle, kBallot, kSyncwarp, kLoadMatrix, kMma, kWgmma, kWgmmaCommit, kWgmmaWait };
using WarpFunction = void (*)(void* const* slots, unsigned mask, int tag);
void warp_op(unsigned mask, Op op, int tag, void* slot, WarpFunction fn);
int lane_id();

enum class Vote { kNone, kCount, kOr, kAnd };
int block_barrier(int predicate, Vote vote);

// ---- for the race checker
void note_atomic(void* p, size_t bytes);
void note_fence();

}  // namespace coh

// One allocation per variable, block and instantiation: GCC gives statics of templates no red zones.
#define VICO_SHARED(type, name, ...)    \
  static char name##_key;               \
  using name##_type = type __VA_ARGS__; \
  name##_type& name =                   \
      *static_cast<name##_type*>(::coh::static_shared(&name##_key, sizeof(name##_type), alignof(name##_type)))
#define VICO_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::coh::dynamic_shared())
#define VICO_DEVICE inline

#define threadIdx (::coh::current->index)
#define blockIdx (::coh::current->block)
#define blockDim (::coh::block_dim)
#define gridDim (::coh::grid_dim)

namespace vico {

// Every thread gets its own copy of the arguments, as on the device.
template <class... Params, class... Args>
void launch_as(bool early, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, {static_cast<Params>(args)...}};
  coh::launch(
      reinterpret_cast<const void*>(kernel),
      [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        std::apply([&](const auto&... x) { c.kernel(x...); }, c.params);
      },
      &call, grid, block, shared_bytes, early);
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Args&... args) {
  launch_as(false, kernel, grid, block, shared_bytes, args...);
}
template <class... Params, class... Args>
void launch_early(bool early, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                  const Args&... args) {
  launch_as(early, kernel, grid, block, shared_bytes, args...);
}

}  // namespace vico

// ---- synchronisation
inline void __syncthreads() { coh::block_barrier(0, coh::Vote::kNone); }
inline int __syncthreads_or(int p) { return coh::block_barrier(p, coh::Vote::kOr); }
inline int __syncthreads_and(int p) { return coh::block_barrier(p, coh::Vote::kAnd); }
inline int __syncthreads_count(int p) { return coh::block_barrier(p, coh::Vote::kCount); }
inline void __syncwarp(unsigned mask = ~0u) { coh::warp_op(mask, coh::Op::kSyncwarp, 0, nullptr, nullptr); }
inline void __threadfence() { coh::note_fence(); }
inline void __trap() { coh::fail("__trap()"); }

// ---- shuffles and votes
namespace coh {

struct ShuffleSlot {
  unsigned char value[8], result[8];
  int source;  // lane
};
void shuffle_lanes(void* const* slots, unsigned mask, int bytes);

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move up to 8 bytes");
  ShuffleSlot slot;
  std::memcpy(slot.value, &value, sizeof(T));
  slot.source = source;
  warp_op(mask, Op::kShuffle, sizeof(T), &slot, shuffle_lanes);
  std::memcpy(&value, slot.result, sizeof(T));
  return value;
}

unsigned ballot(unsigned mask, int predicate);

}  // namespace coh

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return coh::shuffle(mask, value, (coh::lane_id() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = coh::lane_id(), source = lane ^ lane_mask;
  return coh::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = coh::lane_id(), source = lane + static_cast<int>(delta);
  return coh::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = coh::lane_id(), source = lane - static_cast<int>(delta);
  return coh::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return coh::ballot(mask, p); }
inline int __any_sync(unsigned mask, int p) { return coh::ballot(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return coh::ballot(mask, p) == mask; }

namespace coh {

// The device's integers wrap around.
template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

}  // namespace coh

// ---- atomics: threads only switch inside note_atomic and at other calls of the runtime, so what follows it is atomic.
// Not instrumented: the race checker has been told.
#define COH_ATOMIC(name, result)                                   \
  template <class T, class U>                                      \
  __attribute__((no_sanitize("thread"))) T name(T* p, U operand) { \
    coh::note_atomic(p, sizeof(T));                                \
    const T old = *p, value = static_cast<T>(operand);             \
    *p = static_cast<T>(result);                                   \
    return old;                                                    \
  }
COH_ATOMIC(atomicAdd, coh::wrapping_sum(old, value))
COH_ATOMIC(atomicMax, value > old ? value : old)
COH_ATOMIC(atomicMin, value < old ? value : old)
COH_ATOMIC(atomicExch, value)
COH_ATOMIC(atomicOr, old | value)
COH_ATOMIC(atomicAnd, old& value)
#undef COH_ATOMIC
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, T expected, T value) {
  coh::note_atomic(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// ---- arithmetic
using std::max;
using std::min;
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
