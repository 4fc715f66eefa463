// How much shared memory a block of the current device may ask for.
#pragma once

#include "common/device.cuh"

namespace vico {

#ifdef __CUDACC__
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "the shared memory of a device");
  return static_cast<size_t>(bytes);
}
#else
inline size_t host_shared_memory_limit = 227 * 1024;  // an H100's; tests set those of other devices
inline size_t shared_memory_limit() { return host_shared_memory_limit; }
#endif

}  // namespace vico
