"""Counts what makes a program wait for its device: values that are read out of tensors, shapes that depend on values.

On a CPU nothing waits, but the same calls are made: they pass the dispatcher as one of few operators, or are methods
that read a tensor's memory.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1] / "sftdist"
# What `.item()`, `bool()`, `float()`, `int()` become, and the operators whose result has no size before it is there.
_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
_METHODS = ("tolist", "numpy")


class Reads(TorchDispatchMode):
    """`calls`: one line of the program for each read, the innermost of ours first: `loop.py:12 run`, or another's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def note(self) -> None:
        stack = [frame for frame in traceback.extract_stack() if not frame.filename.endswith("tests/reads.py")]
        outside = [frame for frame in stack if "/torch/" not in frame.filename]
        here = outside[-1]
        own = Path(here.filename).is_relative_to(ROOT)
        self.calls.append(f"{'' if own else 'foreign '}{here.filename.rpartition('/')[2]}:{here.lineno} {here.name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(_is_mask(index) for index in _indices(args))
        if name in _OPERATORS or by_mask:
            self.note()
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [call for call in self.calls if not call.startswith("foreign ")]


@contextmanager
def counted_reads() -> Iterator[Reads]:
    """Every read inside the block, this process and thread."""
    reads = Reads()
    with_methods = {name: getattr(torch.Tensor, name) for name in _METHODS}

    def noting(read: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            reads.note()
            return read(*args, **kwargs)

        return method

    try:
        for name, read in with_methods.items():
            setattr(torch.Tensor, name, noting(read))
        with reads:
            yield reads
    finally:
        for name, read in with_methods.items():
            setattr(torch.Tensor, name, read)


def _indices(args: Any) -> Any:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
