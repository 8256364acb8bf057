"""A loss of the user's own, by import path: (logits [n,V] float32, targets [n] int64) -> a loss per token, [n].

It gets the supervised positions of a pack in chunks, so it must judge each position by itself; weights, sources and the
denominator stay the trainer's. What it gives is proven once, on the model's real vocabulary, before any step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sftdist.core.errors import ConfigError, SftdistError, TrainingError
from sftdist.core.extension import load_function, raised, require_call
from sftdist.model.loss import BLOCK_ELEMENTS, LogitTransform, RowLosses, TokenLoss

KEY = "train.loss"
FORM = "a function (logits [n,V], targets [n], **train.loss_args) -> a loss for each of the n tokens"
TRIED = 5  # positions


def load_loss(path: str, args: Mapping[str, Any]) -> TokenLoss:
    """The user's function with its arguments. Raises ConfigError where there is none that can be called so."""
    function = load_function(path, KEY)
    require_call(function, path, KEY, FORM, torch.empty(0, 0), torch.empty(0, dtype=torch.int64), **args)

    def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return _checked(function(logits, targets, **args), targets, path, TrainingError)

    return token_loss


def require_sound(token_loss: TokenLoss, path: str, vocabulary: int) -> None:
    """Raises ConfigError where the loss raises, has another shape, no gradient, or looks at other positions."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(TRIED, vocabulary, generator=draw).requires_grad_()
    targets = torch.randint(vocabulary, (TRIED,), generator=draw)
    try:
        together = _checked(token_loss(logits, targets), targets, path, ConfigError)
        alone = torch.cat([token_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(TRIED)])
        (gradient,) = torch.autograd.grad(together.sum(), logits)
    except SftdistError as problem:
        raise ConfigError(str(problem)) from problem
    except Exception as problem:  # whatever the user's code raises
        raise ConfigError(f"{KEY}: {path} raised {raised(problem)}; required {FORM}, with a gradient") from problem
    if not (together.isfinite().all() and gradient.isfinite().all()):
        raise ConfigError(f"{KEY}: {path} gave a loss or a gradient that is not finite for ordinary logits")
    if not torch.allclose(together, alone, rtol=1e-5, atol=1e-6):
        raise ConfigError(
            f"{KEY}: {path} gave other losses for tokens one by one than for {TRIED} of them together; required a loss "
            "of each token by itself, without a mean over the others: the packs are summed up by the trainer"
        )


def rows_of(token_loss: TokenLoss) -> RowLosses:
    """The same as a way to turn logits into gradients, block by block, by autograd."""
    return partial(_rows_into_gradients, token_loss)


def _rows_into_gradients(
    token_loss: TokenLoss,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    transform: LogitTransform,
    grad_enabled: bool,
) -> Tensor:
    """As `loss.rows_into_gradients`: the losses [n]; the logits [n,V] become weight * gradient."""
    rows = max(1, BLOCK_ELEMENTS[logits.device.type == "cuda"] // logits.shape[1])
    losses = []
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(grad_enabled):
            raw = logits[part].detach().float().requires_grad_(grad_enabled)
            found = token_loss(transform(raw), targets[part])
            if grad_enabled:
                total = (found if weights is None else found * weights[part]).sum()
                (gradient,) = torch.autograd.grad(total, raw)
        losses.append(found.detach().float())
        if grad_enabled:
            logits[part] = gradient
    return torch.cat(losses)


def _checked(found: Any, targets: Tensor, path: str, kind: type[SftdistError]) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != targets.shape or not found.is_floating_point():
        given = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise kind(f"{KEY}: {path} gave {given} for {len(targets)} targets, required {FORM}")
    return found
