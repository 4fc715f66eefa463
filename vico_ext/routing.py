"""Routing: from per-tile probabilities to a plan of which tiles are compressed and where their tokens go.

A policy decides, :func:`plan_routing` checks and lays out, a :class:`RoutingPlan` is what the rest works from.
Symbols: P tiles, T packed visual tokens.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vico_ext import functional
from vico_ext.functional.sync import size_on_host

__all__ = [
    "BudgetPolicy",
    "PerImagePolicy",
    "ReleasedPolicy",
    "RoutingPlan",
    "RoutingPolicy",
    "ThresholdPolicy",
    "decide",
    "plan_routing",
]


def _checked_tokens(tokens: Sequence[int]) -> tuple[int, int]:
    if not isinstance(tokens, (tuple, list)):
        raise TypeError(f"tokens must be two numbers, of a whole and of a compressed tile, got {tokens!r}")
    if len(tokens) != 2:
        raise ValueError(f"tokens must be two numbers, of a whole and of a compressed tile, got {tuple(tokens)}")
    try:
        full, compressed = (cast(int, n) if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in tokens)
    except TypeError as error:
        raise TypeError(f"tokens must be whole numbers, got {tuple(tokens)}") from error
    if not full > compressed > 0:
        raise ValueError(f"tokens must be (full, compressed) with full > compressed > 0, got {tuple(tokens)}")
    return full, compressed


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got NaN")


def _check_share(value: Any, name: str) -> None:
    """A number in [0, 1]."""
    _check_number(value, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Which tiles are compressed, and where each tile's tokens go in the packed order.

    Made by :func:`plan_routing` or :meth:`from_compress`. A pytree, so that it passes through torch.compile and
    torch.export; deepcopy and pickle work.

    Attributes:
        compress: ``[P]`` bool, True where a tile gets the smaller number of tokens.
        cu_tokens: ``[P + 1]`` int64 offsets: tile t owns packed rows cu_tokens[t] .. cu_tokens[t + 1].
        order: ``[P]`` int64, the tiles that stay whole, ascending, then those that are compressed, ascending.
        compressed_tiles: how many tiles are compressed.
        tokens: visual tokens of a whole and of a compressed tile.
    """

    compress: Tensor
    cu_tokens: Tensor
    order: Tensor
    compressed_tiles: int
    tokens: tuple[int, int] = (256, 64)

    @classmethod
    def from_compress(
        cls, compress: Tensor, tokens: tuple[int, int] = (256, 64), *, compressed_tiles: int | None = None
    ) -> RoutingPlan:
        """The plan of a given decision.

        Args:
            compress: ``[P]`` bool.
            tokens: visual tokens of a whole and of a compressed tile.
            compressed_tiles: how many entries of ``compress`` are True, where that is known; counting them is a host
                sync on an accelerator.

        Raises:
            ValueError: ``compress`` is not of rank 1, or ``tokens`` are not two positive numbers, the larger one first.
            RuntimeError: ``compress`` is not bool.
        """
        tokens = _checked_tokens(tokens)
        if compress.dim() != 1:
            raise ValueError(f"compress must have shape [tiles], got {list(compress.shape)}")
        cu_tokens, order = functional.plan_tokens(compress, *tokens)
        if compressed_tiles is None:
            compressed_tiles = cls._count(compress, cu_tokens, tokens)
        return cls(compress, cu_tokens, order, compressed_tiles, tokens)

    @staticmethod
    def _count(compress: Tensor, cu_tokens: Tensor, tokens: tuple[int, int]) -> int:
        if torch.compiler.is_compiling():  # a number that torch is to reason about: with no arithmetic in it
            return size_on_host(compress.sum())
        # The last offset has it already: no kernel more before the host waits.
        full, compressed = tokens
        return (compress.shape[0] * full - size_on_host(cu_tokens[-1])) // (full - compressed)

    @property
    def tiles(self) -> int:
        """Number of tiles P."""
        return self.compress.shape[0]

    @property
    def full_tiles(self) -> int:
        """Number of tiles that stay whole."""
        return self.tiles - self.compressed_tiles

    @property
    def total_tokens(self) -> int:
        """Number of packed visual tokens T."""
        return self.full_tiles * self.tokens[0] + self.compressed_tiles * self.tokens[1]

    @property
    def kept_share(self) -> float:
        """T as a share of the tokens that all tiles would have uncompressed; 1 where there are no tiles."""
        return self.total_tokens / (self.tiles * self.tokens[0]) if self.tiles else 1.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RoutingPlan:
        """The plan with its tensors on `device`."""
        moved = (t.to(device, non_blocking=non_blocking) for t in (self.compress, self.cu_tokens, self.order))
        compress, cu_tokens, order = moved
        return replace(self, compress=compress, cu_tokens=cu_tokens, order=order)


# NOTE: compressed_tiles before compress: torch.export's guards take a field for another whose name begins alike.
pytree.register_dataclass(
    RoutingPlan,
    field_names=["compressed_tiles", "compress", "cu_tokens", "order", "tokens"],
    serialized_type_name="vico_ext.RoutingPlan",
)
torch.serialization.add_safe_globals([RoutingPlan])  # torch.load and torch.export.load without pickle's arbitrary code


