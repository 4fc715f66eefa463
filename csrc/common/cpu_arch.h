// Which build of a CPU kernel runs: each <op>_cpu.cpp is compiled once per instruction set, in a namespace of its own,
// and the op door picks one at run time.
#pragma once

namespace vico {

enum class CpuArch { kBaseline, kAvx2, kAvx512 };

// The best instruction set that is both compiled in and supported by this machine; constant for the process.
CpuArch cpu_arch();
const char* to_string(CpuArch arch);

}  // namespace vico

// Declares kernel `name(args)` in every instruction set's namespace. Use at namespace vico scope in <op>.h.
#define VICO_CPU_KERNEL(name, ...) \
  namespace baseline {             \
  void name(__VA_ARGS__);          \
  }                                \
  namespace avx2 {                 \
  void name(__VA_ARGS__);          \
  }                                \
  namespace avx512 {               \
  void name(__VA_ARGS__);          \
  }

// VICO_CPU_CALL(name, args...): runs the kernel of the instruction set in use. For op doors only.
#ifdef VICO_HAVE_AVX
#define VICO_CPU_CALL(name, ...)                                                      \
  (::vico::cpu_arch() == ::vico::CpuArch::kAvx512 ? ::vico::avx512::name(__VA_ARGS__) \
   : ::vico::cpu_arch() == ::vico::CpuArch::kAvx2 ? ::vico::avx2::name(__VA_ARGS__)   \
                                                  : ::vico::baseline::name(__VA_ARGS__))
#else
#define VICO_CPU_CALL(name, ...) (::vico::baseline::name(__VA_ARGS__))
#endif
