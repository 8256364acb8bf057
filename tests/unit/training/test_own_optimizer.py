"""An optimizer of the user's own is one that resumes exactly, or it is refused before it trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError
from sftdist.core.settings import OptimizerSettings
from sftdist.examples.adam8bit import BLOCK, Adam8bit
from sftdist.training.optimizer import OptimizerSpec, stage_issues
from sftdist.training.own_optimizer import Traits, traits
from tests.training_cases import Case, make_engine, packs_of, train_step, weights_of

ALONE = World(0, 1, 0, torch.device("cpu"))
EIGHT = "sftdist.examples.adam8bit:Adam8bit"
OWN = """
import torch
from torch.optim import Adamax, Optimizer


class Base(Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("average", torch.zeros_like(parameter))
                self.one(parameter, state, group["lr"])


class Good(Base):
    def one(self, parameter, state, lr):
        state["step"] = state.get("step", 0) + 1
        state["average"].lerp_(parameter.grad, 0.1)
        parameter.sub_(state["average"], alpha=lr / state["step"])


class Counts(Base):
    def one(self, parameter, state, lr):
        state["seen"] = state.get("seen", 0) + (parameter.grad.abs().sum() > 0).item()
        state["average"].lerp_(parameter.grad, 0.1)
        parameter.sub_(state["average"], alpha=lr / max(1, state["seen"]))


class Grows(Base):
    def one(self, parameter, state, lr):
        state["average"].add_(1.0)
        parameter.sub_(state["average"] * parameter.grad, alpha=lr)


class Norms(Base):
    def one(self, parameter, state, lr):
        state["average"].lerp_(parameter.grad, 0.1)
        parameter.sub_(state["average"] / (1e-9 + state["average"].norm()), alpha=lr)


class Half(Base):
    def one(self, parameter, state, lr):
        state["average"] = (0.9 * state["average"] + parameter.grad).half()
        parameter.sub_(state["average"].float(), alpha=lr)


class Matrices(Base):
    def one(self, parameter, state, lr):
        if parameter.ndim == 1:
            del state["average"]
        parameter.sub_(parameter.grad, alpha=lr)


class Raises(Base):
    def one(self, parameter, state, lr):
        raise RuntimeError("only on a Tuesday")


def none(groups, lr):
    return object()


def no_rate(groups):
    return Adamax(groups)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_optimizers.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_optimizers", None)


def found(name: str, weight_decay: float = 0.0, **args: Any) -> Traits:
    return traits(name if ":" in name else f"own_optimizers:{name}", 1e-3, weight_decay, args)


@pytest.mark.parametrize(
    ("name", "decay", "args", "moments"),
    [
        ("Good", 0.1, {}, ("average",)),
        ("torch.optim:Adamax", 0.1, {}, ("exp_avg", "exp_inf")),
        ("torch.optim:RMSprop", 0.1, {"momentum": 0.9}, ("square_avg", "momentum_buffer")),  # decays into its moments
        ("torch.optim:SGD", 0.1, {}, ()),
    ],
)
def test_one_that_resumes_and_can_be_parted(name: str, decay: float, args: Any, moments: tuple[str, ...]) -> None:
    assert found(name, decay, **args) == Traits(moments, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Counts", r"does not go on the same after average, the count of updates were put back \(.* keeps seen\)"),
        ("Grows", "an update with zero gradients at rate 0, without decay, changes what follows"),
        ("Half", r"its average is torch.float16 \[96, 64\] for a parameter \[96, 64\]"),
        ("Matrices", "it keeps average for a matrix and nothing for a vector"),
        ("Raises", r"raised RuntimeError: only on a Tuesday \(own_optimizers.py, line 60\); required one that takes"),
        ("none", "returned object, required a torch.optim.Optimizer"),
        ("no_rate", r"required a function or class \(groups, lr=.*unexpected keyword argument 'lr'"),
        ("torch.optim:NAdam", "beside them it keeps mu_product"),
    ],
)
def test_one_that_does_not_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        found(name)
    assert str(refused.value).startswith("optimizer.name: ")


