"""Loading a Flash checkpoint by transformers, whose model class does not know the tensors that ViCO adds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vico_ext.checkpoint.keys import FLASH_ONLY

__all__ = ["flash_tensors_expected"]

_ATTRIBUTE = "_keys_to_ignore_on_load_unexpected"  # where transformers, 4.57 and 5.x, looks for patterns of names

_lock = threading.Lock()
_loads: dict[type[Any], int] = {}  # by model class, how many loads are under way
_before: dict[type[Any], dict[str, Any]] = {}  # by model class, the attribute of its own, where it has one


@contextmanager
def flash_tensors_expected(model_class: type[Any]) -> Iterator[None]:
    """While this lasts, transformers does not report the second connector and the router as unexpected tensors.

    Other unexpected tensors, and missing ones, are reported as ever. Loads may overlap, in threads too: the first puts
    the pattern on the class, the last takes it away.

    Args:
        model_class: of transformers; is as it was afterwards.
    """
    with _lock:
        if not _loads.get(model_class):
            own = vars(model_class)
            _before[model_class] = {_ATTRIBUTE: own[_ATTRIBUTE]} if _ATTRIBUTE in own else {}
            setattr(model_class, _ATTRIBUTE, [*(getattr(model_class, _ATTRIBUTE, None) or []), FLASH_ONLY])
        _loads[model_class] = _loads.get(model_class, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _loads[model_class] -= 1
            if not _loads[model_class]:
                delattr(model_class, _ATTRIBUTE)
                for name, value in _before.pop(model_class).items():
                    setattr(model_class, name, value)
                del _loads[model_class]
