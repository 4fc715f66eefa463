// Every CUDA kernel in every type: what nvcc must be able to compile (sm_80 and sm_90a), without a GPU.
#include "normalized_shuffle/normalized_shuffle_backward_cuda.cuh"
#include "normalized_shuffle/normalized_shuffle_cuda.cuh"
#include "pixel_shuffle/pixel_shuffle_cuda.cuh"

void launch_all(cudaStream_t stream) {
  vico::pixel_shuffle_cuda({}, stream);
  vico::pixel_shuffle_backward_cuda({}, stream);
  vico::normalized_shuffle_cuda({}, stream);
  vico::normalized_shuffle_backward_cuda({}, {}, nullptr, stream);
  vico::combine_chunks_cuda({}, 0, stream);
}
