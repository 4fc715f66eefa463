// Thin PTX wrappers for sm_90a: mbarriers, the async proxy, TMA loads, register budgets. wgmma is in
// ptx_wgmma.cuh. Host bodies as in ptx.cuh.
#pragma once

#include "common/ptx.cuh"

namespace vico::ptx {

// ---- mbarrier: a phase ends when `count` arrivals and all expected bytes have come. Waiting names the parity of the
// phase to be over: 0 for the first; waiting for parity 1 passes at once on a fresh barrier.

VICO_DEVICE void mbarrier_init(uint64_t* b, int count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
#else
  coh::mbarrier_init(b, count);
#endif
}
// Makes initialised barriers visible to the async proxy; before the block's first TMA load.
VICO_DEVICE void fence_mbarrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  coh::fence_mbarrier_init();
#endif
}
VICO_DEVICE void mbarrier_arrive(uint64_t* b) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#else
  coh::mbarrier_arrive(b, 0);
#endif
}
// Arrives, and makes the phase wait for `bytes` more.
VICO_DEVICE void mbarrier_arrive_expect(uint64_t* b, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#else
  coh::mbarrier_arrive(b, bytes);
#endif
}
VICO_DEVICE void mbarrier_wait(uint64_t* b, uint32_t parity) {
#ifdef __CUDACC__
  uint32_t passed;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  } while (!passed);
#else
  coh::mbarrier_wait(b, parity);
#endif
}

// ---- the async proxy

// Between this thread's ordinary accesses to shared memory and those of TMA and wgmma that follow.
VICO_DEVICE void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  coh::fence_proxy_async();
#endif
}

// ---- TMA: boxes of a tensor map from global to shared memory; at[0] is the innermost coordinate. What lies outside
// the tensor is filled with zeros.

// One thread issues it; its bytes count on barrier `b`.
template <int kRank>
VICO_DEVICE void tma_load(void* to, const CUtensorMap* map, const int (&at)[kRank], uint64_t* b) {
#ifdef __CUDACC__
  static_assert(kRank >= 1 && kRank <= 5, "TMA copies have ranks 1 to 5");
  if constexpr (kRank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(at[0])
        : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
        "%7}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
#else
  coh::tensor_load(to, map, at, kRank, b);
#endif
}
// ---- registers of a warp group: producers give theirs up, consumers take them

template <int kCount>
VICO_DEVICE void take_more_registers() {
#ifdef __CUDACC__
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#else
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
#endif
}
template <int kCount>
VICO_DEVICE void take_fewer_registers() {
#ifdef __CUDACC__
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#else
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
#endif
}

}  // namespace vico::ptx
