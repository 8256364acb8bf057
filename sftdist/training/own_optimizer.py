"""An optimizer of the user's own, by import path: made, and proven to be one that can be saved, resumed and parted.

It is called as `name(groups, lr=..., **optimizer.args)` and returns a `torch.optim.Optimizer`. Before it trains
anything it takes a few steps on a few thousand numbers, and what a checkpoint relies on is tried out there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sftdist.core.errors import ConfigError
from sftdist.core.extension import load_function, raised, require_call

KEY = "optimizer.name"
FORM = "a function or class (groups, lr=..., **optimizer.args) -> torch.optim.Optimizer"
SHAPES = ((96, 64), (40,))  # a matrix that decays, a vector that does not; some optimizers pack from 4,096 numbers on
STEPS, SAVED = 4, 2
RATE = 1e-2
PARTED_TOLERANCE = 1e-4  # of the norm of all updates together; vectorised code rounds the ends of a tensor differently
STEP = "step"


@runtime_checkable
class PackedState(Protocol):
    """An optimizer that keeps its state in a form of its own gives it as float32 tensors of the parameter's shape.

    What was read must be there again, bit by bit, when it is written.
    """

    moments: Sequence[str]

    def read_moment(self, parameter: Tensor, name: str) -> Tensor: ...

    def write_moment(self, parameter: Tensor, name: str, value: Tensor) -> None: ...


@dataclass(frozen=True)
class Traits:
    """`moments`: the names of its state, tensors of the parameter's shape. `whole_only`: why it cannot work on parts of
    a parameter, as ZeRO 1-3 would have it; "" where it can."""

    moments: tuple[str, ...]
    whole_only: str


def make(path: str, groups: list[dict[str, Any]], lr: float, args: Mapping[str, Any]) -> Optimizer:
    """The optimizer over parameter groups. Raises ConfigError for whatever it is not, or raises itself."""
    factory = require_call(load_function(path, KEY), path, KEY, FORM, groups, lr=lr, **args)
    try:
        made = factory(groups, lr=lr, **args)
    except Exception as problem:  # whatever the user's code raises
        raise ConfigError(f"{KEY}: {path} raised {raised(problem)}; required {FORM}") from problem
    if not isinstance(made, Optimizer):
        raise ConfigError(f"{KEY}: {path} returned {type(made).__name__}, required a torch.optim.Optimizer")
    return made


def read_moment(optimizer: Optimizer, parameter: Tensor, name: str) -> Tensor:
    """One moment of a parameter, float32 of its shape."""
    if isinstance(optimizer, PackedState):
        return optimizer.read_moment(parameter, name)
    found: Tensor = optimizer.state[parameter][name]
    return found


@torch.no_grad()
def write_moment(optimizer: Optimizer, parameter: Tensor, name: str, value: Tensor) -> None:
    """Put a moment back."""
    if isinstance(optimizer, PackedState):
        optimizer.write_moment(parameter, name, value)
    else:
        optimizer.state[parameter][name].copy_(value)


def set_updates(states: Iterable[dict[str, Any]], updates: int) -> None:
    """The count of updates, where an optimizer keeps one beside each parameter's moments: a tensor or a number."""
    for state in states:
        count = state.get(STEP)
        if isinstance(count, Tensor):
            count.fill_(updates)
        elif count is not None:
            state[STEP] = type(count)(updates)


@contextmanager
def without_decay(optimizer: Optimizer) -> Iterator[None]:
    """Inside, no weight decay: an update that only makes the state would else leave it in the moments, where an
    optimizer (SGD, unlike AdamW) adds it to the gradient."""
    before = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, before, strict=True):
            group["weight_decay"] = decay


def traits(path: str, lr: float, weight_decay: float, args: Mapping[str, Any]) -> Traits:
    """What a few steps show of an optimizer; the random state is as before afterwards.

    Raises ConfigError where it does not train the same after its state was saved and put back.
    """
    return _traits(path, lr, weight_decay, json.dumps(args, sort_keys=True))


@lru_cache
def _traits(path: str, lr: float, weight_decay: float, args: str) -> Traits:
    trial = _Trial(path, lr, weight_decay, json.loads(args))
    with torch.random.fork_rng(devices=[]):
        try:
            return trial.traits()
        except ConfigError:
            raise
        except Exception as problem:  # whatever the user's code raises
            raise ConfigError(
                f"{KEY}: {path} raised {raised(problem)}; required one that takes a few steps on small float32 tensors "
                "on the CPU, where it is tried out before the training"
            ) from problem


