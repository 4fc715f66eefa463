// CUDA's built-in vector types, with its sizes and alignments.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define COH_VECTOR_TYPES(scalar, stem)                                                              \
  struct alignas(2 * sizeof(scalar)) stem##2 { scalar x, y; };                                      \
  struct alignas(4 * sizeof(scalar) > 16 ? 16 : 4 * sizeof(scalar)) stem##4 { scalar x, y, z, w; }; \
  inline stem##2 make_##stem##2(scalar x, scalar y) { return {x, y}; }                              \
  inline stem##4 make_##stem##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

COH_VECTOR_TYPES(float, float)
COH_VECTOR_TYPES(double, double)
COH_VECTOR_TYPES(int, int)
COH_VECTOR_TYPES(unsigned, uint)
#undef COH_VECTOR_TYPES
