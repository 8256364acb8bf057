"""A10: what a run is called, where it lies and what it trains does not depend on when it was started."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sftdist.core import config
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.resolve import literal, resolved
from sftdist.core.settings import InspectConfig


@pytest.fixture(autouse=True)
def _neutral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _ticket() -> Iterator[None]:
    """A resolver of a user's own program that never gives the same twice."""
    numbers = itertools.count()
    OmegaConf.register_new_resolver("ticket", lambda: next(numbers))
    OmegaConf.register_new_resolver("kept_ticket", lambda: next(numbers), use_cache=True)
    yield
    OmegaConf.clear_resolver("ticket")
    OmegaConf.clear_resolver("kept_ticket")


def issues_of(*words: str, exp: str = "quickstart") -> list[str]:
    try:
        compose(exp, words, complete=True)
    except ConfigError as error:
        return error.issues
    return []


DEPENDENT = [
    ["run.name=x-${now:%Y-%m-%d}"],
    ["run.dir=runs/${now:%H-%M-%S}"],
    ["run.dir=runs/${now:}"],
    ["data.store_dir=stores/${now:%j}"],
    ["+data.train=[a.jsonl,'b-${now:%f}.jsonl']"],
    ["data.sources.domain.path=x-${now:%p}"],
    ["model.template_args.today=${now:%d %B}"],
    ["+model.template_args={today: '${now:%d}'}"],
    ["seed='${oc.decode:${now:%S}}'"],
    ["run.name='a-${oc.env:NOT_SET_ANYWHERE,${now:%H}}'"],
    ["run.note=${now:%f}", "run.name=b-${run.note}"],
    ["run.note=${now:%f}", "run.name=b-${.note}"],
    ["run.note=${now:%f}", "tracking.group=${run.note}", "run.dir=runs/${oc.select:tracking.group}"],
    ["tracking.tags=['${now:%f}']", "run.name=c-${tracking.tags[0]}"],
    ["tracking.tags=['${now:%f}']", "tune.target=${tracking.tags}"],
    ["run={dir: null, name: 'n-${now:%f}', note: ''}"],
    ["run='${oc.create:{name:${now:%f}}}'"],
]


@pytest.mark.parametrize("words", DEPENDENT, ids=lambda words: words[-1])
def test_the_moment_in_what_makes_a_run_is_refused(words: list[str]) -> None:
    key = words[-1].lstrip("+").partition("=")[0]
    issue = issues_of(*words)[0]
    assert issue.startswith(key)
    assert "another value at each start" in issue
    assert "write a fixed value" in issue
    assert "${" in issue.partition(", which")[0], "the text as it was given"


FREE = [
    ["run.note=${now:%f}"],
    ["tracking.group=${now:%Y-%m}", "tracking.tags=['${now:%f}',x]", "tracking.project=${run.note}"],
    ["run.name=${oc.env:HOME_OF_RUNS}"],
    ["run.name=n-${seed}", "run.dir=runs/${run.name}"],
    ["run.note='a $ {b} \\\\${now:%f}'"],
]


