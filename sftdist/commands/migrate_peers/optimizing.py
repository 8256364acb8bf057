"""Optimizer, learning rate, schedule and warm-up, of which all peers have the same notion under different names."""

from __future__ import annotations

from sftdist.commands.migrate_peers.account import Account, is_on, mapping, number, whole, wrong
from sftdist.commands.migrate_peers.rule import Rule, same

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused")
ADAMW_OF_ANOTHER_PRECISION = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw"),
    *("adamw_torch_8bit", "adamw_torch_4bit", "adamw_torch_fp8", "ao_adamw_8bit", "ao_adamw_4bit", "ao_adamw_fp8"),
)
# What the peers call it: our schedule.
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}
SUGGESTED = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
MIN_RATIOS = ("min_lr_rate", "min_lr_ratio")


def learning(
    *,
    optimizer: str,
    schedule: str,
    lr: float | None,
    default_schedule: str,
    default_warmup: float,
    least: tuple[str, ...] = (),
) -> tuple[Rule, ...]:
    """The rules of a peer whose keys for the optimizer and the schedule have these names.

    `lr`: its default; `least`: a key for where the schedule ends, as a share of the learning rate.
    """
    return (
        _optimizer(optimizer),
        _rate(lr),
        _betas(),
        same("adam_epsilon", "optimizer.eps", number),
        same("weight_decay", "optimizer.weight_decay", number),
        same("max_grad_norm", "optimizer.max_grad_norm", number),
        _schedule(schedule, default_schedule, default_warmup, least),
    )


def _rate(default: float | None) -> Rule:
    def apply(account: Account) -> None:
        if account.has("learning_rate"):
            account.carry("learning_rate", "optimizer.lr", number("learning_rate", account.get("learning_rate")))
        elif default is not None:
            account.default("learning_rate", "optimizer.lr", default)
        else:
            method = account.values.get("tune.method", "full")
            account.put("optimizer.lr", SUGGESTED[method], f"no learning_rate is given; usual for {method}")
            account.differs("(learning_rate)", f"not given, and required there; optimizer.lr={SUGGESTED[method]:g}")

    return Rule(("learning_rate",), "optimizer.lr", "the same", apply)


def _optimizer(key: str) -> Rule:
    def apply(account: Account) -> None:
        name = str(account.get(key, "adamw_torch"))
        if name in ADAMW:
            if account.has(key):
                account.carry(key, "optimizer.name", "adamw")
        elif name == "sgd":
            account.carry(key, "optimizer.name", "sgd")
        elif name in ADAMW_OF_ANOTHER_PRECISION:
            account.put("optimizer.name", "adamw", key)
            account.differs(key, f"given {name}; AdamW with fp32 moments here: the same update, more memory")
        else:
            account.left(key, f"given {name}; AdamW is taken, so look at the learning rate again")
        if key in account.given and account.has("optim_args"):
            account.left("optim_args", f"given {account.get('optim_args')}; betas and eps have keys of their own")
        elif account.has("optim_args"):
            account.left("optim_args", "arguments of an optimizer that is not named")

    return Rule((key, "optim_args"), "optimizer.name", "AdamW and SGD; 8-bit AdamW becomes AdamW", apply)


def _betas() -> Rule:
    """Their default is torch's, [0.9, 0.999]; ours is [0.9, 0.95]."""

    def apply(account: Account) -> None:
        given = [key for key in ("adam_beta1", "adam_beta2") if account.has(key)]
        betas = [
            number("adam_beta1", account.get("adam_beta1", 0.9)),
            number("adam_beta2", account.get("adam_beta2", 0.999)),
        ]
        for key in given:
            account.carry(key, "optimizer.betas", betas)
        if not given:
            account.default("adam_beta1 and adam_beta2", "optimizer.betas", betas)

    return Rule(("adam_beta1", "adam_beta2"), "optimizer.betas", "the same; [0.9,0.999] where not given", apply)


