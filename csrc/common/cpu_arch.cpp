#include "common/cpu_arch.h"

namespace vico {

CpuArch cpu_arch() {
#ifdef VICO_HAVE_AVX2
  static const CpuArch arch =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
          ? CpuArch::kAvx2
          : CpuArch::kBaseline;
  return arch;
#else
  return CpuArch::kBaseline;
#endif
}

const char* to_string(CpuArch arch) { return arch == CpuArch::kAvx2 ? "avx2" : "baseline"; }

}  // namespace vico
