// Shared memory: static variables with red zones, dynamic memory, 32-bit addresses in the shared window.
#include "cuda_on_host/machine.h"

namespace coh {
namespace {

struct StaticShared {
  const void* key;
  void* memory;
  size_t bytes;
};
std::vector<StaticShared> statics;

// Shared-window addresses: dynamic memory begins at kDynamicBase; statics go through a table of 4 KiB pages.
constexpr uint32_t kDynamicBase = 1024, kPaged = 0x80000000u;
std::vector<uintptr_t> pages;
std::unordered_map<uintptr_t, uint32_t> page_index;

}  // namespace

void* dynamic_shared() {
  if (!machine.dynamic) fail("the kernel uses dynamic shared memory, but was launched without");
  return machine.dynamic;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  size_t total = bytes;
  for (const StaticShared& s : statics) {
    if (s.key == key) return s.memory;
    total += s.bytes;
  }
  if (total > 48 * 1024) fail("%zu bytes of static shared memory, more than 48 KiB", total);
  void* p = nullptr;
  if (posix_memalign(&p, alignment < 16 ? 16 : alignment, bytes)) fail("out of memory");
  std::memset(p, 0xff, bytes);
  statics.push_back({key, p, bytes});
  if (race) race->add_shared(p, bytes);
  return p;
}

void reset_static_shared() {
  for (const StaticShared& s : statics) std::free(s.memory);
  statics.clear();
}

uint32_t shared_address(const void* p) {
  const auto a = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(machine.dynamic);
  if (begin && a >= begin && a <= begin + machine.dynamic_bytes) return static_cast<uint32_t>(a - begin) + kDynamicBase;
  auto it = page_index.find(a >> 12);
  if (it == page_index.end()) {
    it = page_index.emplace(a >> 12, static_cast<uint32_t>(pages.size())).first;
    pages.push_back(a >> 12);
  }
  return kPaged | it->second << 12 | static_cast<uint32_t>(a & 4095);
}

void* shared_pointer(uint32_t address) {
  if (!(address & kPaged)) return machine.dynamic + (address - kDynamicBase);
  const uint32_t page = (address & ~kPaged) >> 12;
  if (page >= pages.size()) fail("shared address 0x%x points nowhere", address);
  return reinterpret_cast<void*>(pages[page] << 12 | (address & 4095));
}

void* shared_range(uint32_t address, size_t bytes, const char* what) {
  if (address & kPaged) {
    auto* p = static_cast<char*>(shared_pointer(address));
    for (const StaticShared& s : statics) {
      auto* begin = static_cast<char*>(s.memory);
      if (p >= begin && p + bytes <= begin + s.bytes) return p;
    }
    fail("%s: shared address 0x%x and the %zu bytes from there lie in no shared variable", what, address, bytes);
  }
  if (address < kDynamicBase || address - kDynamicBase + bytes > machine.dynamic_bytes) {
    fail("%s: bytes %ld to %ld are outside dynamic shared memory (%zu bytes)", what, long{address} - kDynamicBase,
         long{address} - kDynamicBase + static_cast<long>(bytes), machine.dynamic_bytes);
  }
  return shared_pointer(address);
}

void check_vector(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes)) {
    fail("%s: %p is not aligned to %d bytes", what, p, bytes);
  }
  maybe_yield();
}

}  // namespace coh
