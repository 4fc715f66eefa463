// Tensor maps for TMA, made on the host by the driver's cuTensorMapEncodeTiled; on the emulated device by cuda_on_host.
#pragma once

#include "common/ptx_wgmma.cuh"

namespace vico {

enum class MapElement { kHalf, kBFloat16, kFloat };

// A tensor of rank 1 to 5 in global memory and the box that one copy moves. size[0] is innermost and dense.
struct TensorMapShape {
  MapElement element = MapElement::kBFloat16;
  int rank = 1;
  void* base = nullptr;     // aligned to 16 bytes
  uint64_t size[5] = {};    // elements
  uint64_t stride[4] = {};  // BYTES from one index to the next of dimensions 1.., multiples of 16
  uint32_t box[5] = {};     // elements, at most 256 each; box[0] is a multiple of 16 bytes
  ptx::Swizzle swizzle = ptx::Swizzle::kNone;
};

#ifdef __CUDACC__

inline CUtensorMap encode_tensor_map(const TensorMapShape& s) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Through the runtime, so that nothing links to the driver's library.
  static const Encode encode = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(p);
  }();
  const CUtensorMapDataType type = s.element == MapElement::kHalf    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : s.element == MapElement::kFloat ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                                     : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, type, s.rank, s.base, s.size, s.stride, s.box, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(s.swizzle),
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled fails with error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

inline CUtensorMap encode_tensor_map(const TensorMapShape& s) {
  CUtensorMap map;
  coh::encode_tensor_map(&map, s.element == MapElement::kFloat ? 4 : 2, s.rank, s.base, s.size, s.stride, s.box,
                         static_cast<int>(s.swizzle));
  return map;
}

#endif

}  // namespace vico
