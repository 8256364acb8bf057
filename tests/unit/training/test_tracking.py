"""metrics.jsonl: bit-equal figures, cut at the resumed step, whole after a kill; the console; the meter."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sftdist.model.hardware import GPUS
from sftdist.training.console import Pace, PlainConsole, ProgressConsole, open_console, other_line
from sftdist.training.meter import Meter, StepFacts, memory_gib, peak_flops
from sftdist.training.tracking import METRICS, ROWS, JsonLines, Tracker, cut, evaluated, evaluation_losses, open_tracker


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.step({"step": step, "loss": 1 / step}, [f"row-{step}", "é"])
        if step % 2 == 0:
            tracker.report({"kind": "eval", "step": step, "eval/loss": 2 / step})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_back_bit_equal(value: float) -> None:
    (line,) = written([{"kind": "train", "value": value}])
    assert struct.pack("d", line["value"]) == struct.pack("d", value)


def written(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        sink = JsonLines(Path(folder) / "x.jsonl", resumed_step=0)
        for line in lines:
            sink.line(line)
        sink.close("done")
        return read(Path(folder) / "x.jsonl")


def test_non_finite_figures_stay_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "x.jsonl", resumed_step=0)
    sink.line({"kind": "train", "grad_norm": math.inf, "nested": {"loss": [math.nan, -math.inf]}})
    sink.close("done")
    text = (tmp_path / "x.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert float(line["grad_norm"]) == math.inf
    assert math.isnan(float(line["nested"]["loss"][0]))
    assert float(line["nested"]["loss"][1]) == -math.inf


def test_lines_are_on_disk_as_they_are_written(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, resumed_step=0)
    run_steps(tracker, 1, 3)
    assert [(line["kind"], line["step"]) for line in read(tmp_path / METRICS)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert read(tmp_path / ROWS)[1] == {"step": 2, "rows": ["row-2", "é"]}


def test_resumed_run_writes_the_same_file(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tracker = open_tracker(whole, resumed_step=0)
    run_steps(tracker, 1, 9)
    tracker.close("done")
    run_steps(open_tracker(broken, resumed_step=0), 1, 7)  # killed: never closed
    with (broken / METRICS).open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    tracker = open_tracker(broken, resumed_step=4)
    assert [line["step"] for line in read(broken / METRICS)] == [1, 2, 2, 3, 4, 4]
    run_steps(tracker, 5, 9)
    tracker.close("done")
    for name in (METRICS, ROWS):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_cut_goes_back_over_garbage_to_the_last_line_that_stays(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n\0\0\xff\n7\n{"step": 4}\n{"st')
    for step, kept in ((3, [1, 2, 2, 3]), (2, [1, 2, 2]), (1, [1]), (0, []), (0, [])):
        cut(file, step)
        assert [line["step"] for line in read(file)] == kept
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_long_file_is_cut_as_fast_as_a_short_one(tmp_path: Path) -> None:
    """A6: only its end is read; `rows.jsonl` of a long run would not fit into memory."""
    file = tmp_path / "x.jsonl"
    first = b'{"step": 1, "rows": ["' + b"x" * 1_000 + b'"]}\n'
    with file.open("wb") as out:
        out.writelines([first] * 200_000)
        out.writelines(b'{"step": %d}\n' % step for step in range(2, 100))
    started = time.process_time()
    cut(file, 50)
    assert time.process_time() - started < 0.2
    assert file.stat().st_size == 200_000 * len(first) + sum(len(b'{"step": %d}\n' % step) for step in range(2, 51))


def test_an_evaluation_is_looked_for_among_the_last_lines(tmp_path: Path) -> None:
    assert not evaluated(tmp_path, 4)
    tracker = open_tracker(tmp_path, resumed_step=0)
    run_steps(tracker, 1, 4)
    assert evaluated(tmp_path, 4)
    assert not evaluated(tmp_path, 5)
    run_steps(tracker, 5, 5)
    assert not evaluated(tmp_path, 5)


def test_silent_tracker_of_other_ranks() -> None:
    tracker = Tracker()
    run_steps(tracker, 1, 2)
    tracker.sync()
    tracker.close("done")


def console_line(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.5, "lr": 1.95e-5, "tokens_per_second": 2345.6, "step_seconds": 2.0}


def test_plain_console_keeps_a_sensible_rate() -> None:
    out, now = io.StringIO(), 0.0
    console = PlainConsole(100, out=out, clock=lambda: now)
    for step in range(1, 101):
        now += 2.0
        console.line(console_line(step))
    console.line({"kind": "eval", "step": 100, "eval/loss": 2.31, "eval/loss/domain": 1.9})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 2.5000  lr 1.95e-05  2,346 tokens/s  left 0:03:18"
    assert [int(line.split()[1].split("/")[0]) for line in lines[:-1]] == [*range(1, 6), *range(10, 101, 5)]
    assert lines[-1] == "eval at step 100: loss 2.3100  domain 1.9000"
    assert other_line({"kind": "eval", "eval/loss": 1.0}) == "eval: loss 1.0000"


def test_last_step_is_always_printed() -> None:
    out = io.StringIO()
    console = PlainConsole(8, out=out, clock=lambda: 0.0)
    for step in range(1, 9):
        console.line(console_line(step))
    assert out.getvalue().splitlines()[-1].startswith("step 8/8 ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "variables", "kind"),
    [
        (Terminal(), {"TERM": "xterm"}, ProgressConsole),
        (Terminal(), {"TERM": "dumb"}, PlainConsole),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, PlainConsole),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, PlainConsole),
    ],
)
def test_a_bar_where_the_terminal_takes_one(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, variables: dict[str, str], kind: type[object]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", out)
    (console,) = open_console(10, first_step=0)
    console.close("done")
    assert type(console) is kind


def test_the_time_left_of_slow_steps() -> None:
    """rich's own estimate knows none where a step takes more than half a minute."""
    pace = Pace(100)
    assert [str(pace.left({"step": step, "step_seconds": 90.0})) for step in (1, 2)] == ["2:28:30", "2:27:00"]


