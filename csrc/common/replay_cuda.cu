// The graphs of replay.h: of the whole process, for every device.
#include "common/device.cuh"
#include "common/replay.h"

#ifdef __CUDACC__
#include <algorithm>
#include <mutex>
#endif

namespace vico {

#ifdef __CUDACC__
namespace {

struct Sequence {
  LaunchKey key;
  int device = 0;
  int times = 0;                    // it was launched one by one
  uint64_t last_use = 0;            // in calls
  cudaGraphExec_t graph = nullptr;  // once it is captured
};

constexpr int kTimesBeforeCapture = 2;

struct Sequences {
  std::mutex mutex;
  std::vector<Sequence> all;
  uint64_t calls = 0;
};

// Never destroyed: at the end of the process the driver may be gone before static objects are.
Sequences& sequences() {
  static auto* const all = new Sequences;
  return *all;
}

Sequence& find(Sequences& s, const LaunchKey& key, int device) {
  ++s.calls;
  auto at =
      std::find_if(s.all.begin(), s.all.end(), [&](const Sequence& q) { return q.device == device && q.key == key; });
  if (at == s.all.end() && s.all.size() < kMostGraphs) at = s.all.insert(at, Sequence{key, device});
  if (at == s.all.end()) {
    at = std::min_element(s.all.begin(), s.all.end(),
                          [](const Sequence& a, const Sequence& b) { return a.last_use < b.last_use; });
    // One that is running is freed when it ends.
    if (at->graph) check_cuda(cudaGraphExecDestroy(at->graph), "release of a graph");
    *at = Sequence{key, device};
  }
  at->last_use = s.calls;
  return *at;
}

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
  Capture() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream for a capture"); }
  ~Capture() {
    if (graph_) cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  // Null where the launches cannot be captured.
  cudaGraphExec_t run(const std::function<void(cudaStream_t)>& launches) {
    cudaGraphExec_t executable = nullptr;
    bool ok = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed) == cudaSuccess;
    if (ok) {
      try {
        launches(stream_);
      } catch (...) {
        cudaStreamEndCapture(stream_, &graph_);
        throw;
      }
      ok = cudaStreamEndCapture(stream_, &graph_) == cudaSuccess && graph_ != nullptr &&
           cudaGraphInstantiate(&executable, graph_, 0) == cudaSuccess;
    }
    if (!ok) static_cast<void>(cudaGetLastError());  // not for the next caller to find
    return ok ? executable : nullptr;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
};

}  // namespace

void replayed(const LaunchKey& key, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "whether a stream is being captured");
  if (status != cudaStreamCaptureStatusNone) return launches(stream);
  Sequences& s = sequences();
  const std::lock_guard<std::mutex> guard(s.mutex);  // a graph is not launched by two threads at once
  Sequence& sequence = find(s, key, current_device());
  if (!sequence.graph && sequence.times++ == kTimesBeforeCapture) {
    const Unwatched unwatched;
    sequence.graph = Capture().run(launches);
  }
  if (!sequence.graph) return launches(stream);
  check_cuda(cudaGraphLaunch(sequence.graph, stream), "launch of a graph");
}

#else

void replayed(const LaunchKey&, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches) {
  launches(stream);
}

#endif

}  // namespace vico
