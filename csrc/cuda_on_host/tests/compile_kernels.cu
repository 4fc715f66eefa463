// Every CUDA kernel in every type: what nvcc must be able to compile (sm_80 and sm_90a), without a GPU.
#include "attention_pool/attention_pool_cuda.cu"
#include "common/column_sum_cuda.cu"
#include "common/tile_map_cuda.cu"
#include "normalized_shuffle/normalized_shuffle_cuda.cu"
#include "pixel_shuffle/pixel_shuffle_cuda.cu"
#include "skinny_linear/skinny_linear_cuda.cu"
