// The doors' way to CUDA. Nothing here, or anywhere in the extension, links to libtorch_cuda or to the driver: one
// binary imports on every torch, and libtorch_cuda is asked for its stream only once there is a CUDA tensor.
#include "door/door.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <mutex>

namespace vico {
namespace {

#ifdef VICO_WITH_CUDA

constexpr int kOldestCapability = 80;

// The compute capability of a device: asked for once.
int known_capability(int device) {
  static std::array<std::atomic<int>, 64> known{};
  if (device < 0 || device >= static_cast<int>(known.size())) return compute_capability(device);
  int capability = known[device].load(std::memory_order_relaxed);
  if (capability == 0) {
    capability = compute_capability(device);
    known[device].store(capability, std::memory_order_relaxed);
  }
  return capability;
}

cudaStream_t current_stream(int device, const char* op) {
  using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
  static const auto ask = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")
                                                      : nullptr);
  }();
  VICO_CHECK(ask != nullptr, op, "this torch has CUDA tensors, but its libtorch_cuda.so has no ",
             "aoti_torch_get_current_cuda_stream: is it a build of torch >= 2.11 for CUDA?");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace

void check_kernels(const Tensor& t, const char* op) {
  if (t.is_cpu()) return;
  VICO_CHECK(t.is_cuda(), op, "there are kernels for the CPU and for CUDA, got a tensor on ", device_string(t));
#ifdef VICO_WITH_CUDA
  const int device = t.get_device_index(), capability = known_capability(device);
  VICO_CHECK(capability >= kOldestCapability, op,
             "the CUDA kernels need compute capability 8.0 (Ampere) or newer, but ", device_string(t), " has ",
             capability / 10, ".", capability % 10, ": use a newer GPU, or move the tensors to the CPU");
#elif defined(VICO_CUDA_ON_HOST)
  detail::fail(op, "this is the test build that runs its CUDA kernels on CPU tensors, got a tensor on ",
               device_string(t));
#else
  detail::fail(op, "vico_ext was built without CUDA kernels, got a tensor on ", device_string(t),
               ": install it again with nvcc (CUDA 12.5 or newer) on the PATH or CUDA_HOME set, "
               "`pip install --force-reinstall --no-deps .`, or move the tensors to the CPU");
#endif
}

#if defined(VICO_WITH_CUDA) || defined(VICO_CUDA_ON_HOST)
void detail::run_on_device_of(const Tensor& like, const char* op, CudaKernel kernel, const void* context) {
#ifdef VICO_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like.get_device_index(), op);
#else
  // The emulated device is one for the process, and torch may call from several threads.
  static std::mutex device;
  const std::lock_guard<std::mutex> guard(device);
  static_cast<void>(like);
  const cudaStream_t stream = nullptr;
#endif
  try {
    kernel(context, stream);
  } catch (const std::exception& e) {
    fail(op, e.what());
  }
}
#endif

}  // namespace vico
