// The door of router_gate: checks, work areas, one call. CUDA alone has a kernel, see router_pool.
#include "door/door.h"
#include "router_gate/router_gate.h"
#include "skinny_linear/skinny_linear.h"

namespace vico {
namespace {

constexpr const char* kOp = "router_gate";

Tensor dense_like(const Tensor& t, const Tensor& x, std::initializer_list<int64_t> shape, const std::string& name,
                  const char* wanted) {
  check_device(t, x, name.c_str(), "pooled", kOp);
  check_same_dtype(t, x, name.c_str(), "pooled", kOp);
  check_shape(t, shape, name.c_str(), wanted, kOp);
  return to_contiguous(t);
}

// blocks: W1, b1, W2, b2, norm weight and bias of each; gate: norm weight and bias, W and b.
Tensor router_gate_op(const Tensor& pooled_in, const std::vector<Tensor>& blocks, const std::vector<Tensor>& gate,
                      double eps, bool probability) {
  check_kernels(pooled_in, kOp);
  VICO_CHECK(on_cuda(pooled_in), kOp, "there is a kernel for CUDA alone, got pooled on ", device_string(pooled_in),
             ": functional.router_gate computes the same there");
  RouterGateParams p;
  p.dtype = float_dtype(pooled_in, "pooled", kOp);
  check_shape(pooled_in, {-1, -1}, "pooled", "[tiles, channels]", kOp);
  VICO_CHECK(blocks.size() % 6 == 0, kOp, "blocks must hold 6 tensors for each block, got ", blocks.size());
  VICO_CHECK(gate.size() == 4, kOp, "gate must hold 4 tensors, got ", gate.size());
  const int64_t channels = pooled_in.size(1);
  p.rows = pooled_in.size(0);
  p.channels = channels;
  p.eps = eps;

  std::vector<Tensor> kept;  // until the kernels have been launched
  const auto keep = [&](const Tensor& t, std::initializer_list<int64_t> shape, const std::string& name,
                        const char* wanted) {
    kept.push_back(dense_like(t, pooled_in, shape, name, wanted));
    return kept.back().const_data_ptr();
  };
  std::vector<RouterGateBlock> block_params(blocks.size() / 6);
  int64_t widest = 0;
  for (size_t i = 0; i < block_params.size(); ++i) {
    RouterGateBlock& b = block_params[i];
    const Tensor* t = &blocks[6 * i];
    const std::string name = "block " + std::to_string(i + 1) + "'s ";
    b.up_weight = keep(t[0], {-1, channels}, name + "first weight", "[hidden, channels]");
    b.hidden = t[0].size(0);
    b.up_bias = keep(t[1], {b.hidden}, name + "first bias", "[hidden]");
    b.down_weight = keep(t[2], {channels, b.hidden}, name + "second weight", "[channels, hidden]");
    b.down_bias = keep(t[3], {channels}, name + "second bias", "[channels]");
    b.norm_weight = keep(t[4], {channels}, name + "norm weight", "[channels]");
    b.norm_bias = keep(t[5], {channels}, name + "norm bias", "[channels]");
    widest = std::max(widest, b.hidden);
  }
  p.norm_weight = keep(gate[0], {channels}, "gate's norm weight", "[channels]");
  p.norm_bias = keep(gate[1], {channels}, "gate's norm bias", "[channels]");
  p.weight = keep(gate[2], {-1, channels}, "gate's weight", "[classes, channels]");
  p.classes = gate[2].size(0);
  p.bias = keep(gate[3], {p.classes}, "gate's bias", "[classes]");

  VICO_CHECK(!probability || p.classes > 0, kOp, "a probability needs at least one class, got none");
  Tensor logits = make_tensor(pooled_in, {p.rows, p.classes});
  Tensor out = probability ? make_tensor(pooled_in, {p.rows}, accumulate_type(p.dtype)) : logits;
  if (p.rows == 0) return out;
  const Tensor x = to_contiguous(pooled_in);
  Tensor hidden = make_tensor(x, {p.rows, widest}), work = make_tensor(x, {2, p.rows, channels});
  const bool may_cut = element_size(p.dtype) == 2;
  Tensor parts = may_cut ? make_tensor(x, {SkinnyLinearParams::kMostParts, p.rows, channels}, ScalarType::Float) : work;
  p.x = x.const_data_ptr();
  p.blocks = block_params.data();
  p.block_count = static_cast<int64_t>(block_params.size());
  p.logits = logits.mutable_data_ptr();
  if (probability) p.probability = out.mutable_data_ptr();
  if (may_cut) p.parts = parts.mutable_data_ptr();
  p.hidden = hidden.mutable_data_ptr();
  p.update = work.mutable_data_ptr();
  p.current = static_cast<char*>(work.mutable_data_ptr()) + p.rows * channels * element_size(p.dtype);
  VICO_CUDA_CALL(router_gate, p, x);
  return out;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) { m.impl("router_gate", TORCH_BOX(&vico::router_gate_op)); }