def test_one_that_needs_whole_parameters_is_for_stage_0() -> None:
    spec = OptimizerSpec(name="own_optimizers:Norms", lr=1e-3)
    assert "not those of the whole" in spec.whole_only
    assert stage_issues(spec, 0) == []
    (issue,) = stage_issues(spec, 2)
    assert issue.startswith("optimizer.name=own_optimizers:Norms with zero.stage=2: its updates of the parts")
    assert issue.endswith("set zero.stage=0")
    with pytest.raises(ConfigError, match=r"with zero.stage=1: it keeps its state in a form of its own"):
        make_engine(Case(1, optimizer=OptimizerSpec(name=EIGHT, lr=1e-3)), ALONE)


def test_the_trial_leaves_no_trace_in_the_random_state() -> None:
    before = torch.get_rng_state()
    traits("torch.optim:Adamax", 3e-3, 0.25, {})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_groups_and_the_rate_arrive() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    spec = OptimizerSpec(name="torch.optim:Adamax", weight_decay=0.3, lr=0.5, args={"eps": 1e-4})
    made = spec.build([(weights[0], True), (weights[1], False)])
    assert [(group["weight_decay"], group["lr"], group["eps"]) for group in made.param_groups] == [
        (0.3, 0.5, 1e-4),
        (0.0, 0.5, 1e-4),
    ]


@pytest.mark.parametrize("looked", [False, True])
def test_the_update_that_makes_the_state_leaves_no_trace_in_sgd(looked: bool) -> None:
    """Start-up looks at the state before step 1; weight decay went into SGD's momentum then."""
    case = Case(0, optimizer=OptimizerSpec(name="sgd", momentum=0.9, weight_decay=0.1))
    plain, seen = make_engine(case, ALONE), make_engine(case, ALONE)
    seen.dtypes()
    for step in range(2):
        losses = [train_step(engine, ALONE, packs_of(step, 2), 0.1)[0] for engine in (plain, seen)]
        assert losses[0] == losses[1]
    after = [weights_of(engine) for engine in (plain, seen)]
    assert all((after[0][name] == after[1][name]).all() for name in after[0])


# --- 8-bit Adam, the shipped one -----------------------------------------------------------------------------


def test_codes_that_are_read_and_written_are_the_same_codes() -> None:
    parameter = nn.Parameter(torch.zeros(3, BLOCK - 7))
    optimizer = Adam8bit([parameter])
    draw = torch.Generator().manual_seed(0)
    for name in Adam8bit.moments:
        value = torch.randn(parameter.shape, generator=draw) * torch.logspace(-9, 1, parameter.shape[1])
        optimizer.write_moment(parameter, name, value.abs() if name == "exp_avg_sq" else value)
        codes = {key: state.clone() for key, state in optimizer.state[parameter].items()}
        read = optimizer.read_moment(parameter, name)
        optimizer.write_moment(parameter, name, read)
        assert all(torch.equal(state, codes[key]) for key, state in optimizer.state[parameter].items())
        assert torch.equal(optimizer.read_moment(parameter, name), read)
        assert optimizer.state[parameter][f"{name}_codes"].element_size() == 1


def test_8_bits_learn_as_32_do() -> None:
    """A linear model with inputs of very different sizes: both end near the noise, and no step explodes."""

    def trained(make: Any) -> list[float]:
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(512, 64, generator=draw) * torch.logspace(-2, 0, 64)
        truth = torch.randn(64, 8, generator=draw)
        weight = nn.Parameter(torch.zeros(64, 8))
        optimizer, losses = make([weight]), []
        for _ in range(300):
            loss = (inputs @ weight - inputs @ truth).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    plain = trained(lambda weights: torch.optim.AdamW(weights, lr=2e-2, betas=(0.9, 0.95), weight_decay=0.0))
    eight = trained(lambda weights: Adam8bit(weights, lr=2e-2))
    assert max(eight[10:]) < eight[0]
    assert eight[-1] < 1.3 * plain[-1] + 1e-4
    assert eight != plain


def test_defaults_of_the_settings_are_ours() -> None:
    assert (OptimizerSettings().name, OptimizerSettings().schedule) == ("adamw", "cosine")
