// What launchers ask about the current device.
#pragma once

#include "common/device.cuh"

namespace vico {

#ifndef __CUDACC__
inline int current_device() { return 0; }
#endif

inline int multiprocessor_count(int device) {
#ifdef __CUDACC__
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
#else
  static_cast<void>(device);
  return 3;  // so few that persistent blocks have work for several rounds
#endif
}

}  // namespace vico
