// The graphs of replay.h: of the whole process, for every device.
#include "common/device.cuh"
#include "common/replay_policy.h"

#ifdef __CUDACC__
#include <exception>
#include <mutex>
#endif

namespace vico {

#ifdef __CUDACC__
namespace {

// An error that is dealt with, so that the next caller does not find it.
void forget_error() { static_cast<void>(cudaGetLastError()); }

// While it lives, this thread's calls do not end captures of other threads.
class Unwatched {
 public:
  Unwatched() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "the capture mode of a thread"); }
  ~Unwatched() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A stream of its own to capture on.
class Capture {
 public:
  Capture() = default;
  ~Capture() {
    if (graph_) cudaGraphDestroy(graph_);
    if (stream_) cudaStreamDestroy(stream_);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  // Null where the launches cannot be captured, by this driver for instance: then they are made one by one.
  cudaGraphExec_t run(const std::function<void(cudaStream_t)>& launches) {
    cudaGraphExec_t executable = nullptr;
    if (!record(launches) || cudaGraphInstantiate(&executable, graph_, 0) != cudaSuccess) {
      forget_error();
      return nullptr;
    }
    return executable;
  }

 private:
  bool record(const std::function<void(cudaStream_t)>& launches) {
    if (cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) != cudaSuccess) return false;
    if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed) != cudaSuccess) return false;
    bool launched = true;
    try {
      launches(stream_);
    } catch (const std::exception&) {
      launched = false;
    }
    return cudaStreamEndCapture(stream_, &graph_) == cudaSuccess && launched && graph_ != nullptr;
  }

  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
};

// Of the process; a graph is not launched by two threads at once. Never destroyed: at the end of the process the driver
// may be gone before static objects are.
struct Replays {
  std::mutex mutex;
  ReplayPolicy<cudaGraphExec_t> policy;
};
Replays& replays() {
  static auto* const all = new Replays;
  return *all;
}

bool replay(const LaunchKey& key, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches) {
  const std::lock_guard<std::mutex> guard(replays().mutex);
  return replays().policy.replay(
      key, current_device(),
      [&] {
        const Unwatched unwatched;
        return Capture().run(launches);
      },
      [&](cudaGraphExec_t graph) {
        if (cudaGraphLaunch(graph, stream) == cudaSuccess) return true;
        forget_error();  // no memory for it, perhaps; what is really wrong the launches one by one will tell
        return false;
      },
      [](cudaGraphExec_t graph) {
        const Unwatched unwatched;
        if (cudaGraphExecDestroy(graph) != cudaSuccess) forget_error();  // one that is running is freed when it ends
      });
}

}  // namespace

void replayed(const LaunchKey& key, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "whether a stream is being captured");
  if (status != cudaStreamCaptureStatusNone || !replay(key, stream, launches)) launches(stream);
}

#else

void replayed(const LaunchKey&, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches) {
  launches(stream);
}

#endif

}  // namespace vico
