// What the doors ask about a device.
#include "common/cuda_stream.h"
#include "common/device.cuh"

namespace vico {

int compute_capability(int device) {
#ifdef __CUDACC__
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
#else
  static_cast<void>(device);
  return 90;  // of what csrc/cuda_on_host emulates
#endif
}

}  // namespace vico
