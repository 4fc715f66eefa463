// The door of pixel_shuffle: checks, allocation, threads or launch.
#include "door/shuffle_args.h"
#include "pixel_shuffle/pixel_shuffle.h"

namespace vico {
namespace {

Tensor pixel_shuffle_op(const Tensor& tokens_in, int64_t grid_h, int64_t grid_w, int64_t rate,
                        const std::optional<Tensor>& tile_index, int64_t skip, bool transposed) {
  constexpr const char* kOp = "pixel_shuffle";
  VICO_CHECK(tokens_in.dim() == 3, kOp, "tokens must have shape [tiles, tokens, channels], got ",
             shape_string(tokens_in));
  const Tensor tokens = with_dense_last_dim(tokens_in);
  PixelShuffleParams p;
  p.shape = checked_shuffle_shape(tokens, {grid_h, grid_w, rate, skip, transposed}, tile_index, kOp);
  const ShuffleShape& s = p.shape;
  Tensor out = make_tensor(tokens, {s.selected, s.out_tokens(), s.out_channels()});
  p.element_size = element_size(float_dtype(tokens, "tokens", kOp));
  p.tokens = static_cast<const char*>(tokens.const_data_ptr());
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  if (on_cuda(tokens)) {
    VICO_CUDA_CALL(pixel_shuffle, p, tokens);
  } else {
    parallel_rows(s.selected * s.out_tokens(), s.out_channels(),
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pixel_shuffle, p, begin, end); });
  }
  return out;
}

Tensor pixel_shuffle_backward_op(const Tensor& grad_out_in, int64_t tiles, int64_t grid_h, int64_t grid_w, int64_t rate,
                                 const std::optional<Tensor>& tile_index, int64_t skip, bool transposed) {
  constexpr const char* kOp = "pixel_shuffle_backward";
  const GridArgs grid{grid_h, grid_w, rate, skip, transposed};
  check_kernels(grad_out_in, kOp);
  check_grid(grid, kOp);
  check_tile_index(tile_index, tiles, grad_out_in, "grad_out", kOp);
  check_shape(grad_out_in, {tile_index ? tile_index->numel() : tiles, grid_h / rate * (grid_w / rate), -1}, "grad_out",
              "[selected, out_tokens, rate * rate * channels]", kOp);
  VICO_CHECK(grad_out_in.size(2) % (rate * rate) == 0, kOp, "grad_out must have rate * rate * channels channels, got ",
             grad_out_in.size(2), " at rate ", rate);
  const Tensor grad_out = to_contiguous(grad_out_in);
  PixelShuffleBackwardParams p;
  p.dtype = float_dtype(grad_out, "grad_out", kOp);
  p.shape = shuffle_shape(grid, tiles, grad_out.size(2) / (rate * rate), tile_index);
  Tensor grad_tokens = make_tensor(grad_out, {tiles, skip + grid_h * grid_w, p.shape.channels});
  if (grad_tokens.numel() == 0) return grad_tokens;
  p.grad_out = grad_out.const_data_ptr();
  p.grad_tokens = grad_tokens.mutable_data_ptr();
  if (on_cuda(grad_out)) {
    const std::optional<Tensor> map = device_tile_map(tile_index, tiles);
    p.tile_offsets = map ? map->const_data_ptr<int64_t>() : nullptr;
    p.selected_tiles = map ? p.tile_offsets + tiles + 1 : nullptr;
    VICO_CUDA_CALL(pixel_shuffle_backward, p, grad_out);
  } else {
    const TileMap map = invert_tile_index(p.shape.tile_index, p.shape.selected, tiles);
    p.tile_offsets = map.offsets.data();
    p.selected_tiles = map.selected.data();
    parallel_rows(tiles * (1 + grid_h), grid_w * p.shape.channels,
                  [&](int64_t begin, int64_t end) { VICO_CPU_CALL(pixel_shuffle_backward, p, begin, end); });
  }
  return grad_tokens;
}

}  // namespace
}  // namespace vico

VICO_DOORS(m) {
  m.impl("pixel_shuffle", TORCH_BOX(&vico::pixel_shuffle_op));
  m.impl("pixel_shuffle_backward", TORCH_BOX(&vico::pixel_shuffle_backward_op));
}
