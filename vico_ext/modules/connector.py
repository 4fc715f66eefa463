"""The dual connector as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from vico_ext import functional as VF
from vico_ext.functional.autocast import product_dtype
from vico_ext.functional.connector import check_projection
from vico_ext.functional.pack import check_destination, check_plan
from vico_ext.routing import RoutingPlan

__all__ = ["FusedConnector"]


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` does just what its class says: nothing wraps, replaces or watches it."""
    return (
        type(layer) is kind
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in layer.__dict__
    )


def _layers(sequential: nn.Sequential) -> list[Any]:
    return list(sequential._modules.values())  # indexing a Sequential searches it, and iterating it asks its length


class FusedConnector(nn.Module):
    """InternVL's connector at 256 tokens per tile, and InternVL3.5-Flash's second one at 64, behind one routing plan.

    A drop-in for pixel shuffle + ``mlp1`` (+ ``mlp2``) of the released models: parameters have the released names
    ``mlp1.{0,1,3}`` and ``mlp2.{0,1,4,7}``. The layers are run by :func:`vico_ext.functional.connector`, fused, as long
    as they are plain; where one was replaced (LoRA, quantisation) or has hooks, they are called as modules after the
    fused shuffle and norm, so that the result is always that of the layers that are there.

    Args:
        vit_hidden: V, the ViT's hidden size.
        llm_hidden: H, the language model's hidden size.
        dropout: after each GELU of the 64-token connector, in training.
        layer_norm_eps: added to the variance.
        ps_version: "v2", or "v1" of older models, which leaves the output grid transposed.
        grid: rows and columns of the ViT's token grid; by default the square of its tokens.
        has_cls: whether a CLS token leads each tile; it is skipped.
        projection: "torch", or "fused" for our own GEMMs on CUDA in 16 bits, or "folded" for those with the LayerNorms
            folded into the first Linears, where no gradient is wanted; see :func:`vico_ext.functional.connector`. The
            same results but for rounding. An attribute, free to be changed. "folded" keeps folded copies of the first
            Linears' weights in ``folded_weights`` (:class:`vico_ext.functional.FoldedWeights`), made when first needed,
            and again when those have changed: 300 MB at V = 1024, H = 4096 in 16 bits.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: sizes that are not positive, or no such ps_version or projection.
    """

    def __init__(
        self,
        vit_hidden: int,
        llm_hidden: int,
        *,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        ps_version: str = "v2",
        grid: tuple[int, int] | None = None,
        has_cls: bool = True,
        projection: str = "torch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if vit_hidden < 1 or llm_hidden < 1:
            raise ValueError(f"vit_hidden and llm_hidden must be positive, got {vit_hidden} and {llm_hidden}")
        if ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version must be 'v1' or 'v2', got {ps_version!r}")
        check_projection(projection)
        super().__init__()
        self.vit_hidden, self.llm_hidden = vit_hidden, llm_hidden
        self.projection = projection
        self.folded_weights = VF.FoldedWeights()
        self.ps_version, self.grid, self.has_cls = ps_version, grid, has_cls
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        v, h = vit_hidden, llm_hidden
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * v, eps=layer_norm_eps, **kw), nn.Linear(4 * v, h, **kw), nn.GELU(), nn.Linear(h, h, **kw)
        )
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(16 * v, eps=layer_norm_eps, **kw),
            nn.Linear(16 * v, 2 * h, **kw),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * h, 2 * h, **kw),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * h, h, **kw),
        )

    def forward(
        self,
        vit_tokens: Tensor,
        plan: RoutingPlan | None = None,
        *,
        destination: VF.Destination | None = None,
    ) -> Tensor:
        """The language model's visual tokens.

        Args:
            vit_tokens: ``[P, 1 + N, V]`` with the CLS token in front (``has_cls=False``: ``[P, N, V]``), any strides.
            plan: the routing plan of these P tiles, with N / 4 and N / 16 tokens; None for N / 4 from every tile.
            destination: with a plan and for inference: gives ``out``, ``[rows, H]`` in the dtype of the result, of any
                row stride, into which the rows are written and which is returned, and ``first_row``, ``[P]`` int64:
                tile t's tokens go to its rows from first_row[t] on. :func:`vico_ext.connect_visual_tokens` has one.

        Returns:
            With a plan ``[T, H]``, packed in tile order: tile t's tokens are rows plan.cu_tokens[t] ..
            plan.cu_tokens[t + 1]. Without, ``[P, N / 4, H]``; ``mlp2`` takes no part then.

        Raises:
            TypeError: ``plan`` is no plan, or 16-bit tokens meet weights of another dtype without autocast.
            ValueError: the plan is not of these tiles, the tokens do not fill the grid, ``destination`` comes without a
                plan, or a gradient would be lost in it.
        """
        if self._is_fusible():
            norm, dropout = _layers(self.mlp1)[0], _layers(self.mlp2)[3]
            return VF.connector(
                vit_tokens,
                self._weights(),
                plan,
                dropout_p=dropout.p,
                training=dropout.training,
                eps=norm.eps,
                grid=self.grid,
                has_cls=self.has_cls,
                ps_version=self.ps_version,
                projection=self.projection,
                folded=self.folded_weights,
                destination=destination,
            )
        check_destination(destination, plan)
        if plan is None:
            return self._run_layers(self.mlp1, vit_tokens, 2, None)
        check_plan(vit_tokens, plan, self.has_cls)
        full_index, compressed_index = plan.order.split([plan.full_tiles, plan.compressed_tiles])
        full = self._run_layers(self.mlp1, vit_tokens, 2, full_index)
        compressed = self._run_layers(self.mlp2, vit_tokens, 4, compressed_index)
        if destination is None:
            return VF.pack_tokens(full, compressed, plan)
        out, first_row = destination()
        # The layers may have a dtype of their own.
        return VF.pack_tokens_(out, full.to(out.dtype), compressed.to(out.dtype), plan, first_row)

    def writes_rows(self, vit_tokens: Tensor, like: Tensor) -> bool:
        """Whether a call with a ``destination`` like this tensor writes there what a call without it returns.

        Not where a gradient is recorded, the dtype is not that of the projections, or the module is another class, is
        compiled or has hooks, which may want the result itself.
        """
        watched = self._compiled_call_impl is not None or _global_forward_hooks or _global_forward_pre_hooks
        if watched or not _is_plain(self, FusedConnector) or product_dtype(vit_tokens) != like.dtype:
            return False
        if not torch.is_grad_enabled():
            return True
        # Replaced layers may record what is no parameter of theirs.
        return self._is_fusible() and not any(t.requires_grad for t in (vit_tokens, like, *self.parameters()))

    # Folded weights see most changes by themselves; these free their memory, and catch what is written through
    # weight.data while the module trains.
    def train(self, mode: bool = True) -> FusedConnector:
        self.folded_weights.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedConnector:
        self.folded_weights.clear()
        return super()._apply(fn, recurse)

    def _is_fusible(self) -> bool:
        kinds1 = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)
        kinds2 = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear)
        for sequential, kinds in ((self.mlp1, kinds1), (self.mlp2, kinds2)):
            layers = _layers(sequential)
            if not _is_plain(sequential, nn.Sequential) or len(layers) != len(kinds):
                return False
            for layer, kind in zip(layers, kinds, strict=True):
                if not _is_plain(layer, kind):
                    return False
                if kind is nn.GELU:
                    if layer.approximate != "none":
                        return False
                elif kind is not nn.Dropout and (layer.weight is None or layer.bias is None):
                    return False
        (norm1, *_), (norm2, _, _, first, _, _, second, _) = _layers(self.mlp1), _layers(self.mlp2)
        same_dropout = first.p == second.p and first.training == second.training
        return same_dropout and norm1.eps == norm2.eps

    def _weights(self) -> dict[str, Tensor]:
        # By attribute, not named_parameters: sharding may have replaced parameters by plain tensors, or two be one.
        weights: dict[str, Tensor] = {}
        for name, sequential, indices in (("mlp1", self.mlp1, (0, 1, 3)), ("mlp2", self.mlp2, (0, 1, 4, 7))):
            layers = _layers(sequential)
            for i in indices:
                layer = layers[i]
                weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"] = layer.weight, layer.bias
        return weights

    def _run_layers(
        self, sequential: nn.Sequential, vit_tokens: Tensor, rate: int, tile_index: Tensor | None
    ) -> Tensor:
        """One connector, its layers called as modules; shuffle and norm are fused if the norm is plain."""
        layout: dict[str, Any] = {
            "grid": self.grid,
            "tile_index": tile_index,
            "has_cls": self.has_cls,
            "ps_version": self.ps_version,
        }
        norm: Any
        norm, *layers = sequential
        if not _is_plain(sequential, nn.Sequential):
            return sequential(VF.pixel_shuffle(vit_tokens, rate, **layout))
        if _is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
            x = VF.normalized_shuffle(vit_tokens, norm.weight, norm.bias, rate, eps=norm.eps, **layout)
        else:
            x = norm(VF.pixel_shuffle(vit_tokens, rate, **layout))
        for layer in layers:
            x = layer(x)
        return x

    def extra_repr(self) -> str:
        grid = f", grid={self.grid}" if self.grid is not None else ""
        projection = f", projection={self.projection!r}" if self.projection != "torch" else ""
        return (
            f"vit_hidden={self.vit_hidden}, llm_hidden={self.llm_hidden}, ps_version={self.ps_version!r}{grid}, "
            f"has_cls={self.has_cls}{projection}"
        )
