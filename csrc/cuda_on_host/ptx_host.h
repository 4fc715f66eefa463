// The host bodies of the PTX wrappers in common/ptx.cuh and common/ptx_sm90.cuh: one function per instruction.
#pragma once

#include <cmath>
#include <cstdint>

namespace coh {

uint32_t shared_address(const void* p);

// ---- vector accesses
void check_vector(const void* p, int bytes, const char* what);

// ---- approximations
inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// ---- cp.async
void copy_async(void* to, const void* from, int bytes, int from_bytes);
void copy_async_commit();
void copy_async_wait(int keep);

// ---- ldmatrix, mma.sync
enum class Element : int { kBFloat16, kHalf };
void load_matrix(uint32_t* r, int matrices, bool transposed, const void* row);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element);

// ---- mbarrier
void mbarrier_init(void* barrier, int count);
void mbarrier_arrive(void* barrier, int transaction_bytes);
void mbarrier_wait(void* barrier, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();

// ---- TMA
struct TensorMap {
  static constexpr uint32_t kMagic = 0x7e450a9u;
  uint32_t magic;
  int rank, element_bytes, swizzle;  // swizzle: 0 none, 1..3 for 32, 64, 128 bytes
  char* base;
  uint64_t size[5], stride[5];  // elements, bytes; stride[0] is element_bytes
  uint16_t box[5];
};
void encode_tensor_map(void* map, int element_bytes, int rank, void* base, const uint64_t* size, const uint64_t* stride,
                       const uint32_t* box, int swizzle);
void tensor_load(void* to, const void* map, const int* at, int rank, void* barrier);

// ---- wgmma
struct MmaAsync {
  uint64_t a, b;  // matrix descriptors
  float* d;
  int n;
  bool a_mn_major, b_mn_major, accumulate;
  Element element;
};
void mma_async(const MmaAsync& mma);
void mma_async_fence();
void mma_async_commit();
void mma_async_wait(int keep);

}  // namespace coh