class RoutingPolicy(ABC):
    """Decides which tiles are compressed. Subclass it to bring a rule of your own.

    Attributes:
        uses_images: whether :meth:`compress` looks at ``tiles_per_image``; where not, it gets None, and nothing is sent
            to the device. Of this package's policies :class:`PerImagePolicy` alone does.
    """

    uses_images: ClassVar[bool] = True

    @abstractmethod
    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        """The tiles to compress.

        Args:
            p: ``[P]`` float32 or float64 in [0, 1]: the probability that the smaller number of tokens is enough.
            tiles_per_image: ``[images]`` int64 with sum P on the device of ``p``, or None where images are not known or
                not used.
            tokens: visual tokens of a whole and of a compressed tile.

        Returns:
            ``[P]`` bool on the device of ``p``.
        """

    def compressed_tiles(self, tiles: int, tokens: tuple[int, int]) -> int | None:
        """How many of `tiles` tiles are compressed, where that does not depend on ``p``: it saves a host sync."""
        return None


@dataclass(frozen=True)
class ReleasedPolicy(RoutingPolicy):
    """The released models' rule: p > quantile(p, relative) and p >= absolute, the quantile over all tiles of the call.

    What else is in the call changes a tile's decision, and a single tile is never compressed; :class:`ThresholdPolicy`
    and :class:`BudgetPolicy` have neither property, :class:`PerImagePolicy` not the first.

    Attributes:
        relative: ``flash_relative_threshold`` of the checkpoint's configuration, in [0, 1].
        absolute: its ``flash_absolute_threshold``.
    """

    relative: float
    absolute: float
    uses_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share(self.relative, "relative")
        _check_number(self.absolute, "absolute")

    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        return functional.released_route(p, self.relative, self.absolute)


@dataclass(frozen=True)
class PerImagePolicy(ReleasedPolicy):
    """The released rule within each image: what else is in the call changes nothing.

    Needs ``tiles_per_image``. An image of one tile is never compressed.
    """

    uses_images: ClassVar[bool] = True

    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        if tiles_per_image is None:
            raise ValueError("PerImagePolicy needs tiles_per_image, the number of tiles of each image, got None")
        return functional.released_route(p, self.relative, self.absolute, tiles_per_image=tiles_per_image)


@dataclass(frozen=True)
class ThresholdPolicy(RoutingPolicy):
    """Compress iff p >= threshold: each tile is decided by itself.

    Attributes:
        threshold: above 1 nothing is compressed, at 0 and below everything: then the count needs no host sync.
    """

    threshold: float = 0.5
    uses_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_number(self.threshold, "threshold")

    def compressed_tiles(self, tiles: int, tokens: tuple[int, int]) -> int | None:
        if self.threshold > 1:
            return 0
        return tiles if self.threshold <= 0 else None

    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        # Compared in the dtype of p, in which a threshold just above 1 is 1.
        return torch.zeros_like(p, dtype=torch.bool) if self.threshold > 1 else p >= self.threshold


