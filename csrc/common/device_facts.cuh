// What launchers ask about the current device.
#pragma once

#include "common/device.cuh"

namespace vico {

struct DeviceFacts {
  int capability;  // 90 is compute capability 9.0
  int multiprocessors;
};

inline DeviceFacts current_device() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return {10 * major + minor, multiprocessors};
#else
  return {90, 3};  // so few that persistent blocks have work for several rounds
#endif
}

}  // namespace vico
