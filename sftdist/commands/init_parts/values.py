"""Every key of the experiment with its reason: what was seen in the model, the data and the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sftdist.commands.init_parts.answer_kind import Kind
from sftdist.commands.init_parts.data_facts import DataFacts
from sftdist.commands.init_parts.machine import Machine
from sftdist.commands.init_parts.method import Fitting
from sftdist.commands.init_parts.model_facts import ModelFacts
from sftdist.commands.init_parts.pages import number
from sftdist.commands.init_parts.size import round_number, round_up
from sftdist.commands.init_parts.value import Value
from sftdist.core.settings import Method, ModelSettings

# Up to so many parameters this learning rate: larger models take smaller ones, adapters ten times larger ones.
FULL_RATES = ((0.1e9, 5e-4), (1e9, 5e-5), (4e9, 3e-5), (20e9, 2e-5), (float("inf"), 1e-5))
LORA_RATES = ((0.1e9, 2e-3), (4e9, 3e-4), (20e9, 2e-4), (float("inf"), 1e-4))
RANKS = ((20_000, 16), (100_000, 32), (float("inf"), 64))  # of the adapters, up to so many rows
WARMUP_STEPS = 10  # at least, where that is no more than WARMUP[1] of all
WARMUP = (0.03, 0.1)
SAVES = 10  # in a run
EVERY = (10, 500)  # steps between two of them
ANSWER_TOKENS = (64, 2048)  # that evaluation lets a model write


@dataclass(frozen=True)
class Seen:
    """All that the files follow from. `val`: the user's own validation file; `contract`: the file that says what the
    answers fulfil, None for text."""

    name: str
    model: ModelFacts
    data: DataFacts
    machine: Machine
    fit: Fitting
    val: str | None
    contract: str | None


_PRECISION = {
    "bf16": "16 bits with the range of float32: no loss scaling.",
    "fp16": "This GPU has no bfloat16.",
    "fp32": "This CPU has no instructions for bf16, and emulates it at a fraction of the rate.",
}


def values_of(seen: Seen) -> list[Value]:
    """In the order of the sections of a configuration."""
    precision = seen.machine.precision
    return [
        Value("precision", precision, _PRECISION[precision]),
        *_data(seen),
        *_model(seen),
        *_tune(seen),
        *_train(seen),
        *_optimizer(seen),
        *_intervals(seen),
        *_evals(seen),
    ]


def _data(seen: Seen) -> Iterator[Value]:
    data, size = seen.data, seen.fit.size
    source: dict[str, Any] = {"path": data.path}
    why = f"{data.rows:,} rows; looked at {data.seen}."
    if seen.contract is not None:
        source |= {"contract": seen.contract, "on_breach": "report"}
        why += " The contract says what the answers have in common; rows that break it are reported, not dropped."
    yield Value("data.sources", {data.name: source}, why)
    if seen.val is not None:
        yield Value("data.val", seen.val, "Your own rows for the loss during training and for evaluate.")
    else:
        about = f"about {round(size.held_out * data.usable):,} rows"
        yield Value("data.val_fraction", size.held_out, f"Held out for evaluation by the hash of the prompt: {about}.")
    about = f"About {round(size.held_out * data.usable):,} rows for the gate, which nobody trains on or looks at before"
    yield Value(
        "data.holdout_fraction",
        size.held_out,
        f"{about}. This locks them; then add data.holdout_lock here:",
        f"sftdist prepare +exp={seen.name} data.holdout_lock={seen.name}.holdout.json lock=write",
    )
    yield Value("data.max_len", size.max_len, _why_max_len(seen))
    if data.expand_turns:
        yield Value(
            "data.expand_turns",
            True,
            "The template rewrites earlier turns, so each answer is a sample of its own, rendered as it will be "
            "served.",
        )


def _why_max_len(seen: Seen) -> str:
    size, context = seen.fit.size, seen.model.context
    why = "The 99.5th percentile of the conversations in tokens, rounded up"
    if context is not None and size.max_len == context:
        why = f"All that the model's context takes, which is less than {why[0].lower()}{why[1:]}"
    if size.dropped:
        share = size.dropped / len(seen.data.lengths)
        why += f"; {share:.2%} are longer, and are left out (the longest has {size.longest:,})"
    else:
        why += f"; no conversation is longer (the longest has {size.longest:,})"
    return f"{why}."


def _model(seen: Seen) -> Iterator[Value]:
    model, cfg = seen.model, seen.fit.choice.cfg.model
    own = model.why_template if model.template is None else ""
    yield Value("model.path", model.path, f"{model.size} parameters, {_context(model)}. {own}".strip())
    if model.template is not None:
        yield Value("model.chat_template", model.template, model.why_template)
    if cfg.activation_checkpointing:
        yield Value("model.activation_checkpointing", True, "Layers are computed twice to save memory.")
        if cfg.recompute_layers is not None:
            why = "Of how many layers: the fewest that fit, since each costs time."
            yield Value("model.recompute_layers", cfg.recompute_layers, why)
    if cfg.loss_chunk != ModelSettings().loss_chunk:
        yield Value("model.loss_chunk", cfg.loss_chunk, "Fewer logits at a time: nothing fits otherwise.")


def _context(model: ModelFacts) -> str:
    return "no limit of context in its config" if model.context is None else f"a context of {model.context:,} tokens"


def _tune(seen: Seen) -> Iterator[Value]:
    fit = seen.fit
    yield Value("tune.method", fit.method.value, fit.why)
    if fit.method != Method.full:
        rank = next(rank for rows, rank in RANKS if seen.data.usable <= rows)
        yield Value("tune.r", rank, f"Of the adapters: {rank} holds what {seen.data.usable:,} rows teach.")
        yield Value("tune.alpha", 2 * rank, "Twice the rank, which the learning rate below is made for.")
        yield Value("tune.target", "all-linear", "Adapters on attention alone learn less.")


def _train(seen: Seen) -> Iterator[Value]:
    size, machine, step = seen.fit.size, seen.machine, seen.fit.choice.terms.total
    yield Value(
        "train.pack_tokens",
        size.pack_tokens,
        f"Tokens of one forward: conversations of {seen.data.mean:,.0f} on average share it without seeing each other.",
    )
    per_step = size.pack_tokens * size.packs / seen.data.mean
    each = size.packs // machine.cluster.gpus
    yield Value(
        "train.packs_per_step",
        size.packs,
        f"About {per_step:,.0f} conversations a step; {each} for each of {machine}. The step is the same on any number "
        "of GPUs.",
    )
    predicted = "" if machine.on_cpu else f", about {_duration(size.steps * step)} of training by the planner"
    yield Value(
        "train.epochs",
        size.epochs,
        f"{seen.data.usable:,} rows: fewer are seen more often, since they are learned by heart sooner than known. "
        f"That makes about {size.steps:,} steps{predicted}.",
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


def _optimizer(seen: Seen) -> Iterator[Value]:
    is_full = seen.fit.method == Method.full
    rates = FULL_RATES if is_full else LORA_RATES
    lr = next(lr for most, lr in rates if seen.model.parameters <= most)
    kind = "a full fine-tune" if is_full else "adapters, which take about ten times that of a full fine-tune"
    yield Value(
        "optimizer.lr",
        lr,
        f"Usual for {kind} of {seen.model.size} parameters. It is the first thing to vary:",
        f"sftdist train -m +exp={seen.name} optimizer.lr={','.join(map(number, (lr / 2, lr, 2 * lr)))}",
    )
    steps = seen.fit.size.steps
    least, most = WARMUP
    ratio = round(min(most, max(least, WARMUP_STEPS / steps)), 2)
    yield Value("optimizer.warmup_ratio", ratio, f"About {max(1, round(ratio * steps))} steps until the full rate.")


def _intervals(seen: Seen) -> Iterator[Value]:
    every = min(round_number(seen.fit.size.steps / SAVES, *EVERY), max(1, seen.fit.size.steps // 2))
    yield Value("checkpoint.every_steps", every, "About ten times in the run: what a crash can cost.")
    yield Value(
        "checkpoint.keep_best",
        True,
        "The one with the lowest eval/loss stays, for sftdist export run.dir=R step=best. Beside it the last two, of "
        f"about {_checkpoint_gib(seen):.2g} GiB each.",
    )
    yield Value("eval.every_steps", every, "With each checkpoint, so that the best one is kept.")


def _checkpoint_gib(seen: Seen) -> float:
    """Weights or adapters in float32, and two moments."""
    return 12 * seen.fit.trained(seen.model) / 2**30


def _evals(seen: Seen) -> Iterator[Value]:
    least, most = ANSWER_TOKENS
    tokens = min(most, max(least, round_up(seen.data.longest_answer)))
    yield Value(
        "evals.max_new_tokens",
        tokens,
        f"99.5 of 100 answers have at most about {seen.data.longest_answer:,} tokens.",
    )


def kind_in_words(seen: Seen) -> str:
    """What the answers are, for the head of the gate and for the screen."""
    answers = seen.data.answers
    if answers.kind is Kind.json:
        return f"{answers.share:.1%} of {answers.count:,} answers are JSON"
    if answers.kind is Kind.label:
        return f"the answers are {len(answers.contract['rules']['one_of'])} different words or phrases"
    return f"the {answers.count:,} answers are free text"
