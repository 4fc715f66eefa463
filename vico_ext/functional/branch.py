"""Two chains of kernels that do not need each other, side by side in a CUDA graph."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Branch"]


class Branch:
    """Work that a CUDA graph may run beside what comes after it, until :meth:`join`.

    Only while a graph is captured and no gradient recorded: a stream costs nothing there, and kernels that wait for
    memory run beside matrix products of the other chain. Elsewhere the work simply comes first: changing streams would
    take the host as long as it saves the device.

        with Branch(x) as branch:
            a = ...
        b = ...
        branch.join(a)
    """

    # One for each device: a stream of torch's pool might be in use, and every stream keeps memory of its own.
    _side: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, like: Tensor) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._context: torch.cuda.StreamContext | None = None
        if torch.compiler.is_compiling() or not like.is_cuda or torch.is_grad_enabled():
            return
        main = torch.cuda.current_stream(like.device)
        with torch.cuda.stream(main):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            if like.device not in self._side:
                self._side[like.device] = torch.cuda.Stream(like.device)
            self._streams = main, self._side[like.device]

    def __enter__(self) -> Branch:
        if self._streams is not None:
            main, side = self._streams
            side.wait_stream(main)
            self._context = torch.cuda.stream(side)
            self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, traceback)
            self._context = None
        if kind is not None:
            self.join()  # or the end of the capture would fail too, and hide this error

    def join(self, *results: Tensor) -> None:
        """What comes after this may use ``results``, which the branch has made."""
        if self._streams is None:
            return
        main, side = self._streams
        main.wait_stream(side)
        for t in results:
            t.record_stream(main)  # its memory is the other stream's until that has read it
