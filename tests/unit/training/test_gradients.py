"""Gradient sums in buckets: the plain sums, reduced in one order on every rank while the last backward runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sftdist.core.distributed import World
from sftdist.training.gradients import GradientSums
from tests.ranks import run_ranks

NAMES = ("first", "second", "third", "fourth")


def model(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(6, 6, generator=generator).to(dtype)) for name in NAMES}


def loss(parameters: dict[str, nn.Parameter], seed: int, skipped: tuple[str, ...] = ()) -> Tensor:
    """A chain through all parameters but the skipped ones."""
    row = torch.randn(6, generator=torch.Generator().manual_seed(seed)).to(parameters["first"].dtype)
    for name, parameter in parameters.items():
        row = row if name in skipped else torch.tanh(parameter @ row)
    return row.float().square().sum()


@pytest.mark.parametrize("elements", [1, 80, 10**6])
def test_the_sums_of_one_process_are_exactly_those_of_autograd(elements: int) -> None:
    plain, summed = model(), model()
    sums = GradientSums(summed, World(0, 1, 0, torch.device("cpu")), elements)
    for _ in range(2):  # and a second step starts from nothing
        for seed, last in ((1, False), (2, False), (3, True)):
            loss(plain, seed, ("second",)).backward()
            sums.begin(last)
            loss(summed, seed, ("second",)).backward()
            sums.end()
        found = sums.finish()
        assert set(found) == set(NAMES)
        for name, parameter in plain.items():
            expected = torch.zeros(6, 6) if parameter.grad is None else parameter.grad
            assert torch.equal(found[name], expected)
            assert summed[name].grad is None
            parameter.grad = None
        sums.clear()


def test_gradients_in_low_precision_are_summed_in_float32() -> None:
    parameters = model(torch.bfloat16)
    sums = GradientSums(parameters, World(0, 1, 0, torch.device("cpu")))
    exact = torch.zeros(6, 6)
    for seed in range(8):
        sums.begin(last=seed == 7)
        total = loss(parameters, seed)
        exact += torch.autograd.grad(total, parameters["first"], retain_graph=True)[0].float()
        total.backward()
        sums.end()
    assert torch.equal(sums.finish()["first"], exact)


def test_a_micro_batch_after_the_last_one_is_an_error() -> None:
    parameters = model()
    sums = GradientSums(parameters, World(0, 1, 0, torch.device("cpu")))
    sums.begin(last=True)
    loss(parameters, 1).backward()
    sums.end()
    with pytest.raises(AssertionError, match="after the step's last one"):
        sums.begin(last=False)


def reduced(world: World, elements: int) -> tuple[list[list[int]], list[int]]:
    """The sums of a step in which the ranks reach different parameters, and how many reductions had begun when the
    backward came to its last parameter."""
    parameters = model()
    sums = GradientSums(parameters, world, elements)
    begun: list[int] = []
    reductions = 0
    original = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal reductions
        reductions += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    dist.all_reduce = counting
    parameters["first"].register_hook(lambda gradient: begun.append(reductions))
    found = []
    for step in range(3):
        for seed in range(2):
            sums.begin(last=seed == 1)
            # rank 1 does not reach the third parameter in the last backward of steps 0 and 1
            skipped = ("third",) if world.rank == 1 and seed == 1 and step < 2 else ()
            loss(parameters, 10 * step + 2 * seed + world.rank, skipped).backward()
            sums.end()
        values = sums.finish()
        found.append([round(float(values[name].sum()) * 1e4) for name in NAMES])
        sums.clear()
    return found, begun[1::2]


@pytest.mark.long
@pytest.mark.parametrize("elements", [36, 80])
def test_ranks_reduce_in_one_order_also_where_one_lacks_a_gradient(elements: int) -> None:
    (first, begun), (second, waited) = run_ranks(reduced, 2, elements)
    assert first == second
    assert begun[2] > 0  # all but the last bucket are under way before the backward ends
    assert waited[0] < begun[0]  # rank 1 waits with the third parameter's bucket, and with those behind it
    expected = []
    for step in range(3):
        parameters = model()
        for rank in range(2):
            for seed in range(2):
                skipped = ("third",) if rank == 1 and seed == 1 and step < 2 else ()
                loss(parameters, 10 * step + 2 * seed + rank, skipped).backward()
        grads = [parameters[name].grad for name in NAMES]
        expected.append([round(float(grad.sum()) * 1e4) for grad in grads if grad is not None])
    for ours, plain in zip(first, expected, strict=True):
        assert ours == pytest.approx(plain, abs=2)