@pytest.mark.parametrize("words", FREE, ids=lambda words: words[0])
def test_what_does_not_make_a_run_is_free(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_OF_RUNS", "shelf")
    assert issues_of(*words) == []
    first = compose("quickstart", words)
    time.sleep(0.01)
    second = compose("quickstart", words)
    assert (first.run.name, first.run.dir) == (second.run.name, second.run.dir)
    assert config.config_hash(first) == config.config_hash(second)


def test_the_moment_is_one_within_a_configuration_and_another_in_the_next() -> None:
    words = ["run.note=${now:%f}", "tracking.group=${now:%f}"]
    first, second = (compose("quickstart", words) for _ in range(2))
    assert first.run.note == first.tracking.group != second.run.note


def test_a_commands_own_output_may_carry_the_moment() -> None:
    cfg = compose("quickstart", ["file=page-${now:%Y}.html", "output=html"], InspectConfig)
    assert cfg.file is not None
    assert cfg.file[5:9].isdecimal()


@pytest.mark.usefixtures("_ticket")
@pytest.mark.parametrize("resolver", ["ticket", "kept_ticket"])
def test_any_resolver_that_is_never_the_same_is_refused(resolver: str) -> None:
    (issue,) = issues_of(f"run.name=n${{{resolver}:}}")
    assert "another value at each start" in issue
    assert issues_of(f"run.note=n${{{resolver}:}}") == []


@pytest.mark.parametrize("where", ["preset", "group"])
def test_files_are_looked_at_like_words(tmp_path: Path, where: str) -> None:
    for folder in ("exp", "data"):
        (tmp_path / "conf" / folder).mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_text("store_dir: stores-${now:%Y}\n")
    body = "run: {note: '${now:%f}', name: 'n-${run.note}'}\n" if where == "preset" else ""
    group = ", override /data: mine" if where == "group" else ""
    (tmp_path / "conf/exp/mine.yaml").write_text(f"# @package _global_\ndefaults: [quickstart{group}, _self_]\n{body}")
    key = "run.name: given n-${run.note}" if where == "preset" else "data.store_dir: given stores-${now:%Y}"
    (issue,) = issues_of(exp="mine")
    assert issue.startswith(f"{key}, which is another value at each start")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run.note=${hydra:job.name}", "run.note: given ${hydra:job.name}: a run has no settings of Hydra; write the"),
        ("run.note=${random:}", "run.note: given ${random:}: there is no resolver random; there are ${oc.env:NAME}"),
        ("run.note=${nothing}", "run.note: given ${nothing}: there is no key nothing; for the text itself"),
        ("run.note=a${no.such}", "run.note: given a${no.such}: there is no key no.such"),
        (
            "run.note=${oc.env:NOT_SET_ANYWHERE}",
            "the environment variable NOT_SET_ANYWHERE is not set; set it, or give",
        ),
        ("run.note=${run.note}", "run.note: given ${run.note}: it refers to itself"),
        (
            "run.dir=out/${run.name}",
            "run.name has no value yet; give run.name=..., or leave run.dir out: it is then runs",
        ),
        ("run.note=x${train.max_steps}y", "run.note: given x${train.max_steps}y: train.max_steps has no value yet"),
        ("run.note='${seed} ${train.max_steps}'", "train.max_steps has no value yet; give train.max_steps=..."),
        ("run.note=a${oc.env:NOT_SET_ANYWHERE,null}", "${oc.env:NOT_SET_ANYWHERE,null} has no value; write the value"),
        ("tracking.tags=['${nothing}']", "tracking.tags[0]: given ${nothing}"),
        ("data.sources.domain.path=${nothing}", "data.sources.domain.path: given ${nothing}"),
    ],
)
def test_what_cannot_be_resolved_is_named_with_all_other_issues(word: str, said: str) -> None:
    lines = issues_of(word, "zero.stage=9")
    assert any(said in line for line in lines), lines
    assert "zero.stage: given 9, required 0, 1, 2 or 3" in lines
    assert "full_key" not in "".join(lines)


@pytest.mark.parametrize(
    "word",
    [
        "tracking.group=${run.name}",
        r"run.note='\${run.name}'",
        r"run.note='a \${run.name} ${seed}'",
        "run.note='None ${seed}'",
        "run.note='a { ${seed} } ${train.epochs}'",
    ],
)
def test_null_alone_and_text_that_looks_like_it_stay(word: str) -> None:
    assert issues_of(word) == []
    assert compose("quickstart", [word]).run.name is not None


def test_all_that_cannot_be_resolved_at_once() -> None:
    words = ["run.note=${nothing}", "tracking.group=${random:}", "run.name=${now:%f}", "tracking.entity=${hydra:x}"]
    assert [issue.partition(":")[0] for issue in issues_of(*words)] == [
        "run.name",
        "run.note",
        "tracking.entity",
        "tracking.group",
    ]


def test_the_run_of_a_directory_is_found_whatever_its_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHICH", "one")
    first = compose("quickstart", ["run.dir=runs/one", "seed=7"])
    config.write_config(Path("runs/one"), first)
    for spelling in ("runs/one", "'~/runs/one'", "runs/${oc.env:WHICH}"):
        assert compose(None, [f"run.dir={spelling}"]).seed == 7, spelling


def test_what_was_resolved_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's config.yaml is read back literally, whatever its texts look like by now."""
    monkeypatch.setenv("ODD", r"${now:%f} \${x} \\${y} ${")
    first = compose(
        "quickstart", ["run.dir=runs/odd", "run.note=${oc.env:ODD}", "+model.template_args.x=${oc.env:ODD}"]
    )
    assert first.run.note == r"${now:%f} \${x} \\${y} ${"
    config.write_config(Path("runs/odd"), first)
    assert compose(None, ["run.dir=runs/odd"]) == first


@given(
    st.recursive(
        st.text("ab\\${}:.' ") | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("xy", min_size=1), inner),
    )
)
def test_literal_text_survives(value: object) -> None:
    issues: list[str] = []
    assert resolved(OmegaConf.create({"tracking": literal(value)}), issues) == {"tracking": value}
    assert issues == []
