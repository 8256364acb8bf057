"""Trackers and names of runs."""

from __future__ import annotations

from pathlib import Path

from sftdist.commands.migrate_peers.account import Account, Kind, words
from sftdist.commands.migrate_peers.rule import Rule
from sftdist.core import snapshot


def report_to(*, default: str, project: str | None = None) -> Rule:
    """Which trackers; W&B is the one that is built in. `project`: the key of its project."""
    keys = ("report_to", project) if project else ("report_to",)

    def apply(account: Account) -> None:
        named = words("report_to", account.get("report_to", default))
        wandb = "wandb" in named or "all" in named
        if account.has("report_to"):
            others = [name for name in named if name not in ("wandb", "none", "all")]
            if others:
                account.left("report_to", f"given {', '.join(others)}; metrics.jsonl has every figure, W&B is built in")
            if wandb or not others:
                account.note(Kind.carried, "report_to", "W&B as before" if wandb else "tracking.wandb=disabled")
        if not wandb:
            account.put("tracking.wandb", "disabled", "no W&B there")
        if project and account.has(project):
            account.carry(project, "tracking.project", str(account.get(project)))

    return Rule(keys, "tracking.wandb", "W&B or nothing", apply)


def run_name(key: str) -> Rule:
    """The name of a run, which is a folder's name here."""

    def apply(account: Account) -> None:
        if not account.has(key):
            return
        name = str(account.get(key)).strip()
        if "/" in name or name.startswith("."):
            account.left(key, f"given {name}; a run's name has no '/' and no leading '.': give run.name")
        else:
            account.carry(key, "run.name", name)

    return Rule((key,), "run.name", "the same", apply)


def output_dir() -> Rule:
    """The folder of a run. Checkpoints and the export lie below it, in folders of their own."""

    def apply(account: Account) -> None:
        if not account.has("output_dir"):
            return
        folder = str(account.get("output_dir"))
        if _is_taken(account.folder / folder):
            ours = f"{folder.rstrip('/')}-sftdist"
            account.put("run.dir", ours, "output_dir holds files of the old job")
            account.differs("output_dir", f"given {folder}, which holds files of the old job; run.dir={ours}")
        else:
            account.carry("output_dir", "run.dir", folder, "the model is in its export/")

    return Rule(("output_dir",), "run.dir", "the same; the model is in its folder export", apply)


def _is_taken(folder: Path) -> bool:
    """Whether there are files that are none of a run of ours."""
    return folder.is_dir() and not (folder / snapshot.FILE).is_file() and any(folder.iterdir())
