"""Run the terminal sessions of the pages in this folder, and take their pictures.

    python docs/record.py                    every page that has a session
    python docs/record.py docs/tour.md       this page
    python docs/record.py --check            change nothing; end with 1 where a page shows what no longer comes
    python docs/record.py --keep=DIR ...     run in DIR/PAGE and leave it there; its first blocks, where the session has
                                             them as they are, are not run again

In a page, a block of shell below the comment `<!-- recorded -->` is run, all of them in one empty folder, one after
another; `<!-- recorded: exit 4 -->` expects another exit code than 0. The block of text that follows shows its output:
whole, or as some of its lines with `...` between them. An empty one is filled with all of it. A picture below
`<!-- screenshot: FILE WIDTHxHEIGHT -->` is what Chromium shows of that file of the folder; FILE may hold `*`, since a
run is named after its configuration.

Everything that was printed is kept in docs/sessions/PAGE.txt. A line of a page is written anew from the recorded line
that is like it but for its figures; where there is none, the page is wrong, and is named.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SESSIONS = DOCS / "sessions"
CUT = "..."
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

_MARK = r"<!-- recorded(?:: exit (?P<code>\d+))? -->\n"
_STEP = re.compile(
    _MARK + r"```bash\n(?P<words>.*?)^```$(?:(?P<between>\n(?:(?!```|<!--)[^\n]*\n)*?)```text\n(?P<shown>.*?)^```$)?",
    re.M | re.S,
)
_PICTURE = re.compile(r"<!-- screenshot: (?P<file>\S+) (?P<size>\d+x\d+) -->\n!\[[^\]]*\]\((?P<to>[^)]+)\)")
# What differs from run to run: figures with their units, hexadecimal names, and how columns and rules are padded.
_VARIES = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,}\b|(?:(?<!\w)[-+])?\d[\d,.:]*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Step:
    """A block of shell with the exit code that it must have, and the text below it; None where the page shows none."""

    words: str
    code: int
    shown: str | None


def steps(page: str) -> list[Step]:
    return [Step(found["words"], int(found["code"] or 0), found["shown"]) for found in _STEP.finditer(page)]


def session_file(page: Path) -> Path:
    return SESSIONS / f"{page.stem}.txt"


def recorded(session: str) -> list[tuple[str, str]]:
    """The blocks of a session file with what each printed."""
    parts = re.split(r"^\$\$\n(.*?)^\$\$\n", session, flags=re.M | re.S)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def mask(line: str) -> str:
    """A line without what differs from run to run."""
    return re.sub(r"[\s─━=-]{2,}", " ", _VARIES.sub("#", line)).strip()


def excerpt(shown: str, printed: str) -> tuple[str, list[str]]:
    """`shown` with each line taken anew from what was printed, and those of its lines that nothing there is like."""
    if not shown.strip():
        return printed, []
    lines, place, missing = [], 0, []
    rest = printed.splitlines()
    for line in shown.splitlines():
        if line.strip() in ("", CUT):
            lines.append(line)
            continue
        at = next((i for i in range(place, len(rest)) if mask(rest[i]) == mask(line)), None)
        if at is None:
            missing.append(line)
            lines.append(line)
        else:
            lines.append(rest[at])
            place = at + 1
    return "\n".join(lines) + "\n", missing


def unrecorded(page: str, session: str) -> list[str]:
    """Where a page and its session differ: its blocks, or lines that were not printed as they stand."""
    wanted, have = steps(page), recorded(session)
    if [step.words for step in wanted] != [words for words, _ in have]:
        return ["its commands are not those of the session"]
    found = []
    for step, (_, printed) in zip(wanted, have, strict=True):
        rest = iter(printed.splitlines())
        shown = [line for line in (step.shown or "").splitlines() if line.strip() not in ("", CUT)]
        found += [line for line in shown if line not in rest]
    return found


def play(page: str, folder: Path, known: Sequence[tuple[str, str]] = ()) -> Iterator[tuple[Step, str]]:
    """Run each block in `folder`; yields it with what it printed. Raises RuntimeError for another exit code.

    `known`: the first blocks with what they printed there before; those are not run again.
    """
    known = list(known)
    for step in steps(page):
        if known and known[0][0] == step.words:
            yield step, known.pop(0)[1]
            continue
        known = []
        print(f"  {step.words.strip().splitlines()[0]}", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["bash", "-eu", "-c", step.words],
            cwd=folder,
            env=_variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != step.code:
            raise RuntimeError(f"{step.words}ended with {done.returncode}, not {step.code}:\n{done.stdout[-4000:]}")
        yield step, _plain(done.stdout, folder)


def _variables() -> dict[str, str]:
    own = {"COLUMNS": "120", "NO_COLOR": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **own, "PATH": path}


def _plain(text: str, folder: Path) -> str:
    """Without the names of this machine and its folders."""
    text = text.replace(f"{folder}/", "").replace(str(folder), ".").replace(socket.gethostname(), "host")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def photograph(page: str, folder: Path) -> None:
    """Take the pictures of a page."""
    browser = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    for found in _PICTURE.finditer(page):
        if browser is None:
            raise RuntimeError("no Chromium on this machine for the pictures")
        picture = DOCS / found["to"]
        picture.parent.mkdir(exist_ok=True)
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        size = f"--window-size={found['size'].replace('x', ',')}"
        (target,) = folder.resolve().glob(found["file"])
        command = [browser, *options, size, f"--user-data-dir={folder}/.profile", f"--screenshot={picture}"]
        subprocess.run([*command, target.as_uri()], check=True, capture_output=True)


def record(page: Path, kept: Path | None = None) -> list[str]:
    """Run the session of a page; write its session file, its shown lines and its pictures. What no longer comes.

    `kept`: a folder to run in that stays, and may be there already.
    """
    with tempfile.TemporaryDirectory(prefix="sftdist-") as name:
        folder = Path(name) if kept is None else kept / page.stem
        known = recorded(session_file(page).read_text(encoding="utf-8")) if kept and folder.is_dir() else []
        folder.mkdir(parents=True, exist_ok=True)
        played = list(play(page.read_text(encoding="utf-8"), folder, known))
        text = page.read_text(encoding="utf-8")  # again: somebody may have gone on writing
        photograph(text, folder)
    SESSIONS.mkdir(exist_ok=True)
    session = "".join(f"$$\n{step.words}$$\n{printed}" for step, printed in played)
    session_file(page).write_text(session, encoding="utf-8")
    if steps(text) != [step for step, _ in played]:
        return ["its blocks were changed while they ran: run it again"]
    found = [excerpt(step.shown, printed) if step.shown is not None else (None, []) for step, printed in played]
    fresh = iter(shown for shown, _ in found)
    page.write_text(_STEP.sub(lambda block: _with(block, next(fresh)), text), encoding="utf-8")
    return [line for _, missing in found for line in missing]


def check(page: Path) -> list[str]:
    """Run the session of a page; the lines that it shows and that nothing printed is like."""
    with tempfile.TemporaryDirectory(prefix="sftdist-") as name:
        played = play(page.read_text(encoding="utf-8"), Path(name))
        return [line for step, printed in played for line in excerpt(step.shown or CUT, printed)[1]]


def _with(found: re.Match[str], shown: str | None) -> str:
    if shown is None:
        return found[0]
    start, end = (found.span("shown")[i] - found.start() for i in (0, 1))
    return found[0][:start] + shown + found[0][end:]


def pages() -> list[Path]:
    return [page for page in sorted(DOCS.glob("*.md")) if steps(page.read_text(encoding="utf-8"))]


def main(words: Sequence[str]) -> int:
    kept = next((Path(word.partition("=")[2]).resolve() for word in words if word.startswith("--keep=")), None)
    code = 0
    for page in [Path(word).resolve() for word in words if not word.startswith("--")] or pages():
        print(page.name, file=sys.stderr, flush=True)
        for line in check(page) if "--check" in words else record(page, kept):
            print(f"{page.name}: nothing printed is like: {line}")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
