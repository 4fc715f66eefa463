"""LayerNorm folded into the Linear behind it, and what keeps such weights between calls."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from vico_ext._load import _C
from vico_ext.functional.shuffle import _grid_of, _is_transposed
from vico_ext.ops.call import call

__all__ = ["FoldedLinear", "FoldedWeights", "fold_layer_norm"]

_ROWS_AT_ONCE = 1024  # of a weight, in float32: 64 MB at 16384 columns


class FoldedLinear(NamedTuple):
    """LayerNorm and Linear as one: z = rstd (a ``weight``^T - mean ``gain_sum``) + ``bias``, a the raw rows."""

    weight: Tensor
    gain_sum: Tensor
    bias: Tensor


def fold_layer_norm(
    gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> FoldedLinear:
    """Linear(LayerNorm(a)) as a product of the raw a, whose mean and 1 / std are applied to the sums.

    Args:
        gain, shift: LayerNorm's weight and bias, ``[K]``.
        weight, bias: the Linear's, ``[N, K]`` and ``[N]``.
        dtype: of the folded weight; by default that of ``weight``.

    Returns:
        ``weight`` ``[N, K]``, weight * gain rounded to ``dtype``; ``gain_sum`` ``[N]``, the sums of its rows, of the
        rounded values, so that a row's mean cancels however large the roundings are; ``bias`` ``[N]``, bias + weight
        shift. The last two are float32, or float64 for float64.
    """
    dtype = weight.dtype if dtype is None else dtype
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        gain, shift = gain.to(sums), shift.to(sums)
        folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        gain_sum, added = (torch.empty(weight.shape[0], dtype=sums, device=weight.device) for _ in range(2))
        for first in range(0, weight.shape[0], _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            part = weight[rows].to(sums)
            folded[rows] = part * gain
            gain_sum[rows] = folded[rows].sum(1, dtype=sums)
            added[rows] = (part * shift).sum(1)
        return FoldedLinear(folded, gain_sum, bias.to(sums) + added)


class _Source:
    """A tensor as it was: the same object (not another at its address), memory, number of changes and of steps."""

    _all: ClassVar[weakref.WeakSet[_Source]] = weakref.WeakSet()
    _watched: ClassVar[bool] = False

    def __init__(self, t: Tensor) -> None:
        self._ref = weakref.ref(t)
        self._state = self._state_of(t)
        self._stepped = False
        self._all.add(self)
        if not _Source._watched:
            register_optimizer_step_post_hook(_Source._step)
            _Source._watched = True

    @staticmethod
    def _state_of(t: Tensor) -> tuple[Any, ...]:
        # t.data = other, as Module.to() does it, is neither a new object nor a counted change.
        return t._version, t.data_ptr(), t.dtype, t.device, t.shape, t.stride()

    @classmethod
    def _step(cls, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After an optimiser's step: fused ones change parameters without torch's counting it."""
        if cls._all:
            changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for source in cls._all:
                source._stepped |= id(source._ref()) in changed

    def is_still(self, t: Tensor) -> bool:
        return self._ref() is t and not self._stepped and self._state == self._state_of(t)


class _Kept:
    """A folded layer, of what it was made, and the stream that made it."""

    def __init__(self, folded: FoldedLinear, sources: Sequence[Tensor]) -> None:
        self.folded, self.sources = folded, [_Source(t) for t in sources]
        self.stream = self.ready = None
        if folded.weight.is_cuda:
            self.stream = torch.cuda.current_stream(folded.weight.device)
            self.ready = self.stream.record_event()

    def is_of(self, sources: Sequence[Tensor], dtype: torch.dtype) -> bool:
        return self.folded.weight.dtype == dtype and all(
            source.is_still(t) for source, t in zip(self.sources, sources, strict=True)
        )

    def order_after_making(self) -> None:
        """The current stream waits for what made the weights, and they are not reused before it has read them."""
        if self.stream is None or self.ready is None:
            return
        stream = torch.cuda.current_stream(self.folded.weight.device)
        if stream != self.stream:
            stream.wait_event(self.ready)
            for t in self.folded:
                t.record_stream(stream)


