// The Dtype of an element type.
#pragma once

#include <type_traits>

#include "common/dtype.h"

namespace coh_test {

template <class T>
constexpr vico::Dtype kDtype = std::is_same_v<T, double>           ? vico::Dtype::kDouble
                               : std::is_same_v<T, float>          ? vico::Dtype::kFloat
                               : std::is_same_v<T, vico::BFloat16> ? vico::Dtype::kBFloat16
                                                                   : vico::Dtype::kHalf;

}  // namespace coh_test
