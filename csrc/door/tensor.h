// What the op doors share: checks that speak the user's words, and tensors of the stable ABI as plain pointers.
// This room, the doors (<op>_op.cpp) and registration.cpp alone see torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

// Fails with a message that begins with the op's name: what was wanted, what came.
#define VICO_CHECK(cond, op, ...)                       \
  do {                                                  \
    if (!(cond)) ::vico::detail::fail(op, __VA_ARGS__); \
  } while (0)

namespace vico {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace detail {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "vico::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace detail

inline std::string shape_string(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

// "float32", "bfloat16", ...: the name a user knows, or torch's own for types the kernels do not take.
inline std::string dtype_string(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(t.scalar_type());
  }
}

// "cpu", "cuda:0", or torch's number of a type that has no kernels.
inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "a device of type " + std::to_string(static_cast<int>(t.device().type()));
}

// Every tensor of a call is where its first one is.
inline void check_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name, const char* op) {
  VICO_CHECK(t.device() == like.device(), op, name, " must be on the device of ", like_name, " (", device_string(like),
             "), got ", device_string(t));
}

// The kernels' element type of a floating tensor; fails for any other.
inline Dtype float_dtype(const Tensor& t, const char* name, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      detail::fail(op, name, " must be float32, float64, bfloat16 or float16, got ", dtype_string(t));
  }
}

inline void check_dtype(const Tensor& t, ScalarType wanted, const char* name, const char* wanted_name, const char* op) {
  VICO_CHECK(t.scalar_type() == wanted, op, name, " must be ", wanted_name, ", got ", dtype_string(t));
}

inline void check_same_dtype(const Tensor& t, const Tensor& like, const char* name, const char* like_name,
                             const char* op) {
  VICO_CHECK(t.scalar_type() == like.scalar_type(), op, name, " must have the dtype of ", like_name, " (",
             dtype_string(like), "), got ", dtype_string(t));
}

// Shape check; -1 stands for any size. `wanted` is how the shape reads in the message, e.g. "[tiles, tokens,
// channels]".
inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name, const char* wanted,
                        const char* op) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    ok = ok && (size < 0 || t.size(i) == size);
    ++i;
  }
  if (ok) return;
  std::ostringstream exact;
  for (int64_t size : shape) exact << (exact.tellp() > 0 ? ", " : "") << (size < 0 ? "*" : std::to_string(size));
  detail::fail(op, name, " must have shape ", wanted, " = [", exact.str(), "], got ", shape_string(t));
}

// Tokens of a whole and of a compressed tile, for `tiles` tiles whose tokens can be counted.
inline void check_tile_tokens(int64_t full_tokens, int64_t compressed_tokens, int64_t tiles, const char* op) {
  VICO_CHECK(full_tokens > compressed_tokens && compressed_tokens > 0, op,
             "tokens of a whole tile must exceed those of a compressed one, and both be positive, got ", full_tokens,
             " and ", compressed_tokens);
  VICO_CHECK(tiles == 0 || full_tokens <= std::numeric_limits<int64_t>::max() / tiles, op, tiles, " tiles of ",
             full_tokens, " tokens are more than can be counted");
}

inline Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Same rows, channels next to each other: the kernels take any stride but that of the last dimension.
inline Tensor with_dense_last_dim(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// Checks a tensor [rows, channels] that is written in place, for any stride of its rows.
inline void check_rows_in_place(const Tensor& t, const char* name, const char* op) {
  VICO_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, name,
             " is written in place and must have its channels next to each other, got stride ", t.stride(1));
  VICO_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), op, name,
             " is written in place and its rows must not overlap, got stride ", t.stride(0), " for ", t.size(1),
             " channels");
}

// Whether the first to the last byte of both have any in common.
inline bool may_share_memory(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

inline Tensor make_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes));
}
inline Tensor make_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

// float64 statistics for float64 data, float32 for all else.
inline ScalarType accumulate_type(Dtype dtype) {
  return dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
}

inline const void* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Runs body(begin, end) over `rows` rows on torch's threads, in chunks worth at least ~32k elements.
template <class Body>
void parallel_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  constexpr int64_t kGrain = 32768;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain, body);
}

}  // namespace vico
