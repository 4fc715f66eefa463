#include "common/cpu_arch.h"

namespace vico {
namespace {

CpuArch best_arch() {
#ifdef VICO_HAVE_AVX
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? CpuArch::kAvx512 : CpuArch::kAvx2;
#endif
  return CpuArch::kBaseline;
}

}  // namespace

CpuArch cpu_arch() {
  static const CpuArch arch = best_arch();
  return arch;
}

const char* to_string(CpuArch arch) {
  return arch == CpuArch::kAvx512 ? "avx512" : arch == CpuArch::kAvx2 ? "avx2" : "baseline";
}

}  // namespace vico
