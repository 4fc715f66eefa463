"""How close is close: a ratio to torch's own error, not a wish."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in fp64; infinite where `got` is not finite."""
    assert got.shape == exact.shape, f"{tuple(got.shape)} is not {tuple(exact.shape)}"
    if not torch.isfinite(got).all():
        return float("inf")
    exact = exact.detach().double()
    got = got.detach()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_as_accurate(
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    ratio: float = 2.0,
    roundings: float = 1.0,
    terms: Tensor | None = None,
) -> None:
    """`got` is within `ratio` of the error that torch's own `eager` result has against `exact` (fp64).

    Where torch happens to be (nearly) exact, one rounding of the dtype is granted; more `roundings` for tensors of few
    elements, whose errors do not average out. Where sums may cancel, ``terms`` are the sums of their terms' magnitudes,
    of which two roundings of the sums' type are granted.
    """
    ours, torchs = relative_error(got, exact), relative_error(eager, exact)
    rounding = roundings * torch.finfo(got.dtype).eps / 2
    if terms is not None:
        sums = torch.float64 if got.dtype == torch.float64 else torch.float32
        rounding = max(rounding, 2 * torch.finfo(sums).eps * float(terms.double().norm() / exact.double().norm()))
    assert ours <= max(ratio * torchs, rounding), f"error {ours:.3e}, torch's own {torchs:.3e} in {got.dtype}"


def assert_rounded(got: Tensor, exact: Tensor, size: float = 16.0) -> None:
    """`got` is off `exact` (fp64) by a few roundings of values of ``size``, as sums of products of about 1 are."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=2 * eps, atol=size * eps)


def to_double(fn: Callable[..., Tensor], *args: object) -> Tensor:
    """fn on the same values in fp64."""
    return fn(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