def test_the_bar_and_what_is_said_above_it() -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120, color_system=None)
    bar = ProgressConsole(10, first_step=4, console=terminal)
    bar.line(console_line(5))
    bar.line({"kind": "eval", "step": 5, "eval/loss": 2.31})
    bar.close("done")
    text = out.getvalue()
    assert "eval at step 5: loss 2.3100" in text
    assert re.search(r"\r\x1b\[2K 5/10 \S+ +loss 2\.5000  lr 1\.95e-05  2,346 tokens/s  left 0:00:10\n", text)


FACTS = StepFacts(
    step=3,
    lr=0.5,
    grad_norm=1.25,
    seconds=2.0,
    data_wait_seconds=0.125,
    tokens=4000,
    supervised_tokens=1000.0,
    conversations=7,
    flops=8e9,
    pack_fill=0.97,
    rank_balance=0.99,
    memory_gib=1.5,
    loss_sums=[1200.0, 800.0, 0.0],
    loss_weights=[750.0, 250.0, 0.0],
    denominator=1000.0,
    rows="digest of a and b",
)


def test_meter_gives_the_line_of_the_design() -> None:
    line = Meter(("domain", "general", "format"), 1e10).line(FACTS)
    assert line == {
        "step": 3,
        "loss": 2.0,
        "lr": 0.5,
        "grad_norm": 1.25,
        "tokens": 4000,
        "supervised_tokens": 1000.0,
        "conversations": 7,
        "step_seconds": 2.0,
        "tokens_per_second": 2000.0,
        "mfu": 0.4,
        "pack_fill": 0.97,
        "rank_balance": 0.99,
        "data_wait_seconds": 0.125,
        "memory_gib": 1.5,
        "loss/domain": 1.6,
        "loss/general": 3.2,
        "share/domain": 0.75,
        "share/general": 0.25,
        "share/format": 0.0,
        "rows": "digest of a and b",
    }


def test_meter_without_a_known_peak_or_a_target() -> None:
    assert Meter(("domain", "general", "format"), None).line(FACTS)["mfu"] is None
    with pytest.raises(ValueError, match="argument"):
        Meter(("domain",), None).line(FACTS)


@pytest.mark.parametrize(
    ("name", "per_gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Tesla T4", None),
    ],
)
def test_peak_of_known_gpus(name: str, per_gpu: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), 4) == (None if per_gpu is None else 4 * per_gpu)
    assert peak_flops(torch.device("cpu"), 4) is None
    parts = list(GPUS)
    assert all(short not in long for i, short in enumerate(parts) for long in parts[i + 1 :])


def test_memory_is_the_peak_of_this_process() -> None:
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(2**27)
    after = memory_gib(torch.device("cpu"))
    assert after - before > 0.4
    del block
    assert memory_gib(torch.device("cpu")) >= after


def test_evaluation_losses_are_read_back(tmp_path: Path) -> None:
    assert evaluation_losses(tmp_path) == {}
    tracker = open_tracker(tmp_path, resumed_step=0)
    run_steps(tracker, 1, 4)
    tracker.report({"kind": "eval", "step": 6, "eval/loss": math.nan})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "eval", "step": 8, "eval/lo')
    losses = evaluation_losses(tmp_path)
    assert list(losses) == [2, 4, 6]
    assert (losses[2], losses[4]) == (1.0, 0.5)
    assert math.isnan(losses[6])
