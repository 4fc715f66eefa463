// Shared memory: static variables with red zones, dynamic memory, 32-bit addresses in the shared window.
#include "cuda_on_host/machine.h"

#ifdef COH_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace coh {
namespace {

struct StaticShared {
  const void* key;
  char *allocation, *memory;
  size_t bytes;
  uint32_t address;
};
std::vector<StaticShared> statics;

// Shared-window addresses: dynamic memory begins at kDynamicBase, the static variables follow with gaps, so that no
// address past the end of one is in the next. Alignment up to kWindowAlign is that of the pointers.
constexpr uint32_t kDynamicBase = 1024, kWindowAlign = 1024;

uint32_t window_address(const char* p, uint32_t after) {
  return (after / kWindowAlign + 2) * kWindowAlign +
         static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) % kWindowAlign);
}

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
  if (total + machine.dynamic_bytes > kMaxShared) {
    fail("%zu bytes of static and dynamic shared memory, more than 227 KiB", total + machine.dynamic_bytes);
  }
  // A variable is aligned as its type asks, and no better: 16-byte accesses to an array of floats must not pass here.
  const size_t in_front = alignment <= 8 ? 8 : 0;
  void* p = nullptr;
  if (posix_memalign(&p, alignment < 16 ? 16 : alignment, bytes + in_front)) fail("out of memory");
  StaticShared s{key, static_cast<char*>(p), static_cast<char*>(p) + in_front, bytes, 0};
#ifdef COH_ASAN
  __asan_poison_memory_region(s.allocation, in_front);
#endif
  std::memset(s.memory, 0xff, bytes);
  const uint32_t after = statics.empty() ? kDynamicBase + static_cast<uint32_t>(machine.dynamic_bytes)
                                         : statics.back().address + static_cast<uint32_t>(statics.back().bytes);
  s.address = window_address(s.memory, after);
  statics.push_back(s);
  if (race) race->add_shared(s.memory, bytes);
  return s.memory;
}

void reset_static_shared() {
  for (const StaticShared& s : statics) {
#ifdef COH_ASAN
    __asan_unpoison_memory_region(s.allocation, static_cast<size_t>(s.memory - s.allocation));
#endif
    std::free(s.allocation);
  }
  statics.clear();
}

uint32_t shared_address(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  if (machine.dynamic && p >= machine.dynamic && p <= machine.dynamic + machine.dynamic_bytes) {
    return static_cast<uint32_t>(p - machine.dynamic) + kDynamicBase;
  }
  for (const StaticShared& s : statics) {
    if (p >= s.memory && p <= s.memory + s.bytes) return static_cast<uint32_t>(p - s.memory) + s.address;
  }
  fail("%p is no address in shared memory", pointer);
}

void* shared_range(uint32_t address, size_t bytes, const char* what) {
  const auto holds = [&](uint32_t begin, size_t n) { return address >= begin && address - begin + bytes <= n; };
  if (holds(kDynamicBase, machine.dynamic_bytes)) return machine.dynamic + (address - kDynamicBase);
  for (const StaticShared& s : statics) {
    if (holds(s.address, s.bytes)) return s.memory + (address - s.address);
  }
  fail(
      "%s: the %zu bytes from shared address 0x%x are outside dynamic shared memory (%zu bytes from 0x%x) and every "
      "shared variable",
      what, bytes, address, machine.dynamic_bytes, kDynamicBase);
}

void check_vector(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes)) {
    fail("%s: %p is not aligned to %d bytes", what, p, bytes);
  }
  maybe_yield();
}

}  // namespace coh
