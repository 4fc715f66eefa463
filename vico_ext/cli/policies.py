"""Policies in words: ``threshold:0.5``, ``released:0.3,0``, ``per-image:0.5,0``, ``budget:50%``, ``budget:2000tok``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vico_ext.cli.errors import CliError

__all__ = ["FORMS", "PolicySpec", "parse_policy"]

FORMS = """\
policies:
  threshold:T      compress a tile when its p is at least T; nothing else matters (the default, T = 0.5)
  per-image:R,A    compress when p is above the R-quantile of its own image's tiles, and at least A
  released:R,A     the same over all tiles of a call: exactly what the released models do
  budget:0.5       as few compressions as keep the visual tokens within 0.5 of all-256 (budget:50% is the same)
  budget:2000tok   as few compressions as keep a call within 2000 visual tokens
  R,A may be left out where the checkpoint's config.json has flash_relative_threshold and flash_absolute_threshold.
"""


@dataclass(frozen=True)
class PolicySpec:
    """A policy as asked for; :meth:`build` makes it, with the checkpoint's thresholds where none were given."""

    text: str
    kind: str
    values: tuple[float, ...]

    def build(self, config: Mapping[str, Any]) -> Any:
        """The vico_ext policy."""
        import vico_ext

        if self.kind == "threshold":
            return vico_ext.ThresholdPolicy(*self.values)
        if self.kind == "fraction":
            return vico_ext.BudgetPolicy(fraction=self.values[0])
        if self.kind == "tokens":
            return vico_ext.BudgetPolicy(max_tokens=int(self.values[0]))
        values = self.values or self._configured(config)
        policy = vico_ext.ReleasedPolicy if self.kind == "released" else vico_ext.PerImagePolicy
        return policy(*values)

    def _configured(self, config: Mapping[str, Any]) -> tuple[float, ...]:
        names = ("flash_relative_threshold", "flash_absolute_threshold")
        missing = [name for name in names if not isinstance(config.get(name), int | float)]
        if missing:
            raise CliError(f"policy '{self.text}' needs numbers ({self.text}:R,A): config.json lacks {missing[0]}")
        return tuple(float(config[name]) for name in names)


def parse_policy(text: str) -> PolicySpec:
    """A policy from its words, for argparse."""
    kind, _, rest = text.partition(":")
    if kind == "threshold":
        return PolicySpec(text, kind, _numbers(text, rest, (1,), top=1) or (0.5,))
    if kind in ("released", "per-image"):
        return PolicySpec(text, kind, _numbers(text, rest, (2,), top=1))
    if kind == "budget" and rest.endswith("tok"):
        (tokens,) = _numbers(text, rest.removesuffix("tok") or "?", (1,), top=math.inf)
        if tokens != int(tokens):
            raise argparse.ArgumentTypeError(f"'{text}': tokens must be a whole number")
        return PolicySpec(text, "tokens", (tokens,))
    if kind == "budget" and rest:
        percent = rest.endswith("%")
        (share,) = _numbers(text, rest.removesuffix("%") or "?", (1,), top=100 if percent else 1)
        return PolicySpec(text, "fraction", (share / 100 if percent else share,))
    raise argparse.ArgumentTypeError(
        f"'{text}' is no policy: use threshold:T, released:R,A, per-image:R,A, budget:0.5 or budget:2000tok"
    )


def _numbers(text: str, rest: str, counts: tuple[int, ...], top: float) -> tuple[float, ...]:
    if not rest:
        return ()
    try:
        values = tuple(float(part) for part in rest.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(0 <= value <= top and math.isfinite(value) for value in values):
        limit = f" from 0 to {top:g}" if math.isfinite(top) else " of at least 0"
        wanted = "one number" if counts == (1,) else "two numbers, separated by a comma, each"
        raise argparse.ArgumentTypeError(f"'{text}': expected {wanted}{limit}")
    return values
