// Fibers: stacks, and the switch between them as ASan wants to be told.
#include <sys/mman.h>

#include "cuda_on_host/machine.h"

#ifdef COH_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on this stack, its pointer in *save, and continues on the stack of `load`.
extern "C" void coh_switch_stack(void** save, void* load);
#if defined(__x86_64__)
constexpr int kSavedWords = 6;
asm(R"(
.text
.globl coh_switch_stack
.type coh_switch_stack,@function
coh_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size coh_switch_stack,.-coh_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");
#else
#error "cuda_on_host switches stacks on x86-64 only"
#endif

#ifdef COH_ASAN
// Frames of fibers that were abandoned never free what they own.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace coh {
namespace {

void* host_stack_pointer;
#ifdef COH_ASAN
void* host_asan_stack;
const void* host_stack_bottom;
size_t host_stack_bytes;
bool came_from_host;
#endif

}  // namespace

// In a fiber's first moments: ASan learns that the switch is over, and where the host's stack lies.
void note_fiber_started() {
#ifdef COH_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (came_from_host) {
    host_stack_bottom = bottom;
    host_stack_bytes = bytes;
  }
  came_from_host = false;
#endif
}

void prepare_fiber(Fiber& f, void (*entry)()) {
  constexpr size_t kGuard = 4096;
  while (machine.stacks.size() <= static_cast<size_t>(f.id)) {
    void* p =
        mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuard, PROT_NONE);
    machine.stacks.push_back(static_cast<char*>(p) + kGuard);
  }
  f.stack = machine.stacks[f.id];
#ifdef COH_ASAN
  // The frames at the bottom never return, those above did if the last block ended well.
  constexpr size_t kEntryBytes = 16 << 10;
  __asan_unpoison_memory_region(f.stack + kStackBytes - kEntryBytes, kEntryBytes);
#endif
  void** sp = reinterpret_cast<void**>(f.stack + kStackBytes);
  *--sp = nullptr;  // keeps the entry's stack aligned
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedWords; ++i) *--sp = nullptr;
  f.stack_pointer = sp;
}

void clean_stacks() {
#ifdef COH_ASAN
  for (char* stack : machine.stacks) __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

void enter_first(Fiber* f) {
  current = f;
#ifdef COH_ASAN
  came_from_host = true;
  __sanitizer_start_switch_fiber(&host_asan_stack, f->stack, kStackBytes);
#endif
  coh_switch_stack(&host_stack_pointer, f->stack_pointer);
#ifdef COH_ASAN
  __sanitizer_finish_switch_fiber(host_asan_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void switch_fiber(Fiber* from, Fiber* to) {
  current = to;
#ifdef COH_ASAN
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->asan_stack, to->stack, kStackBytes);
#endif
  coh_switch_stack(&from->stack_pointer, to->stack_pointer);
#ifdef COH_ASAN
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
#endif
}

void leave_last(Fiber* from) {
#ifdef COH_ASAN
  __sanitizer_start_switch_fiber(nullptr, host_stack_bottom, host_stack_bytes);
#endif
  coh_switch_stack(&from->stack_pointer, host_stack_pointer);
  __builtin_trap();
}

}  // namespace coh