def _can_watch(t: Tensor) -> bool:
    """Whether changes of the tensor can be seen."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_inference()


def _is_capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class FoldedWeights:
    """Folded layers, each made once for its weights: when first asked for, and again once one of those has changed.

    Seen are another tensor in a weight's place, steps of any torch optimiser, and all changes that torch counts or that
    move its memory: ``load_state_dict``, ``.to()``, ``copy_`` and the like. Not seen are values written through
    ``weight.data``, by collectives of torch.distributed, by a CUDA graph or by other libraries into the same memory:
    call :meth:`clear` after those. Copies and pickles begin empty.

    A CUDA graph reads the folded weights that it was captured with, which are kept for it as long as this object: after
    a change of the weights, capture anew.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._captured: list[_Kept] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldedWeights, ()

    def clear(self) -> None:
        """Forgets, and frees, all that is kept, but for what CUDA graphs read."""
        self._kept.clear()

    def layer(
        self, name: str, norm: tuple[Tensor, Tensor], linear: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> FoldedLinear | None:
        """:func:`fold_layer_norm` of these weights, kept under ``name``.

        None where changes of them could not be seen, or where a CUDA graph is being captured and nothing is kept.
        """
        sources = (*norm, *linear)
        kept = self._kept.get(name)
        if kept is None or not kept.is_of(sources, dtype):
            self._kept.pop(name, None)  # freed before the new one is made
            if not all(_can_watch(t) for t in sources) or _is_capturing(linear[0]):
                return None
            kept = self._kept[name] = _Kept(fold_layer_norm(*norm, *linear, dtype), sources)
        elif _is_capturing(linear[0]):
            if kept not in self._captured:
                self._captured.append(kept)
        else:
            kept.order_after_making()
        return kept.folded


def _has_kernels(tokens: Tensor) -> bool:
    # "host": the test build, whose CUDA kernels take CPU tensors.
    return (tokens.is_cuda or _C.cuda == "host") and tokens.dtype in (torch.bfloat16, torch.float16)


def runs_folded(tokens: Tensor, weights: Sequence[Tensor], dropout: bool) -> bool:
    """Whether connectors whose parameters are ``weights`` may read the raw tokens through the shuffled view.

    There is no gradient, no dropout and no cast of the tokens: under autocast they must be of its dtype already. Not
    under torch.compile either, which could not see that the weights had changed.
    """
    if torch.compiler.is_compiling() or dropout or not _has_kernels(tokens):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (tokens, *weights)):
        return False
    device = tokens.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == tokens.dtype


def first_layer(
    tokens: Tensor,
    folded: FoldedLinear,
    rate: int,
    *,
    eps: float,
    grid: tuple[int, int] | None,
    tile_index: Tensor | None,
    has_cls: bool,
    ps_version: str,
    rows: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu of the folded layer, and in the same launch gelu of a layer of ``rows``: x, weight, bias; or an empty one.

    Args:
        tokens: ``[P, 1 + N, V]``, or ``[P, N, V]``, in the dtype of ``folded.weight``.
        folded: with ``rate``^2 V input features.
        rate, eps, grid, tile_index, has_cls, ps_version: as in :func:`vico_ext.functional.normalized_shuffle`.
        rows: the other connector's layer.
    """
    size = _grid_of(tokens, grid, has_cls, rate)
    layout = (*size, rate, tile_index, int(has_cls), _is_transposed(ps_version))
    mean, rstd = call(torch.ops.vico.shuffle_statistics, tokens, eps, *layout)
    other = (None, None, None) if rows is None else rows
    return call(torch.ops.vico.shuffled_projection, tokens, mean, rstd, *folded, *layout, True, *other)
