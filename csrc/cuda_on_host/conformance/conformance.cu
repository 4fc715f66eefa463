// Writes down what every wrapper of the kernels does with given bits:  conformance FILE
//
// With nvcc, on a GPU, that is what its instructions do: the golden file. With g++, under cuda_on_host, it is what the
// host bodies do. python_tests/test_cuda_conformance.py holds both to what they should be, and one to the other.
#include "cuda_on_host/conformance/language.cuh"
#include "cuda_on_host/conformance/sm80.cuh"
#ifndef VICO_CONFORMANCE_SM80
#include "cuda_on_host/conformance/sm90.cuh"
#include "cuda_on_host/conformance/wgmma.cuh"
#endif

#include <cstring>
#ifdef __CUDACC__
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#endif

namespace {

using conformance::Dump;
using conformance::Random;

std::string device_name() {
#ifdef __CUDACC__
  cudaDeviceProp properties;
  vico::check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
#else
  return "cuda_on_host";
#endif
}

// A part of the file, with random numbers of its own: the same whichever other parts are written.
struct Section {
  const char* name;
  void (*write)(Dump&, Random&);
};

#ifndef VICO_CONFORMANCE_SM80
template <int kRank>
void dump_tma_swizzles(Dump& dump, Random& random) {
  using vico::ptx::Swizzle;
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    conformance::dump_tma<kRank>(dump, random, vico::MapElement::kBFloat16, swizzle);
  }
}
#endif

const Section kSections[] = {
    {"vector accesses", conformance::dump_vector_accesses},
    {"conversions", conformance::dump_conversions},
    {"cp.async",
     [](Dump& dump, Random& random) {
       conformance::dump_cp_async<16>(dump, random);
       conformance::dump_cp_async<8>(dump, random);
     }},
    {"ldmatrix",
     [](Dump& dump, Random& random) {
       conformance::dump_ldmatrix<1, false>(dump, random);
       conformance::dump_ldmatrix<2, false>(dump, random);
       conformance::dump_ldmatrix<4, false>(dump, random);
       conformance::dump_ldmatrix<1, true>(dump, random);
       conformance::dump_ldmatrix<2, true>(dump, random);
       conformance::dump_ldmatrix<4, true>(dump, random);
     }},
    {"mma",
     [](Dump& dump, Random& random) {
       conformance::dump_mma<false>(dump, random, "whole", 8);
       conformance::dump_mma<true>(dump, random, "whole", 8);
       conformance::dump_mma<false>(dump, random, "fractions", 0);
       conformance::dump_mma<true>(dump, random, "fractions", 0);
     }},
    {"barriers", conformance::dump_barriers},
    {"shuffles", conformance::dump_shuffles},
    {"atomics", conformance::dump_atomics},
    {"arithmetic", conformance::dump_arithmetic},
    {"exp2", [](Dump& dump, Random&) { conformance::dump_exp2(dump); }},
#ifndef VICO_CONFORMANCE_SM80
    {"mbarrier", conformance::dump_mbarrier},
    {"TMA 1d",
     [](Dump& dump, Random& random) {
       conformance::dump_tma<1>(dump, random, vico::MapElement::kBFloat16, vico::ptx::Swizzle::kNone);
     }},
    {"TMA 2d", dump_tma_swizzles<2>},
    {"TMA 3d", dump_tma_swizzles<3>},
    {"TMA 4d", dump_tma_swizzles<4>},
    {"TMA 5d", dump_tma_swizzles<5>},
    {"TMA types",
     [](Dump& dump, Random& random) {
       conformance::dump_tma<2>(dump, random, vico::MapElement::kFloat, vico::ptx::Swizzle::k128);
       conformance::dump_tma<2>(dump, random, vico::MapElement::kHalf, vico::ptx::Swizzle::k64);
     }},
    {"registers", conformance::dump_registers},
    {"overlap", conformance::dump_overlap},
    {"wgmma kk", conformance::dump_wgmma_swizzles<false, false, false>},
    {"wgmma kn", conformance::dump_wgmma_swizzles<false, false, true>},
    {"wgmma mk", conformance::dump_wgmma_swizzles<false, true, false>},
    {"wgmma mn", conformance::dump_wgmma_swizzles<false, true, true>},
    {"wgmma f16",
     [](Dump& dump, Random& random) {
       conformance::dump_wgmma_swizzles<true, false, false>(dump, random);
       conformance::dump_wgmma<64, true, true, true>(dump, random, vico::ptx::Swizzle::k128, 2);
     }},
    {"wgmma sizes", conformance::dump_wgmma_sizes<false>},
    {"wgmma sizes f16", conformance::dump_wgmma_sizes<true>},
#endif
};

void write(const Section& section, Dump& dump) {
  Random random(static_cast<uint64_t>(&section - kSections + 1));
  section.write(dump, random);
}

#ifdef __CUDACC__
constexpr unsigned kSeconds = 20;  // for a section: a barrier that nothing completes would wait for ever

// A kernel that fails ends its process's use of the GPU: each section has a process of its own, made before this one
// uses CUDA, and the others' results are written all the same. False: it failed, and has said how.
bool write_in_another_process(const Section& section, Dump& dump) {
  std::FILE* file = std::tmpfile();
  if (!file) throw std::runtime_error("no temporary file to be had");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("cannot start a process");
  if (child == 0) {
    alarm(kSeconds);
    int code = 0;
    try {
      Dump own;
      write(section, own);
      own.send(file);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "section '%s' failed: %s\n", section.name, e.what());
      code = 1;
    }
    std::fflush(nullptr);
    _exit(code);
  }
  int status = 0;
  waitpid(child, &status, 0);
  const bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (WIFSIGNALED(status)) {
    std::fprintf(stderr, "section '%s' failed: %s\n", section.name,
                 WTERMSIG(status) == SIGALRM ? "its kernel does not end" : strsignal(WTERMSIG(status)));
  }
  if (ok) {
    std::rewind(file);
    dump.receive(file);
  }
  std::fclose(file);
  return ok;
}
#endif

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: conformance FILE [SECTION...]\n");
    for (const Section& section : kSections) std::fprintf(stderr, "  '%s'\n", section.name);
    return 2;
  }
  const auto wanted = [&](const Section& section) {
    return argc == 2 ||
           std::any_of(argv + 2, argv + argc, [&](const char* a) { return !std::strcmp(a, section.name); });
  };
#ifndef __CUDACC__
  coh::configure_from_environment();
#endif
  Dump dump;
  int failed = 0, written = 0;
  for (const Section& section : kSections) {
    if (!wanted(section)) continue;
#ifdef __CUDACC__
    (write_in_another_process(section, dump) ? written : failed) += 1;
#else
    write(section, dump);
    ++written;
#endif
  }
  dump.write(argv[1], device_name());
  std::fprintf(stderr, "conformance: %d sections written, %d failed\n", written, failed);
  if (failed) return 1;
#ifndef __CUDACC__
  if (coh::stats.races) throw std::runtime_error("races were found");
#endif
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
