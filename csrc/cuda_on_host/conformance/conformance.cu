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

void dump_sm80(Dump& dump) {
  Random random(80);
  conformance::dump_vector_accesses(dump, random);
  conformance::dump_conversions(dump, random);
  conformance::dump_cp_async<16, true>(dump, random);
  conformance::dump_cp_async<4, false>(dump, random);
  conformance::dump_cp_async<8, false>(dump, random);
  conformance::dump_cp_async<16, false>(dump, random);
  conformance::dump_ldmatrix<1, false>(dump, random);
  conformance::dump_ldmatrix<2, false>(dump, random);
  conformance::dump_ldmatrix<4, false>(dump, random);
  conformance::dump_ldmatrix<1, true>(dump, random);
  conformance::dump_ldmatrix<2, true>(dump, random);
  conformance::dump_ldmatrix<4, true>(dump, random);
  conformance::dump_mma<false>(dump, random, "whole", 8);
  conformance::dump_mma<true>(dump, random, "whole", 8);
  conformance::dump_mma<false>(dump, random, "fractions", 0);
  conformance::dump_mma<true>(dump, random, "fractions", 0);
  conformance::dump_barriers(dump, random);
  conformance::dump_shuffles(dump, random);
  conformance::dump_atomics(dump, random);
  conformance::dump_arithmetic(dump, random);
  conformance::dump_exp2(dump);
}

#ifndef VICO_CONFORMANCE_SM80
template <int kRank>
void dump_tma_swizzles(Dump& dump, Random& random) {
  using vico::ptx::Swizzle;
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    conformance::dump_tma<kRank>(dump, random, vico::MapElement::kBFloat16, swizzle);
  }
}

void dump_sm90(Dump& dump) {
  using vico::MapElement;
  using vico::ptx::Swizzle;
  Random random(90);
  conformance::dump_mbarrier(dump, random);
  conformance::dump_tma<1>(dump, random, MapElement::kBFloat16, Swizzle::kNone);
  dump_tma_swizzles<2>(dump, random);
  dump_tma_swizzles<3>(dump, random);
  dump_tma_swizzles<4>(dump, random);
  dump_tma_swizzles<5>(dump, random);
  conformance::dump_tma<2>(dump, random, MapElement::kFloat, Swizzle::k128);
  conformance::dump_tma<2>(dump, random, MapElement::kHalf, Swizzle::k64);
  conformance::dump_stmatrix<1, false>(dump, random);
  conformance::dump_stmatrix<2, false>(dump, random);
  conformance::dump_stmatrix<4, false>(dump, random);
  conformance::dump_stmatrix<1, true>(dump, random);
  conformance::dump_stmatrix<2, true>(dump, random);
  conformance::dump_stmatrix<4, true>(dump, random);
  conformance::dump_registers(dump, random);
  conformance::dump_every_wgmma(dump, random);
  conformance::dump_cluster(dump, random);
}
#endif

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: conformance FILE\n");
    return 2;
  }
#ifndef __CUDACC__
  coh::configure_from_environment();
#endif
  Dump dump;
  dump_sm80(dump);
#ifndef VICO_CONFORMANCE_SM80
  dump_sm90(dump);
#endif
  dump.write(argv[1], device_name());
#ifndef __CUDACC__
  if (coh::stats.races) throw std::runtime_error("races were found");
#endif
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
