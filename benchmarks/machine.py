"""Where and with what a benchmark ran, and where its results go: shared by all benchmarks.

    from benchmarks.machine import Result, shared_data

Benchmarks are run from the root of the repository as `python -m benchmarks.NAME`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sftdist.core.ledger import git_state, versions
from sftdist.core.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The files of the three sources, in the order domain, general, format.
SOURCES = ("domain_gsm8k.messages.jsonl", "general_gpteacher.alpaca.jsonl", "format_toolformer.sharegpt.jsonl")
GIB = 2**30


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, GPUs, system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def peers() -> dict[str, str]:
    """Versions of what our figures are compared with."""
    return {name: metadata.version(name) for name in ("trl", "accelerate") if any(metadata.distributions(name=name))}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command(module: str) -> str:
    """The command line that gave the result, as one types it at the root of the repository."""
    return f"python -m {module} {shlex.join(sys.argv[1:])}".strip()


def load() -> float:
    """Load average of the last minute: on a shared machine it tells how much a figure is worth."""
    return round(os.getloadavg()[0], 2)


def shared_data() -> Path:
    """The folder of the real chat data: SFTDIST_DATA, else ../shared/data; the benchmark ends here if it is absent."""
    folder = Path(os.environ.get("SFTDIST_DATA") or ROOT.parent / "shared" / "data")
    missing = [name for name in SOURCES if not (folder / name).is_file()]
    if missing:
        print(f"skipped: {', '.join(missing)} not in {folder}; set SFTDIST_DATA to the folder with the real chat data")
        sys.exit(0)
    return folder


def run_on_ranks(ranks: int, words: list[str]) -> dict[str, Any]:
    """Run `python WORDS --worker FILE` on so many ranks with one thread each; the JSON that rank 0 wrote to FILE."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        line += [*words, "--worker", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(line)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Result:
    """One dated result: figures, and the rows of a table, with command, versions, commit and machine.

    `more`: further tables by their titles; `notes`: paragraphs below them.
    """

    name: str
    command: str
    figures: dict[str, Any]
    table: list[dict[str, Any]]
    about: str = ""
    more: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    where: dict[str, Any] = field(
        default_factory=lambda: {**git_state(ROOT), "versions": versions() | peers()} | machine()
    )

    def save(self, folder: Path = RESULTS) -> Path:
        """Write `<date>-<name>.json` and `.md`, print the table, and return the path of the JSON file."""
        date = time.strftime("%Y-%m-%d", time.gmtime())
        path = folder / f"{date}-{self.name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        value = {"benchmark": self.name, "date": date, "command": self.command, "about": self.about}
        tables = {"table": self.table, **({"more": self.more} if self.more else {})}
        write_json(path, {**value, "figures": self.figures, **tables, "where": self.where})
        text = self.markdown(date)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
        return path

    def markdown(self, date: str) -> str:
        where = {key: value for key, value in self.where.items() if key != "versions"}
        lines = [
            f"# {self.name}, {date}",
            "",
            self.about,
            "",
            f"    {self.command}",
            "",
            *markdown_table(self.table),
            "",
        ]
        for title, rows in self.more.items():
            lines += [f"## {title}", "", *markdown_table(rows), ""]
        lines += [line for note in self.notes for line in (note, "")]
        lines += [f"- {key}: {_text(value)}" for key, value in self.figures.items()]
        lines += ["", ", ".join(f"{key} {_text(value)}" for key, value in where.items()), ""]
        lines += [", ".join(f"{key} {value}" for key, value in self.where["versions"].items()), ""]
        return "\n".join(lines)


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows (dictionaries with the same keys) as lines of a Markdown table."""
    if not rows:
        return []
    heads = list(rows[0])
    body = ["| " + " | ".join(_text(row[head]) for head in heads) + " |" for row in rows]
    return ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *body]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
