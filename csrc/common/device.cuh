// The CUDA language as kernels see it: nvcc's, or that of csrc/cuda_on_host when they are built to run on the CPU.
//
//   VICO_SHARED(type, name, [dims]...)   a static variable in shared memory, aligned as its type is and no better
//   VICO_DYNAMIC_SHARED(type, name)      a pointer to the launch's dynamic shared memory, 1024-byte aligned
//   VICO_DEVICE_CHECK(condition, ...)    a printf message: what the host cannot check without waiting ends the kernel
//
//   vico::launch(kernel, grid, block, shared_bytes, stream, args...)
//   vico::launch_early(early, kernel, ...)  if `early`, the kernel may begin before the one before it has ended
#pragma once

#ifdef __CUDACC__

#include <cuda.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#define VICO_DEVICE __device__ __forceinline__
#define VICO_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define VICO_DYNAMIC_SHARED(type, name)                                        \
  extern __shared__ __align__(1024) unsigned char vico_dynamic_shared_bytes[]; \
  type* name = reinterpret_cast<type*>(vico_dynamic_shared_bytes)
#ifdef NDEBUG  // <cassert> leaves it out then
extern "C" __host__ __device__ [[noreturn]] void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                               const char* function) noexcept;
#endif
// Like the index checks of torch's own kernels: the text goes to the process's output, the next call that waits for the
// device reports "device-side assert triggered", and the process can use the device no more.
#define VICO_DEVICE_CHECK(condition, ...)                                             \
  do {                                                                                \
    if (!(condition)) {                                                               \
      printf("vico_ext: " __VA_ARGS__);                                               \
      printf("\n");                                                                   \
      __assert_fail(#condition, __FILE__, static_cast<unsigned>(__LINE__), __func__); \
    }                                                                                 \
  } while (0)

namespace vico {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  return device;
}

// Asked for once per kernel, device and thread: the call costs as much as half a launch.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;  // what every device gives without being asked
  thread_local std::map<std::pair<const void*, int>, size_t> allowed;
  size_t& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "dynamic shared memory of a kernel");
  most = bytes;
}

// Whether kernels of the current device may begin before the ones before them have ended.
inline bool can_overlap() {
  thread_local std::map<int, bool> known;
  const auto [at, is_new] = known.try_emplace(current_device(), false);
  if (is_new) {
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, at->first), "compute capability");
    at->second = major >= 9;
  }
  return at->second;
}

template <class... Params, class... Args>
void launch_as(bool early, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
               const Args&... args) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute overlap = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  if (early) {
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "launch of a kernel");
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Args&... args) {
  launch_as(false, kernel, grid, block, shared_bytes, stream, args...);
}

// For kernels of which every thread calls ptx::wait_for_earlier_kernels(), before it reads or writes what kernels
// before it on the stream may have written or read: if `early`, they may still be running until then. What a kernel
// reads sooner (weights) must be older than the chain of early kernels it belongs to: only then pass true for it, and
// false for the first of the chain. Devices before sm_90 cannot overlap.
template <class... Params, class... Args>
void launch_early(bool early, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  cudaStream_t stream, const Args&... args) {
  launch_as(early && can_overlap(), kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace vico

#else
#include "cuda_on_host/shim.h"

#define VICO_DEVICE_CHECK(condition, ...)       \
  do {                                          \
    if (!(condition)) ::coh::fail(__VA_ARGS__); \
  } while (0)
#endif
