"""The float32 gradient sums of a step in flat buckets, reduced over the ranks while the last backward still runs.

A bucket's sums are views of one tensor, so that a reduction copies nothing. Buckets are formed in the order in which a
backward reaches the parameters, and every rank reduces them in that one order, also where a parameter gets no gradient
on one rank: a bucket waits for those before it, and what is not complete at the end of the backward follows then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sftdist.core.distributed import World
from sftdist.model.buckets import BUCKET_ELEMENTS


class Bucket:
    """Parameters whose sums are reduced together. `flat`: there from a step's first gradient on."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat: Tensor | None = None
        self.sums: dict[str, Tensor] = {}  # views of `flat`
        self.unset: set[str] = set()  # sums without a gradient so far
        self.missing: set[str] = set()  # not reached yet by the last backward
        self.reduction: dist.Work | None = None
        self.is_reduced = False

    def open(self, device: torch.device) -> None:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.flat = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        views = zip(self.parameters.items(), self.flat.split(sizes), strict=True)
        self.sums = {name: part.view(parameter.shape) for (name, parameter), part in views}
        self.unset = set(self.sums)

    def add(self, name: str, gradient: Tensor) -> None:
        if self.flat is None:
            self.open(gradient.device)
        if name in self.unset:
            self.sums[name].copy_(gradient)
            self.unset.remove(name)
        else:
            self.sums[name] += gradient
        self.missing.discard(name)

    def complete(self, device: torch.device) -> Tensor:
        """All sums as one tensor; zero for a parameter without a gradient."""
        if self.flat is None:
            self.open(device)
        assert self.flat is not None
        for name in self.unset:
            self.sums[name].zero_()
        return self.flat

    def close(self) -> None:
        """Forget the sums. A GPU's memory goes back to its allocator, which has it at hand again; the pages of a host
        would be made anew in every step, at more cost than the sums themselves."""
        self.reduction, self.is_reduced = None, False
        self.unset = set(self.sums)
        if self.flat is not None and self.flat.device.type == "cuda":
            self.release()

    def release(self) -> None:
        self.flat = None
        self.sums.clear()


class GradientSums:
    """Takes the gradient of every trainable parameter as soon as it is there, and frees it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, elements: int = BUCKET_ELEMENTS) -> None:
        self._world = world
        self._buckets = [Bucket(dict(members)) for members in _in_buckets(parameters, elements)]
        self._is_last = False
        self._next = 0  # of the buckets, to be reduced
        for bucket in self._buckets:
            for name, parameter in bucket.parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._add, bucket, name))

    @property
    def is_reduced(self) -> bool:
        return self._next == len(self._buckets)

    def begin(self, last: bool) -> None:
        """Before a backward. `last`: the sums are complete when it ends, so each bucket is reduced as it is filled."""
        assert not self.is_reduced, "a micro-batch after the step's last one"
        self._is_last = last
        for bucket in self._buckets:
            bucket.missing = set(bucket.parameters)

    def end(self) -> None:
        """After a backward: reduce what it has not reached."""
        if self._is_last:
            self._reduce(only_complete=False)

    def finish(self) -> dict[str, Tensor]:
        """The sums over all micro-batches and ranks, by name; zero for a parameter without a gradient."""
        self._reduce(only_complete=False)
        for bucket in self._buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
                bucket.reduction = None
        return {name: total for bucket in self._buckets for name, total in bucket.sums.items()}

    def clear(self) -> None:
        """After an update: the next step begins with nothing."""
        self._next = 0
        for bucket in self._buckets:
            bucket.close()

    def release(self) -> None:
        """Give the memory back; nothing is summed afterwards."""
        for bucket in self._buckets:
            bucket.release()

    def _add(self, bucket: Bucket, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if bucket.is_reduced:
            raise RuntimeError(f"{name} got a second gradient from one backward, after its reduction")
        bucket.add(name, gradient)
        parameter.grad = None
        if self._is_last:
            self._reduce(only_complete=True)

    def _reduce(self, *, only_complete: bool) -> None:
        while not self.is_reduced:
            bucket = self._buckets[self._next]
            if only_complete and bucket.missing:
                return
            flat = bucket.complete(self._world.device)
            if self._world.size > 1:
                bucket.reduction = dist.all_reduce(flat, group=self._world.group, async_op=True)
            bucket.is_reduced = True
            self._next += 1


def _in_buckets(parameters: Mapping[str, nn.Parameter], elements: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Neighbours of together at most `elements`, or one larger parameter alone; the last of the model come first."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in reversed(list(parameters.items())):
        if bucket and size + parameter.numel() > elements:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += parameter.numel()
    if bucket:
        yield bucket
