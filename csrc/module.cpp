// The Python module: importing it registers the ops; its attributes say what was built.
#include <pybind11/pybind11.h>

#include "common/cpu_arch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of vico_ext (torch.ops.vico) and how they were built.";
  // The architectures the CUDA kernels were compiled for, as CMake names them; "host" in the test build that runs them
  // on the CPU; "" without any.
  m.attr("cuda") = VICO_CUDA_BUILT;
  m.attr("compiler") = __VERSION__;
  m.attr("build_version") = VICO_EXT_VERSION;
  m.def("cpu_arch", [] { return vico::to_string(vico::cpu_arch()); }, "Instruction set of the CPU kernels in use.");
}
