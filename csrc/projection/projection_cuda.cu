// Which projection kernel runs.
#include "common/device_facts.cuh"
#include "projection/projection_sm80_cuda.cuh"
#include "projection/projection_sm90_cuda.cuh"

namespace vico {

void projection_cuda(const ProjectionParams& p, cudaStream_t stream) {
  const int device = current_device();
  // wgmma is of compute capability 9.0 alone: newer devices have no sm_90a.
  if (compute_capability(device) == 90 && fits_sm90(p)) {
    launch_projection_sm90(p, multiprocessor_count(device), stream);
  } else {
    launch_projection_sm80(p, stream);
  }
}

}  // namespace vico
