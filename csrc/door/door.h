// What an op's door needs to serve the CPU and CUDA alike. Sees torch.
//
// A door checks its arguments and allocates the same way for both, then runs one of the two kernels:
//
//   check_kernels(tokens, kOp);                           // the first tensor: is there a kernel for its device?
//   check_device(weight, tokens, "weight", "tokens", kOp);  // every other one is where the first is
//   ...
//   if (on_cuda(tokens)) {
//     VICO_CUDA_CALL(pixel_shuffle, p, tokens);
//   } else {
//     parallel_rows(rows, channels, [&](int64_t b, int64_t e) { VICO_CPU_CALL(pixel_shuffle, p, b, e); });
//   }
//
// Where on_cuda, the host reads no tensor's values: that would wait for the device, and break CUDA graphs. Values that
// could lead out of bounds are checked by the kernel, with VICO_DEVICE_CHECK (common/device.cuh).
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"
#include "door/tensor.h"

namespace vico {

// Whether the CUDA kernels take this tensor.
inline bool on_cuda(const Tensor& t) {
#ifdef VICO_CUDA_ON_HOST  // the test build: CPU tensors go to the CUDA kernels, which csrc/cuda_on_host runs
  static_cast<void>(t);
  return true;
#else
  return t.is_cuda();
#endif
}

// Fails where this build, or this GPU, has no kernels for tensors like `t`.
void check_kernels(const Tensor& t, const char* op);

namespace detail {

using CudaKernel = void (*)(const void* context, cudaStream_t stream);
// Calls kernel(context, torch's current stream of the device of `like`), with that device current meanwhile.
void run_on_device_of(const Tensor& like, const char* op, CudaKernel kernel, const void* context);

template <class Run>
void run_on_device_of(const Tensor& like, const char* op, const Run& run) {
  run_on_device_of(
      like, op, [](const void* context, cudaStream_t stream) { (*static_cast<const Run*>(context))(stream); }, &run);
}

}  // namespace detail
}  // namespace vico

// VICO_CUDA_CALL(name, params, like): runs vico::name_cuda(params, stream) on the device of tensor `like` and torch's
// current stream there. For op doors only.
#if defined(VICO_WITH_CUDA) || defined(VICO_CUDA_ON_HOST)
#define VICO_CUDA_CALL(name, params, like)      \
  ::vico::detail::run_on_device_of(like, #name, \
                                   [&](cudaStream_t vico_stream) { ::vico::name##_cuda(params, vico_stream); })
#else
#define VICO_CUDA_CALL(name, params, like) ::vico::check_kernels(like, #name)
#endif

// VICO_DOORS(m) { m.impl("op", TORCH_BOX(&vico::op_op)); ... }: registers the doors of a room for both devices.
#define VICO_DOORS(m)                                                              \
  static void register_vico_doors(torch::stable::detail::StableLibrary& m);        \
  STABLE_TORCH_LIBRARY_IMPL(vico, CPU, library) { register_vico_doors(library); }  \
  STABLE_TORCH_LIBRARY_IMPL(vico, CUDA, library) { register_vico_doors(library); } \
  static void register_vico_doors(torch::stable::detail::StableLibrary& m)
