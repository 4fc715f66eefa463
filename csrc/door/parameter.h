// What the op doors share about learned parameters: gains and biases that go with an activation, and their gradients.
#pragma once

#include "common/column_sum.h"
#include "door/door.h"

namespace vico {

// Checks a gain or bias [size] that is applied to activations like `like`, called `like_name`: it has their dtype, or
// float32 beside 16-bit activations, as mixed precision keeps parameters.
inline void check_parameter(const Tensor& t, const Tensor& like, int64_t size, const char* name, const char* like_name,
                            const char* wanted, const char* op) {
  check_device(t, like, name, like_name, op);
  const Dtype dtype = float_dtype(t, name, op), activation = float_dtype(like, like_name, op);
  VICO_CHECK(dtype == activation || (dtype == Dtype::kFloat && activation != Dtype::kDouble), op, name,
             " must have the dtype of the activations, or float32 beside 16-bit activations, got ", dtype_string(t));
  check_shape(t, {size}, name, wanted, op);
}

// A parameter as the kernels read it: dense, in the type of the sums (double for double, float for all else).
inline Tensor as_accumulate(const Tensor& t, Dtype activation) {
  return to_contiguous(torch::stable::to(t, accumulate_type(activation)));
}
inline std::optional<Tensor> as_accumulate(const std::optional<Tensor>& t, Dtype activation) {
  return t ? std::optional<Tensor>(as_accumulate(*t, activation)) : std::nullopt;
}

// A parameter as the kernels of this device read it. Those on CUDA read the activations' own type too, and say so in
// `as_elements`: a conversion would be a launch, for a few thousand numbers.
inline Tensor as_parameter(const Tensor& t, Dtype activation, bool& as_elements) {
  as_elements = on_cuda(t) && activation != Dtype::kDouble && t.scalar_type() != ScalarType::Float;
  return as_elements ? to_contiguous(t) : as_accumulate(t, activation);
}
inline std::optional<Tensor> as_parameter(const std::optional<Tensor>& t, Dtype activation, bool& as_elements) {
  return t ? std::optional<Tensor>(as_parameter(*t, activation, as_elements)) : std::nullopt;
}

// Partial sums [chunks, sums * columns] that a kernel is about to write.
inline Tensor make_partials(const Tensor& like, Dtype dtype, int64_t chunks, int64_t columns) {
  return make_tensor(like, {chunks, columns}, accumulate_type(dtype));
}

// out [columns] = the sum over the chunks of partials[:, first : first + columns].
inline void combine_partials(const Tensor& partials, int64_t first, Tensor& out) {
  ColumnSumParams p;
  p.dtype = float_dtype(out, "out", "column_sum");
  p.columns = out.numel();
  p.chunks = partials.size(0);
  p.chunk_stride = partials.size(1);
  const int64_t bytes = p.dtype == Dtype::kDouble ? 8 : 4;
  p.partials = static_cast<const char*>(partials.const_data_ptr()) + first * bytes;
  p.out = out.mutable_data_ptr();
  if (on_cuda(out)) {
    VICO_CUDA_CALL(combine_chunks, p, out);
  } else {
    parallel_rows(p.columns, std::max<int64_t>(1, p.chunks),
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(combine_chunks, p, begin, end); });
  }
}

}  // namespace vico
