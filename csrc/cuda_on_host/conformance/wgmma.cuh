// What wgmma of common/ptx_wgmma.cuh does, for every type, swizzle and order of its operands.
#pragma once

#include "common/ptx_wgmma.cuh"
#include "cuda_on_host/conformance/dump.h"

namespace conformance {

namespace ptx = vico::ptx;

// Where an operand lies in shared memory: see ptx::matrix_descriptor.
struct Layout {
  uint32_t offset, leading, stride, bytes;

  // `rows` along M or N by one span along K (K-major), or by 16 along K (MN-major). Swizzled K-major operands begin
  // as far into their rows as they can.
  Layout(uint32_t rows, bool mn_major, ptx::Swizzle swizzle) {
    const uint32_t span = 16u << static_cast<int>(swizzle);
    if (swizzle == ptx::Swizzle::kNone) {
      offset = 0, leading = 128, stride = 256, bytes = rows * 32;
    } else if (mn_major) {
      offset = 0, leading = 16 * span, stride = 8 * span, bytes = rows * 32;
    } else {
      offset = span - 32, leading = 16, stride = 8 * span, bytes = rows * span;
    }
    if (mn_major && swizzle != ptx::Swizzle::kNone && bytes < leading) bytes = leading;
  }
};

template <int kN, bool kHalf, bool kAMnMajor, bool kBMnMajor>
__global__ void wgmma_kernel(const uint4* a, const uint4* b, const float* c, float* out, uint64_t* descriptors,
                             Layout layout_a, Layout layout_b, ptx::Swizzle swizzle, bool accumulate) {
  VICO_DYNAMIC_SHARED(uint4, operands);
  uint4* operand_b = operands + (layout_a.bytes + 1023) / 1024 * 64;
  for (unsigned i = threadIdx.x; i < layout_a.bytes / 16; i += 128) operands[i] = a[i];
  for (unsigned i = threadIdx.x; i < layout_b.bytes / 16; i += 128) operand_b[i] = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = c[threadIdx.x * (kN / 2) + static_cast<unsigned>(i)];
  const uint32_t at_a = ptx::shared_address(operands) + layout_a.offset,
                 at_b = ptx::shared_address(operand_b) + layout_b.offset;
  const uint64_t desc_a = ptx::matrix_descriptor(at_a, layout_a.leading, layout_a.stride, swizzle);
  const uint64_t desc_b = ptx::matrix_descriptor(at_b, layout_b.leading, layout_b.stride, swizzle);
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<kN, kHalf, kAMnMajor, kBMnMajor>(d, desc_a, desc_b, accumulate);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * (kN / 2) + static_cast<unsigned>(i)] = d[i];
  if (threadIdx.x == 0) {
    descriptors[0] = desc_a - (at_a >> 4);  // without the address, which is the linker's choice
    descriptors[1] = desc_b - (at_b >> 4);
  }
}

// limit: of the operands' whole numbers; 0: fractions, whose sums are rounded.
template <int kN, bool kHalf, bool kAMnMajor, bool kBMnMajor>
void dump_wgmma(Dump& dump, Random& random, ptx::Swizzle swizzle, int limit, bool accumulate = true) {
  constexpr size_t kOutputs = 128 * kN / 2;
  const Layout layout_a(64, kAMnMajor, swizzle), layout_b(kN, kBMnMajor, swizzle);
  const int span = 16 << static_cast<int>(swizzle);
  const std::string name = "wgmma_m64k16.n" + std::to_string(kN) + (kHalf ? ".f16." : ".bf16.") +
                           (kAMnMajor ? "m" : "k") + (kBMnMajor ? "n" : "k") + ".swizzle" +
                           std::to_string(swizzle == ptx::Swizzle::kNone ? 0 : span) +
                           (limit ? ".whole" : ".fractions") + (accumulate ? "" : ".overwrite");
  const std::vector<uint16_t> numbers_a = random.numbers(layout_a.bytes / 2, kHalf, limit),
                              numbers_b = random.numbers(layout_b.bytes / 2, kHalf, limit);
  const auto a = dump.input(name + "/a", numbers_a, {numbers_a.size()});
  const auto b = dump.input(name + "/b", numbers_b, {numbers_b.size()});
  std::vector<int8_t> whole(kOutputs);
  for (int8_t& x : whole) x = static_cast<int8_t>(random.below(33) - 16);
  dump.add(name + "/c", whole, {128, kN / 2});
  const Array<float> c(std::vector<float>(whole.begin(), whole.end())), out{std::vector<float>(kOutputs)};
  const Array<uint64_t> descriptors{std::vector<uint64_t>(2)};
  vico::launch(wgmma_kernel<kN, kHalf, kAMnMajor, kBMnMajor>, 1, 128,
               (layout_a.bytes + 1023) / 1024 * 1024 + layout_b.bytes, nullptr,
               reinterpret_cast<const uint4*>(a.data()), reinterpret_cast<const uint4*>(b.data()), c.data(), out.data(),
               descriptors.data(), layout_a, layout_b, swizzle, accumulate);
  std::vector<uint32_t> words;
  for (uint64_t d : descriptors.values(name)) {
    words.push_back(static_cast<uint32_t>(d));
    words.push_back(static_cast<uint32_t>(d >> 32));
  }
  dump.add(name + "/descriptors", words, {2, 2});
  if (!limit) return dump.output(name + "/out", out, {128, kN / 2});
  const std::vector<float> sums = out.values(name);
  for (size_t i = 0; i < kOutputs; ++i) {  // whole numbers below 128: a byte is enough
    whole[i] = static_cast<int8_t>(sums[i]);
    if (static_cast<float>(whole[i]) != sums[i]) throw std::runtime_error(name + " is not a small whole number");
  }
  dump.add(name + "/out", whole, {128, kN / 2});
}

template <bool kHalf, bool kAMnMajor, bool kBMnMajor>
void dump_wgmma_swizzles(Dump& dump, Random& random) {
  for (const auto swizzle : {ptx::Swizzle::kNone, ptx::Swizzle::k32, ptx::Swizzle::k64, ptx::Swizzle::k128}) {
    dump_wgmma<64, kHalf, kAMnMajor, kBMnMajor>(dump, random, swizzle, 2);
  }
}

template <bool kHalf>
void dump_wgmma_sizes(Dump& dump, Random& random) {
  dump_wgmma<128, kHalf, false, false>(dump, random, ptx::Swizzle::k128, 2);
  dump_wgmma<256, kHalf, false, true>(dump, random, ptx::Swizzle::k128, 2);
  dump_wgmma<64, kHalf, false, false>(dump, random, ptx::Swizzle::k128, 2, false);
  dump_wgmma<64, kHalf, false, false>(dump, random, ptx::Swizzle::k128, 0);
}

}  // namespace conformance
