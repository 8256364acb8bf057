"""A loss of the user's own: chunked it is what it is in one piece, and one that is no loss per token is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sftdist.core.errors import ConfigError, TrainingError
from sftdist.examples.losses import smoothed
from sftdist.model.loss import LogitTransform, chunked_ce, reference_ce, token_ce
from sftdist.model.own_loss import load_loss, require_sound, rows_of

ROWS, WIDTH, WORDS = 37, 16, 50
OWN = """
import torch
from torch.nn.functional import cross_entropy


def focal(logits, targets, *, gamma=1.0):
    losses = cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses


def mean(logits, targets):
    return cross_entropy(logits, targets)


def relative(logits, targets):
    losses = cross_entropy(logits, targets, reduction="none")
    return losses - losses.mean()


def detached(logits, targets):
    return cross_entropy(logits.detach(), targets, reduction="none")


def infinite(logits, targets):
    return cross_entropy(logits, targets, reduction="none") / 0.0


def sometimes(logits, targets):
    losses = cross_entropy(logits, targets, reduction="none")
    return losses if len(losses) < 6 else losses.mean()
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_losses.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_losses", None)


def sides(bias: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    return hidden, nn.Linear(WIDTH, WORDS, bias=bias), torch.randint(WORDS, (ROWS,)), torch.rand(ROWS)


@pytest.mark.parametrize("bias", [False, True], ids=["fast", "recomputed"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=3.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_it_is_the_plain_one(bias: bool, transform: LogitTransform, weighted: bool) -> None:
    """X7, for a loss of the user's own: losses and gradients."""
    focal = load_loss("own_losses:focal", {"gamma": 2.0})
    hidden, head, targets, weights = sides(bias)
    given = weights if weighted else None
    plain = reference_ce(hidden, head, targets, given, transform, focal)
    expected = torch.autograd.grad(plain.total, [hidden, head.weight])
    chunked = chunked_ce(hidden, head, targets, given, 8, transform, rows_of(focal), focal)
    found = torch.autograd.grad(chunked.total, [hidden, head.weight])
    torch.testing.assert_close(chunked.total, plain.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked.tokens, plain.tokens, rtol=1e-6, atol=1e-7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    ce = chunked_ce(hidden, head, targets, given, 8, transform)
    assert float(abs(ce.total - chunked.total)) > 0.1, "it is another loss than cross-entropy"


def test_without_gradients_nothing_is_differentiated() -> None:
    hidden, head, targets, _ = sides(False)
    with torch.no_grad():
        found = chunked_ce(hidden, head, targets, None, 8, row_losses=rows_of(token_ce), token_loss=token_ce)
    torch.testing.assert_close(found.tokens, reference_ce(hidden, head, targets, None).tokens)


def test_label_smoothing_is_torchs_own() -> None:
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    expected = 0.7 * cross_entropy(logits, targets, reduction="none") - 0.3 * logits.log_softmax(-1).mean(-1)
    torch.testing.assert_close(smoothed(logits, targets, epsilon=0.3), expected)
    require_sound(smoothed, "sftdist.examples.losses:smoothed", 50)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("mean", {}, r"gave torch.float32 \[\] for 5 targets, required a function \(logits \[n,V\]"),
        ("relative", {}, "gave other losses for tokens one by one"),
        ("detached", {}, "raised RuntimeError: .*; required a function .*, with a gradient"),
        ("infinite", {}, "gave a loss or a gradient that is not finite"),
        ("focal", {"gamma": "two"}, "raised TypeError"),
        ("focal", {"gama": 2}, "unexpected keyword argument 'gama'"),
    ],
)
def test_what_is_no_loss_per_token_is_refused(name: str, args: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"train.loss: .*own_losses:{name}.*{said}"):
        require_sound(load_loss(f"own_losses:{name}", args), f"own_losses:{name}", WORDS)


def test_one_that_changes_its_mind_ends_the_training_in_words() -> None:
    sometimes = load_loss("own_losses:sometimes", {})
    require_sound(sometimes, "own_losses:sometimes", WORDS)
    hidden, head, targets, _ = sides(False)
    with pytest.raises(TrainingError, match=r"train.loss: own_losses:sometimes gave torch.float32 \[\] for 8 targets"):
        chunked_ce(hidden, head, targets, None, 8, row_losses=rows_of(sometimes), token_loss=sometimes)
