// Thin PTX wrappers for sm_90a: mbarriers, the async proxy, TMA, stmatrix, register budgets. wgmma is in
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
VICO_DEVICE void mbarrier_invalidate(uint64_t* b) {
#ifdef __CUDACC__
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#else
  coh::mbarrier_invalidate(b);
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
  coh::mbarrier_arrive(b, 0, true);
#endif
}
// Arrives, and makes the phase wait for `bytes` more.
VICO_DEVICE void mbarrier_arrive_expect(uint64_t* b, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#else
  coh::mbarrier_arrive(b, bytes, true);
#endif
}
VICO_DEVICE void mbarrier_expect(uint64_t* b, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#else
  coh::mbarrier_arrive(b, bytes, false);
#endif
}
VICO_DEVICE bool mbarrier_test(uint64_t* b, uint32_t parity) {
#ifdef __CUDACC__
  uint32_t passed;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed)
               : "r"(shared_address(b)), "r"(parity)
               : "memory");
  return passed != 0;
#else
  return coh::mbarrier_test(b, parity);
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

// ---- TMA: boxes of a tensor map between global and shared memory; at[0] is the innermost coordinate. Loads fill what
// lies outside the tensor with zeros, stores leave it out.

VICO_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  static_cast<void>(map);
#endif
}
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
template <int kRank>
VICO_DEVICE void tma_store(const CUtensorMap* map, const int (&at)[kRank], const void* from) {
#ifdef __CUDACC__
  static_assert(kRank >= 1 && kRank <= 5, "TMA copies have ranks 1 to 5");
  if constexpr (kRank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%2}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(at[0])
                 : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(at[0]), "r"(at[1])
                 : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
        "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
#else
  coh::tensor_store(map, from, at, kRank);
#endif
}
VICO_DEVICE void bulk_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  coh::bulk_commit();
#endif
}
// Until all but the latest kKeep groups of this thread's stores have read their shared memory.
template <int kKeep>
VICO_DEVICE void bulk_wait_read() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kKeep) : "memory");
#else
  coh::bulk_wait(kKeep);
#endif
}
// Until all but the latest kKeep groups of this thread's stores are complete.
template <int kKeep>
VICO_DEVICE void bulk_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kKeep) : "memory");
#else
  coh::bulk_wait(kKeep);
#endif
}

// ---- stmatrix, the inverse of ldmatrix

template <int kCount>
VICO_DEVICE void stmatrix(const uint32_t (&r)[kCount], void* row) {
#ifdef __CUDACC__
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "stmatrix stores 1, 2 or 4 matrices");
  const uint32_t a = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(a), "r"(r[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(a), "r"(r[0]), "r"(r[1]) : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  coh::store_matrix(r, kCount, false, row);
#endif
}
template <int kCount>
VICO_DEVICE void stmatrix_transposed(const uint32_t (&r)[kCount], void* row) {
#ifdef __CUDACC__
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "stmatrix stores 1, 2 or 4 matrices");
  const uint32_t a = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(a), "r"(r[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(a), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  coh::store_matrix(r, kCount, true, row);
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