class _Trial:
    """A matrix and a vector under the optimizer, with the same gradients in every attempt."""

    def __init__(self, path: str, lr: float, weight_decay: float, args: Mapping[str, Any]) -> None:
        self._path, self._lr, self._decay, self._args = path, lr, weight_decay, args

    def traits(self) -> Traits:
        whole = self._optimizer(self._start())
        moments = self._stepped(whole, 0, SAVED)
        if moments != (others := _moments(whole, _all(whole)[1])):
            kept = [", ".join(names) or "nothing" for names in (moments, others)]
            raise self._refused(f"it keeps {kept[0]} for a matrix and {kept[1]} for a vector")
        saved = [
            (p.detach().clone(), {name: read_moment(whole, p, name).clone() for name in moments}) for p in _all(whole)
        ]
        for parameter, (value, state) in zip(_all(whole), saved, strict=True):
            for name, moment in state.items():
                if moment.shape != value.shape or moment.dtype != torch.float32:
                    raise self._refused(
                        f"its {name} is {moment.dtype} {list(moment.shape)} for a parameter {list(parameter.shape)}"
                    )
        self._stepped(whole, SAVED, STEPS)
        end = [p.detach().clone() for p in _all(whole)]
        self._require_no_trace(moments, end)
        self._require_resume(moments, saved, end)
        return Traits(moments, self._parted(whole, end))

    def _require_no_trace(self, moments: tuple[str, ...], end: list[Tensor]) -> None:
        """The state is made by an update with a zero gradient at rate 0, which must not count."""
        again = self._optimizer(self._start())
        self._begin(again)
        self._stepped(again, 0, STEPS)
        if not _equal(_all(again), end):
            kept = _kept(again, moments)
            raise self._refused(f"an update with zero gradients at rate 0, without decay, changes what follows{kept}")

    def _require_resume(
        self, moments: tuple[str, ...], saved: list[tuple[Tensor, dict[str, Tensor]]], end: list[Tensor]
    ) -> None:
        resumed = self._optimizer(self._start())
        self._begin(resumed)
        for parameter, (value, state) in zip(_all(resumed), saved, strict=True):
            parameter.data.copy_(value)
            for name, moment in state.items():
                write_moment(resumed, parameter, name, moment)
        set_updates(resumed.state.values(), SAVED)
        self._stepped(resumed, SAVED, STEPS)
        if not _equal(_all(resumed), end):
            named = ", ".join([*moments, "the count of updates"])
            raise self._refused(f"it does not go on the same after {named} were put back{_kept(resumed, moments)}")

    def _parted(self, whole: Optimizer, end: list[Tensor]) -> str:
        """Two halves of each flattened group, each with an optimizer of its own, as on two ranks of ZeRO 1-3."""
        if isinstance(whole, PackedState):
            return "it keeps its state in a form of its own"
        halves: list[list[Tensor]] = []
        for half in range(2):
            optimizer = self._optimizer(self._start())
            for group in optimizer.param_groups:
                flat = torch.cat([p.detach().flatten() for p in group["params"]])
                group["params"] = [nn.Parameter(flat.chunk(2)[half].clone())]
            try:
                self._stepped(optimizer, 0, STEPS, half)
            except Exception as problem:  # the user's code: this too is an answer
                return f"it raised {raised(problem)} when it was given parts of parameters"
            halves.append([p.detach() for p in _all(optimizer)])
        parted = torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)])
        together, start = (torch.cat([p.detach().flatten() for p in tensors]) for tensors in (end, self._start()))
        distance = float((parted - together).norm() / (together - start).norm().clamp_min(1e-30))
        if distance > PARTED_TOLERANCE:
            return f"its updates of the parts of a parameter are not those of the whole ({distance:.1%} off)"
        return ""

    def _start(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        return [nn.Parameter(0.02 * torch.randn(shape, generator=draw)) for shape in SHAPES]

    def _optimizer(self, parameters: list[Tensor]) -> Optimizer:
        decays = (self._decay, 0.0)
        groups = [
            {"params": [parameter], "weight_decay": decay} for parameter, decay in zip(parameters, decays, strict=True)
        ]
        return make(self._path, groups, self._lr, self._args)

    def _begin(self, optimizer: Optimizer) -> None:
        """As the engine makes the state: an update of nothing, which is not counted."""
        for parameter in _all(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        _at_rate(optimizer, 0.0)
        with without_decay(optimizer):
            optimizer.step()
        set_updates(optimizer.state.values(), 0)

    def _stepped(self, optimizer: Optimizer, first: int, last: int, half: int | None = None) -> tuple[str, ...]:
        """Take these steps; the names of the moments that the first parameter then has. `half`: of each gradient."""
        for step in range(first, last):
            torch.manual_seed(step)  # what it draws itself
            draw = torch.Generator().manual_seed(1000 + step)
            for parameter, shape in zip(_all(optimizer), SHAPES, strict=True):
                gradient = torch.randn(shape, generator=draw) * torch.logspace(-4, 0, shape[-1])
                if half is not None:
                    gradient = gradient.flatten().chunk(2)[half]
                parameter.grad = gradient.clone()
            _at_rate(optimizer, RATE)
            optimizer.step()
        return _moments(optimizer, _all(optimizer)[0])

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"{KEY}: {self._path} cannot be resumed exactly: {why}; required a state of float32 tensors of each "
            "parameter's shape, beside `step`, or `moments`, `read_moment` and `write_moment` (docs/extending.md)"
        )


def _moments(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """The names of the moments of one parameter."""
    if isinstance(optimizer, PackedState):
        return tuple(optimizer.moments)
    state = optimizer.state[parameter]
    return tuple(key for key, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape)


def _kept(optimizer: Optimizer, moments: tuple[str, ...]) -> str:
    """What else it keeps beside a parameter's moments, which no checkpoint would hold."""
    beside = sorted(str(name) for name in optimizer.state[_all(optimizer)[0]] if name not in (*moments, STEP))
    return f" (beside them it keeps {', '.join(beside)})" if beside else ""


def _all(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _at_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one.detach(), other) for one, other in zip(some, others, strict=True))
