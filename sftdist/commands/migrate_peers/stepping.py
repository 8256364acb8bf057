"""How large a step is, how many there are, and how long a row may be."""

from __future__ import annotations

from sftdist.commands.migrate_peers.account import Account, Kind, count, flag, is_on, number, whole
from sftdist.commands.migrate_peers.rule import Rule

ACCUMULATION = "gradient_accumulation_steps"


def step_size(
    batch: str, packing: tuple[str, ...], *, default: int, further: tuple[str, ...] = (), total: str | None = None
) -> Rule:
    """The product of batch, accumulation and GPUs: packs where the peer packs, else conversations.

    `packing`: the keys that switch packing on; `further`: keys of the batch that have no part in the product;
    `total`: a key that gives batch x accumulation in one.
    """

    def apply(account: Account) -> None:
        each = count(batch, _unless_auto(account, batch, default))
        times = count(ACCUMULATION, _unless_auto(account, ACCUMULATION, 1))
        if total and account.has(total) and not account.has(ACCUMULATION):
            times = max(1, whole(total, account.get(total)) // each)
        packs = any(is_on(account.get(key)) for key in packing)
        ours = "train.packs_per_step" if packs else "train.conversations_per_step"
        text = f"{each} x {times} x {account.gpus} GPU{'s' * (account.gpus > 1)}"
        for key in (batch, ACCUMULATION, *([total] if total else [])):
            if account.has(key):
                account.carry(key, ours, each * times * account.gpus, text)
        account.put(ours, each * times * account.gpus, f"{batch} x {ACCUMULATION} x GPUs: {text}")
        account.differs("(micro-batches)", _micro_batches(account.gpus))
        for key in filter(account.has, packing):
            _say_packing(key, account)
        for key in filter(account.has, further):
            account.unneeded(key, "only how much is done at a time, which is decided here")

    about = "batch x accumulation x GPUs (--gpus); packs where the peer packs, else conversations"
    keys = (batch, ACCUMULATION, *([total] if total else []), *packing, *further)
    return Rule(keys, "train.packs_per_step or train.conversations_per_step", about, apply)


def _unless_auto(account: Account, key: str, default: int) -> object:
    value = account.get(key, default)
    return default if value == "auto" else value


def _micro_batches(gpus: int) -> str:
    count = "--gpus N says on how many GPUs the peer's job ran; given none, 1 is taken" if gpus == 1 else ""
    text = (
        "conversations are packed, and packs dealt out evenly to the GPUs; a step is the same, however many there are"
    )
    return f"{text}. {count}".rstrip(". ")


def _say_packing(key: str, account: Account) -> None:
    if is_on(account.get(key)):
        account.carry(key, "train.packing", True, "documents in a pack never see one another")
    else:
        account.differs(key, "packs hold several conversations here, each by itself: the same loss, less padding")


def length(key: str, overlong: Rule, *, default: int) -> tuple[Rule, ...]:
    """The longest row, and with it the size of a pack; `overlong` says what happens to longer ones."""

    def apply(account: Account) -> None:
        found = whole(key, account.get(key, default))
        if account.has(key):
            account.carry(key, "data.max_len", found)
        else:
            account.default(key, "data.max_len", found)

    return (Rule((key,), "data.max_len", "the same, in tokens; a pack is as long, too", apply), overlong)


def overlong(keys: tuple[str, ...], *, default: str, say: str = "") -> Rule:
    """Rows that are longer: drop, truncate or error; `say`: how the peer's way of it differs."""
    words = {"drop": "drop", "truncate": "truncate", "keep_start": "truncate", "raise": "error"}

    def apply(account: Account) -> None:
        key = account.first(keys)
        if key is None:
            account.put("data.overlong", default, "what is done there with rows that are too long")
        elif str(account.get(key)) in words:
            account.carry(key, "data.overlong", words[str(account.get(key))])
        else:
            account.put("data.overlong", "drop", f"instead of {account.get(key)}")
            account.left(key, f"given {account.get(key)}; drop is taken, others are truncate and error")
        if say:
            account.differs("(too long)", say)

    return Rule(keys, "data.overlong", "drop, truncate, error", apply)


def duration(epochs: str, *, default: float) -> Rule:
    """Epochs or steps; a number of steps above 0 decides alone."""

    def apply(account: Account) -> None:
        steps = whole("max_steps", account.get("max_steps", -1))
        if steps > 0:
            account.carry("max_steps", "train.max_steps", steps)
            if account.has(epochs):
                account.unneeded(epochs, "max_steps decides")
            return
        if account.has("max_steps"):
            account.unneeded("max_steps", "not above 0: the epochs decide")
        if account.has(epochs):
            account.carry(epochs, "train.epochs", number(epochs, account.get(epochs)))
        else:
            account.default(epochs, "train.epochs", default)

    about = "the same; an epoch here is as many supervised tokens as the data holds"
    return Rule((epochs, "max_steps"), "train.epochs, train.max_steps", about, apply)


def seed(*, default: int = 42) -> Rule:
    """The seed. The same number draws other rows: no two programs shuffle alike."""

    def apply(account: Account) -> None:
        found = whole("seed", account.get("seed", default))
        if account.has("seed"):
            account.carry("seed", "seed", abs(found))
        else:
            account.default("seed", "seed", found)

    return Rule(("seed",), "seed", "the same number; the order of the rows is another", apply)


def saving(further: tuple[str, ...] = ()) -> Rule:
    """How often checkpoints are written, and which stay."""
    keys = ("save_strategy", "save_steps", "save_total_limit", *further)

    def apply(account: Account) -> None:
        strategy = str(account.get("save_strategy", "steps"))
        _cadence(account, "save", "checkpoint.every_steps", strategy)
        if account.has("save_strategy"):
            _strategy(account, "save_strategy", strategy, "checkpoint.every_steps")
        if account.has("save_total_limit"):
            kept = max(1, whole("save_total_limit", account.get("save_total_limit")))
            account.carry("save_total_limit", "checkpoint.keep_last", kept)
        for key in filter(account.has, further):
            account.differs(
                key, "given per epoch; ours counts steps: checkpoint.every_steps, 100 where nothing is said"
            )

    return Rule(keys, "checkpoint.every_steps, checkpoint.keep_last", "in steps; a share or epochs: 100", apply)


def evaluating(strategies: tuple[str, ...], further: tuple[str, ...] = ()) -> Rule:
    """How often the loss of the validation rows is measured, and whether the best checkpoint stays."""
    best = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    keys = (*strategies, "eval_steps", *further, *best)

    def apply(account: Account) -> None:
        key = account.first(strategies)
        strategy = "steps" if key is None else str(account.get(key))
        _cadence(account, "eval", "eval.every_steps", strategy)
        for name in filter(account.has, strategies):
            _strategy(account, name, str(account.get(name)), "eval.every_steps")
        for name in filter(account.has, further):
            account.differs(name, "given per epoch; ours counts steps: eval.every_steps, 100 where nothing is said")
        _best(account)

    return Rule(keys, "eval.every_steps, checkpoint.keep_best", "in steps; a share or epochs: 100", apply)


def _cadence(account: Account, word: str, ours: str, strategy: str) -> None:
    key = f"{word}_steps"
    if not account.has(key):
        return
    every = number(key, account.get(key))
    if strategy not in ("steps", "True"):
        account.unneeded(key, f"{word}_strategy is {strategy}")
    elif every >= 1:
        account.carry(key, ours, int(every))
    elif every > 0:
        account.differs(key, f"given {every:g}, a share of all steps; {ours} counts steps, 100 where nothing is said")
    else:
        account.carry(key, ours, 0, "never")


def _strategy(account: Account, key: str, strategy: str, ours: str) -> None:
    if strategy in ("no", "False"):
        account.carry(key, ours, 0, "never; a checkpoint at the end is always written" if "save" in key else "never")
    elif strategy in ("steps", "True"):
        account.note(Kind.carried, key, f"{ours} counts steps")
    elif strategy == "best" and key == "save_strategy":
        _keep_best(account, key)
    else:
        account.differs(key, f"given {strategy}; {ours} counts steps, 100 where nothing is said")


def _best(account: Account) -> None:
    metric = str(account.get("metric_for_best_model", "loss"))
    if account.has("load_best_model_at_end"):
        if flag("load_best_model_at_end", account.get("load_best_model_at_end")):
            _keep_best(account, "load_best_model_at_end")
            account.differs(
                "load_best_model_at_end",
                "the export is the last step; sftdist export run.dir=R step=best gives the best",
            )
        else:
            account.unneeded("load_best_model_at_end", "switched off there, and not done here")
    if account.has("metric_for_best_model"):
        if metric in ("loss", "eval_loss"):
            account.carry("metric_for_best_model", "checkpoint.best", "eval/loss")
        else:
            account.left("metric_for_best_model", f"given {metric}; checkpoint.best takes one of evaluate watch=true")
    if account.has("greater_is_better"):
        account.unneeded("greater_is_better", "known here by the metric's name")


def _keep_best(account: Account, key: str) -> None:
    """Every evaluated step needs a checkpoint, so both come equally often."""
    every = account.values.get("eval.every_steps", 100) or 100
    account.put("eval.every_steps", every, "for the best checkpoint")
    account.put("checkpoint.every_steps", every, "every evaluated step needs a checkpoint")
    account.carry(key, "checkpoint.keep_best", True)
