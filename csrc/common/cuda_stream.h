// What contracts and doors need of CUDA, without a CUDA header.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as in CUDA's own headers

namespace vico {

// Major and minor version of a device in one number: 90 is compute capability 9.0.
int compute_capability(int device);

}  // namespace vico