def _schedule(key: str, default: str, default_warmup: float, least: tuple[str, ...]) -> Rule:
    def apply(account: Account) -> None:
        name = str(account.get(key, default))
        ours = SCHEDULES.get(name)
        if ours is None:
            account.put("optimizer.schedule", "cosine", f"instead of {name}")
            account.left(key, f"given {name}; cosine is taken, others are cosine, linear and constant")
        elif account.has(key):
            account.carry(key, "optimizer.schedule", ours)
        else:
            account.default(key, "optimizer.schedule", ours)
        _min_ratio(account, ours, least)
        _warmup(account, default_warmup, held=name == "constant")

    keys = (key, "lr_scheduler_kwargs", *least, "warmup_ratio", "warmup_steps")
    about = (
        "cosine, linear, constant; their schedules end at 0, so optimizer.min_lr_ratio=0 where nothing else is given"
    )
    return Rule(keys, "optimizer.schedule, optimizer.min_lr_ratio, optimizer.warmup_ratio", about, apply)


def _min_ratio(account: Account, schedule: str | None, least: tuple[str, ...]) -> None:
    """Their schedules fall to 0 unless told otherwise, ours to a tenth."""
    ratio, origin = 0.0, "their schedules end at 0"
    if account.has("lr_scheduler_kwargs"):
        arguments = mapping("lr_scheduler_kwargs", account.get("lr_scheduler_kwargs"))
        key = next((name for name in MIN_RATIOS if name in arguments), None)
        if key is not None and len(arguments) == 1:
            ratio, origin = number(key, arguments[key]), "lr_scheduler_kwargs"
            account.carry("lr_scheduler_kwargs", "optimizer.min_lr_ratio", ratio)
        else:
            account.left(
                "lr_scheduler_kwargs", f"given {arguments}; of these only {' or '.join(MIN_RATIOS)} is known here"
            )
    for name in filter(account.has, least):
        ratio, origin = number(name, account.get(name)), name
        account.carry(name, "optimizer.min_lr_ratio", ratio)
    if schedule != "constant":
        account.put("optimizer.min_lr_ratio", ratio, origin)


def _warmup(account: Account, default: float, *, held: bool) -> None:
    """`held`: a schedule that knows no warm-up."""
    given = [key for key in ("warmup_steps", "warmup_ratio") if account.has(key)]
    if held:
        for key in given:
            account.unneeded(key, "their schedule constant has no warm-up")
        account.put("optimizer.warmup_ratio", 0.0, "their schedule constant has none")
        return
    steps = number("warmup_steps", account.get("warmup_steps", 0))
    ratio = number("warmup_ratio", account.get("warmup_ratio", 0))
    total = account.get("max_steps")
    for key, value in (("warmup_steps", steps), ("warmup_ratio", ratio)):
        if value < 0:
            raise wrong(key, account.get(key), "0 or more")
    if 0 < steps < 1:
        account.carry("warmup_steps", "optimizer.warmup_ratio", steps, "below 1 it is a share of all steps")
    elif steps >= 1 and is_on(total) and whole("max_steps", total) > 0:
        share = round(min(1.0, steps / whole("max_steps", total)), 6)
        account.carry("warmup_steps", "optimizer.warmup_ratio", share, f"{steps:g} of {total} steps")
    elif steps >= 1:
        text = "ours is a share of all steps, whose number the data decides: 0.03; correct it after `sftdist prepare`"
        account.put("optimizer.warmup_ratio", 0.03, f"instead of warmup_steps {steps:g}")
        account.differs("warmup_steps", f"given {steps:g}; {text}")
    elif account.has("warmup_ratio"):
        account.carry("warmup_ratio", "optimizer.warmup_ratio", ratio)
    elif account.has("warmup_steps"):
        account.carry("warmup_steps", "optimizer.warmup_ratio", 0.0)
    else:
        account.default("the warm-up", "optimizer.warmup_ratio", default)
    _other_warmup(account, steps)


def _other_warmup(account: Account, steps: float) -> None:
    """The key that did not decide."""
    if account.has("warmup_steps") and account.has("warmup_ratio"):
        key = "warmup_ratio" if steps > 0 else "warmup_steps"
        if key not in account.answered():
            account.unneeded(key, "the other key of the warm-up decides")