@dataclass(frozen=True)
class BudgetPolicy(RoutingPolicy):
    """The fewest compressions that keep the call's visual tokens within a budget, highest p first.

    Equal p go by the lower tile index. How many tiles are compressed is known without looking at p: no host sync.

    Attributes:
        max_tokens: most visual tokens T of the call, or
        fraction: the same as a share of the uncompressed tokens: floor(fraction * P * full), where what float64 cannot
            hold of a fraction such as 0.7 costs no tile. Exactly one is given.

    Raises (when a plan is made):
        ValueError: even with all tiles compressed the budget does not hold.
    """

    max_tokens: int | None = None
    fraction: float | None = None
    uses_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.max_tokens is None) == (self.fraction is None):
            raise ValueError(
                f"BudgetPolicy takes exactly one of max_tokens and fraction, got max_tokens={self.max_tokens}, "
                f"fraction={self.fraction}"
            )
        if self.fraction is not None:
            _check_share(self.fraction, "fraction")
        elif isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int):
            raise TypeError(f"max_tokens must be an int, got {type(self.max_tokens).__name__}")
        elif self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")

    def compressed_tiles(self, tiles: int, tokens: tuple[int, int]) -> int:
        full, compressed = tokens
        # 0.7 of 45 tiles are 8064 tokens, but 0.7 * 11520 is 8063.999...: rounded up by more than fraction and product
        # can be too small.
        share = (1.0 if self.fraction is None else self.fraction) * (1 + 2**-51)
        budget = math.floor(share * (tiles * full)) if self.max_tokens is None else self.max_tokens
        if tiles * compressed > budget:
            raise ValueError(
                f"the budget of {budget} tokens cannot be met: {tiles} tiles need at least {tiles} x {compressed} = "
                f"{tiles * compressed} tokens (uncompressed {tiles * full})"
            )
        return max(0, -((budget - tiles * full) // (full - compressed)))

    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        return functional.budget_route(p, self.compressed_tiles(p.shape[0], tokens))


def _check_policy(policy: Any) -> None:
    if not isinstance(policy, RoutingPolicy):
        hint = " (an instance is wanted, not the class)" if isinstance(policy, type) else ""
        raise TypeError(f"policy must be a RoutingPolicy such as ThresholdPolicy(), got {policy!r}{hint}")


def _check_vector(p: Tensor) -> None:
    if p.dim() != 1 or not p.is_floating_point():
        raise ValueError(f"p must be a floating tensor of shape [tiles], got {p.dtype} of shape {list(p.shape)}")


def _checked_images(tiles_per_image: Sequence[int] | Tensor, tiles: int) -> Tensor:
    """tiles_per_image [images] int64, checked; but its values only where reading them does not wait for a device."""
    if isinstance(tiles_per_image, Tensor):
        if tiles_per_image.dim() != 1 or tiles_per_image.is_floating_point() or tiles_per_image.dtype == torch.bool:
            raise ValueError(
                f"tiles_per_image must be a list of ints or an int tensor [images], got {tiles_per_image.dtype} of "
                f"shape {list(tiles_per_image.shape)}"
            )
        if tiles_per_image.device.type != "cpu":
            return tiles_per_image.long()
        images = tiles_per_image.tolist()
    else:
        try:
            images = list(map(operator.index, tiles_per_image))
        except TypeError as error:
            raise TypeError(
                f"tiles_per_image must be a list of ints or an int tensor [images], got {tiles_per_image!r}"
            ) from error
    if images and min(images) < 0:
        raise ValueError(f"tiles_per_image must not be negative, got {images}")
    if sum(images) != tiles:
        raise ValueError(f"tiles_per_image must add up to the {tiles} tiles of p, got {images} = {sum(images)} tiles")
    return torch.tensor(images, dtype=torch.int64, device="cpu")  # whatever the default device, as they came


def _to_device(images: Tensor, device: torch.device) -> Tensor:
    # NOTE: from pinned memory, because a copy from anywhere else makes the host wait for all that the device has to do.
    if images.device.type == "cpu" and device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=device.type != "cpu")


def plan_routing(
    p: Tensor,
    policy: RoutingPolicy,
    *,
    tiles_per_image: Sequence[int] | Tensor | None = None,
    tokens: tuple[int, int] = (256, 64),
) -> RoutingPlan:
    """Decides which tiles are compressed, and lays out the packed tokens.

    Not differentiable: ``p`` is detached. On an accelerator the one host sync is the count of compressed tiles.
    Policies that know it need none, and can be captured in a CUDA graph: :class:`BudgetPolicy`, and a
    :class:`ThresholdPolicy` that compresses all or nothing. Values on an accelerator are checked there, by the kernels
    that use them: what is raised on the CPU for a bad probability or ``tiles_per_image`` then ends the kernel, and
    surfaces as a CUDA error at the next call that waits for the device.

    Args:
        p: ``[P]``, any floating dtype: the probability of each tile that the smaller number of tokens is enough. 16-bit
            probabilities are taken to float32.
        policy: the rule.
        tiles_per_image: ``[images]``, how many of the P tiles belong to each image, in order; some policies need it. A
            list, or a tensor on the CPU or on the device of ``p``.
        tokens: visual tokens of a whole and of a compressed tile.

    Raises:
        TypeError: ``policy`` is not a policy, or an argument is not a number where one is needed.
        ValueError: ``p`` is not a floating vector, ``tiles_per_image`` does not add up to P, ``tokens`` are not two
            positive numbers, the larger first, the policy's mask is not [P] bool, or its budget cannot be met.
        RuntimeError: a probability is NaN or outside [0, 1]; the message names the first such tile.
    """
    _check_policy(policy)
    if not isinstance(p, Tensor):
        raise TypeError(f"p must be a tensor of shape [tiles], got {type(p).__name__}")
    _check_vector(p)
    tokens = _checked_tokens(tokens)
    tiles = p.shape[0]
    images = None if tiles_per_image is None else _checked_images(tiles_per_image, tiles)
    images = _to_device(images, p.device) if images is not None and policy.uses_images else None
    compress = decide(p, policy, images, tokens)
    return RoutingPlan.from_compress(compress, tokens, compressed_tiles=policy.compressed_tiles(tiles, tokens))


def decide(p: Tensor, policy: RoutingPolicy, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
    """The policy's decision ``[P]`` bool, checked; unlike :func:`plan_routing` without any host sync.

    Args:
        p: ``[P]``, any floating dtype.
        policy: the rule.
        tiles_per_image: ``[images]`` int64 with sum P on the device of ``p``, images without tiles among them or not.
        tokens: visual tokens of a whole and of a compressed tile.
    """
    _check_policy(policy)
    _check_vector(p)
    compress = policy.compress(functional.checked_probabilities(p), tiles_per_image, tokens)
    if not isinstance(compress, Tensor) or compress.dtype != torch.bool or compress.shape != p.shape:
        got = f"{compress.dtype} of shape {list(compress.shape)}" if isinstance(compress, Tensor) else repr(compress)
        raise ValueError(
            f"{type(policy).__name__}.compress must return a bool tensor of shape [{p.shape[0]}], got {got}"
        )
    return compress
