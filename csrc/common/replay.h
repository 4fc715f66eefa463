// Sequences of launches that come again with the same arguments, as CUDA graphs. Launching the router's 43 kernels one
// by one takes the host longer than they take the device; a graph of them is one launch.
//
//   replayed(LaunchKey(kRouterPool, p.tokens, p.shape.tiles, ...), stream, [&](cudaStream_t s) { the launches on s });
//
// The key holds all that the launches depend on: pointers, sizes, constants. Where the same key comes for the third
// time the launches are captured, and from then on replayed: a loop whose tensors torch's allocator places where it did
// before gets there. What is read through the pointers may change; a graph is a function of the key. Keys that do not
// come again cost a comparison, and the least recently used of kMostGraphs give way. The driver keeps memory for the
// graphs, 2 MB for the router's two; what they read and write is the caller's.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "common/cuda_stream.h"

namespace vico {

class LaunchKey {
 public:
  template <class... Fields>
  explicit LaunchKey(const Fields&... fields) {
    words_.reserve(64);
    add(fields...);
  }
  template <class... Fields>
  void add(const Fields&... fields) {
    (words_.push_back(word(fields)), ...);
  }
  bool operator==(const LaunchKey& other) const { return words_ == other.words_; }

 private:
  template <class Field>
  static uint64_t word(const Field& field) {
    static_assert(sizeof(Field) <= sizeof(uint64_t) && std::is_trivially_copyable_v<Field>, "a number or a pointer");
    uint64_t w = 0;
    std::memcpy(&w, &field, sizeof(field));
    return w;
  }
  std::vector<uint64_t> words_;
};

constexpr int kMostGraphs = 16;

// Launches directly where `stream` is being captured itself, and in builds that run kernels on the CPU.
void replayed(const LaunchKey& key, cudaStream_t stream, const std::function<void(cudaStream_t)>& launches);

}  // namespace vico
