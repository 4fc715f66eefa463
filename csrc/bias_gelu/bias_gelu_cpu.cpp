// CPU kernels of bias_gelu.
#include <cstring>

#include "bias_gelu/bias_gelu.h"
#include "common/column_sum.h"
#include "common/math.h"
#include "common/philox.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace vico::VICO_CPU_ARCH {
namespace {

constexpr int64_t kSegment = 1024;  // elements worked on at a time: their dropout factors stay in the L1 cache

// Random words, at most as many as Philox has lanes.
constexpr int kWordBytes = kVecBytes < 32 ? kVecBytes : 32;
typedef uint32_t Words __attribute__((vector_size(kWordBytes)));
typedef int32_t WordMask __attribute__((vector_size(kWordBytes)));
typedef float WordFactors __attribute__((vector_size(kWordBytes)));

// The products of 32-bit words in every lane. Through intrinsics where there are some: of a product of 64-bit lanes the
// compiler does not see that the upper halves are zero.
struct MultiplyLanes {
  VICO_INLINE void operator()(Words a, uint32_t m, Words& high, Words& low) const {
#ifdef __AVX2__
    const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(m));
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
    for (int i = 0; i < kLanes<Words>; ++i) {
      uint32_t lane_high, lane_low;
      MultiplyWide()(a[i], m, lane_high, lane_low);
      high[i] = lane_high;
      low[i] = lane_low;
    }
#endif
  }
};

VICO_INLINE void store_factors(float* factors, WordMask keep, float scale) {
  const auto values = (WordFactors)(keep & (WordMask)(WordFactors{} + scale));
  std::memcpy(factors, &values, sizeof(values));
}
VICO_INLINE void store_factors(double* factors, WordMask keep, double scale) {
  for (int i = 0; i < kLanes<WordMask>; ++i) factors[i] = keep[i] ? scale : 0;
}

// The dropout factors, 0 or scale, of up to kSegment consecutive elements.
template <class A>
class KeepFactors {
 public:
  VICO_INLINE explicit KeepFactors(const DropoutMask& mask) : mask_(mask) {}

  // Draws those of elements [first, first + count) and returns them.
  VICO_INLINE const A* draw(int64_t first, int64_t count) {
    constexpr int kW = kLanes<Words>;
    const A scale = static_cast<A>(mask_.scale);
    A* factor = factors_;
    for (int64_t b = first / kPhiloxBlock; b * kPhiloxBlock < first + count; ++b, factor += kPhiloxBlock) {
      for (int64_t l = 0; l < kPhiloxLanes; l += kW) {
        const uint64_t counter = static_cast<uint64_t>(b * kPhiloxLanes + l);
        // A block's counters begin at a multiple of kPhiloxLanes: the lanes never carry into the high word.
        Words words[4] = {lane_numbers() + static_cast<uint32_t>(counter),
                          Words{} + static_cast<uint32_t>(counter >> 32), Words{}, Words{}};
        philox4x32_10(words, mask_.seed, MultiplyLanes());
        for (int w = 0; w < 4; ++w) store_factors(factor + w * kPhiloxLanes + l, words[w] < mask_.keep_below, scale);
      }
    }
    return factors_ + first % kPhiloxBlock;
  }

 private:
  static VICO_INLINE Words lane_numbers() {
    Words lanes{};
    for (int i = 0; i < kLanes<Words>; ++i) lanes[i] = i;
    return lanes;
  }

  DropoutMask mask_;
  A factors_[kSegment + 2 * kPhiloxBlock];
};

// Calls fn(first element, its column, count) on pieces of [begin, end) that stay within a row and a segment.
template <class Fn>
VICO_INLINE void for_segments(int64_t columns, int64_t begin, int64_t end, Fn&& fn) {
  int64_t column = begin % columns;
  while (begin < end) {
    int64_t count = columns - column < end - begin ? columns - column : end - begin;
    if (count > kSegment) count = kSegment;
    fn(begin, column, count);
    begin += count;
    column += count;
    if (column == columns) column = 0;
  }
}

template <class T, bool kBias, bool kDropout>
void forward(const BiasGeluParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  KeepFactors<A> factors(p.mask);
  for_segments(p.columns, begin, end, [&](int64_t first, int64_t column, int64_t count) {
    const A* keep = kDropout ? factors.draw(first, count) : nullptr;
    const T* x = static_cast<const T*>(p.x) + first;
    const A* bias = static_cast<const A*>(p.bias) + (kBias ? column : 0);
    T* out = static_cast<T*>(p.out) + first;
    for (int64_t i = 0; i < count; i += kWidth<T>) {
      auto z = load_n(x + i, count - i);
      if constexpr (kBias) z += load_n(bias + i, count - i);
      auto y = z * normal(z).cdf;
      if constexpr (kDropout) y *= load(keep + i);  // `factors` is padded
      store_n(out + i, y, count - i);
    }
  });
}

template <class T, bool kBias, bool kDropout>
void backward(const BiasGeluBackwardParams& p, int64_t chunk) {
  using A = accumulate_t<T>;
  constexpr A kDensity = A(0.39894228040143267794);  // 1 / sqrt(2 pi)
  const int64_t chunk_elements = kChunkRows * p.columns, begin = chunk * chunk_elements;
  const int64_t end = begin + chunk_elements < p.elements ? begin + chunk_elements : p.elements;
  A* partial = static_cast<A*>(p.partials) + (kBias ? chunk * p.columns : 0);
  if constexpr (kBias) std::memset(partial, 0, p.columns * sizeof(A));
  KeepFactors<A> factors(p.mask);
  for_segments(p.columns, begin, end, [&](int64_t first, int64_t column, int64_t count) {
    const A* keep = kDropout ? factors.draw(first, count) : nullptr;
    const T* x = static_cast<const T*>(p.x) + first;
    const T* grad_out = static_cast<const T*>(p.grad_out) + first;
    const A* bias = static_cast<const A*>(p.bias) + (kBias ? column : 0);
    T* grad_x = static_cast<T*>(p.grad_x) + first;
    for (int64_t i = 0; i < count; i += kWidth<T>) {
      const int64_t n = count - i;
      auto z = load_n(x + i, n);
      if constexpr (kBias) z += load_n(bias + i, n);
      auto g = load_n(grad_out + i, n);
      if constexpr (kDropout) g *= load(keep + i);
      const auto at_z = normal(z);
      g *= at_z.cdf + z * at_z.gauss * kDensity;
      store_n(grad_x + i, g, n);
      if constexpr (kBias) store_n(partial + column + i, load_n(partial + column + i, n) + g, n);
    }
  });
}

// Calls fn with two compile-time flags of these values.
template <class Fn>
VICO_INLINE void with_flags(bool bias, bool dropout, Fn&& fn) {
  if (bias) {
    dropout ? fn(std::true_type{}, std::true_type{}) : fn(std::true_type{}, std::false_type{});
  } else {
    dropout ? fn(std::false_type{}, std::true_type{}) : fn(std::false_type{}, std::false_type{});
  }
}

}  // namespace

void bias_gelu(const BiasGeluParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    with_flags(p.bias, p.mask.active, [&](auto bias, auto dropout) {
      forward<decltype(element), decltype(bias)::value, decltype(dropout)::value>(p, begin, end);
    });
  });
}

void bias_gelu_backward(const BiasGeluBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto element) {
    with_flags(p.bias, p.mask.active, [&](auto bias, auto dropout) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        backward<decltype(element), decltype(bias)::value, decltype(dropout)::value>(p, chunk);
      }
    });
  });
}

}  // namespace vico::VICO_CPU_ARCH
