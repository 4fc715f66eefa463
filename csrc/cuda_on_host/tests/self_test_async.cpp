// Bugs in asynchronous copies and tensor core pipelines, planted one by one: see self_test_memory.cpp.
#include "cuda_on_host/tests/harness.h"
#include "cuda_on_host/tests/pipelines.cuh"

namespace {

using coh::Buffer;
using coh::expect;
using coh_test::BFloat16;
using coh_test::Bug;

struct Product {
  int m, n, k;
  Buffer<BFloat16> a, b;
  Buffer<float> c;

  Product(int m_, int n_, int k_)
      : m(m_),
        n(n_),
        k(k_),
        a(static_cast<size_t>(m * k)),
        b(static_cast<size_t>(n * k)),
        c(static_cast<size_t>(m * n)) {
    coh::Random random(7);
    coh::fill_normal(a, random);
    coh::fill_normal(b, random);
  }
  void check(double sign = 1) const {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int x = 0; x < k; ++x) {
          sum += sign * coh::element_value(a[static_cast<size_t>(i * k + x)]) *
                 coh::element_value(b[static_cast<size_t>(j * k + x)]);
        }
        const double got = c[static_cast<size_t>(i * n + j)];
        expect(std::fabs(got - sum) <= 1e-5 * k, "element (%d, %d) is %g, not %g", i, j, got, sum);
      }
    }
  }
};

void run_cp_async(Bug bug) {
  Product p(16, 8, 96);
  vico::launch(coh_test::cp_async_product, 1, 128, 2 * 24 * coh_test::kDepth * 2 + 16, nullptr, p.a.data(), p.b.data(),
               p.c.data(), p.k, coh::planted ? bug : Bug::kNone);
  p.check();
}

CUtensorMap map_of(void* base, int rows, int columns) {
  vico::TensorMapShape s;
  s.rank = 2;
  s.base = base;
  s.size[0] = static_cast<uint64_t>(columns);
  s.size[1] = static_cast<uint64_t>(rows);
  s.stride[0] = static_cast<uint64_t>(columns * 2);
  s.box[0] = s.box[1] = 64;
  s.swizzle = vico::ptx::Swizzle::k128;
  return vico::encode_tensor_map(s);
}

void run_tma(Bug bug) {
  Product p(64, 64, 6 * 64);
  vico::launch(coh_test::tma_product, 1, 160, coh_test::kProductShared, nullptr, map_of(p.a.data(), p.m, p.k),
               map_of(p.b.data(), p.n, p.k), p.c.data(), p.k / 64, coh::planted ? bug : Bug::kNone);
  p.check(-1);
}

}  // namespace

COH_CASE(wait_count) { run_cp_async(Bug::kWaitCount); }
COH_CASE(no_barrier_after_wait) { run_cp_async(Bug::kNoBarrier); }
COH_CASE(misaligned_copy) { run_cp_async(Bug::kMisalignedCopy); }
COH_CASE(wrong_parity) { run_tma(Bug::kParity); }
COH_CASE(wrong_transaction_bytes) { run_tma(Bug::kTransactionBytes); }
COH_CASE(missing_proxy_fence) { run_tma(Bug::kNoProxyFence); }
COH_CASE(missing_empty_wait) { run_tma(Bug::kNoEmptyWait); }
COH_CASE(missing_wgmma_wait) { run_tma(Bug::kNoWgmmaWait); }
COH_CASE(missing_wgmma_fence) { run_tma(Bug::kNoWgmmaFence); }
COH_CASE(missing_mbarrier_fence) { run_tma(Bug::kNoMbarrierFence); }

COH_MAIN
