"""Wrong command lines as people type them: each gets one line that says what to write instead, and that is right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.words import word

HYDRA_SPEAK = r"full_key|DictConfig|ListConfig|object_type|mismatched input|extraneous|no viable|defaults list"
MIX = "{domain:0.6,general:0.3,format:0.1}"


@pytest.fixture(autouse=True)
def _neutral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)


def issues_of(words: list[str]) -> list[str]:
    try:
        compose(None, words, complete=True)
    except ConfigError as error:
        return error.issues
    return []


# What follows `+exp=quickstart`, split as a shell splits it: the issue's beginning, and the word that it advises.
ADVISED = [
    # the shell
    (f"+data.mix={MIX.replace(',', ' ')}", "+data.mix=", f"'+data.mix={MIX}'"),
    (f"+data.mix={MIX.replace(',', ', ').replace(':', ': ')}", "+data.mix=", f"'+data.mix={MIX}'"),
    (
        "+data.mix=domain:0.6 +data.mix=general:0.3 +data.mix=format:0.1",
        "data.mix: given 3 times in a row",
        f"'data.mix={MIX}'",
    ),
    ("data.train=x/a.jsonl data.train=x/b.jsonl", "data.train: given 2 times", "'data.train=[x/a.jsonl,x/b.jsonl]'"),
    ("data.train=a.jsonl b.jsonl", "data.train=a.jsonl b.jsonl: given a value that", "'data.train=[a.jsonl,b.jsonl]'"),
    ("run.dir=/a b/c", "run.dir=/a b/c: given a value that the shell", "'run.dir=/a b/c'"),
    ("run.note=over the top", "run.note=over the top: given a value", "'run.note=over the top'"),
    ("'run.note=it'\"'\"'s mine'", "run.note: the value has characters", '"run.note=\\"it\'s mine\\""'),
    ("run.dir=/x/lr=1e-4", "run.dir: the value has characters", "'run.dir=\"/x/lr=1e-4\"'"),
    ("optimizer.lr 1e-4", "optimizer.lr 1e-4: given words without '='", "optimizer.lr=1e-4"),
    ("optimizer.lr = 1e-4", "optimizer.lr = 1e-4: given words without", "optimizer.lr=1e-4"),
    ("'optimizer.lr = 1e-4'", "optimizer.lr = 1e-4: given spaces around", "optimizer.lr=1e-4"),
    ("optimizer.lr: 1e-4", "optimizer.lr: 1e-4: given words", "optimizer.lr=1e-4"),
    # options of other programs
    ("--lr 1e-4", "--lr 1e-4: unknown option", "optimizer.lr=1e-4"),
    ("--learning_rate=1e-4", "--learning_rate=1e-4: unknown option", "optimizer.lr=1e-4"),
    ("\N{EN DASH}optimizer.lr=1e-4", "\N{EN DASH}optimizer.lr=1e-4: unknown option", "optimizer.lr=1e-4"),
    ("--dry-run", "--dry-run: unknown option", "dry_run=true"),
    ("dry_run", "dry_run: given a word without '='", "dry_run=true"),
    ("dry_run=yes", "dry_run: given 'yes', required true or false", "true"),
    # lists and mappings
    ("data.mix=0.6,0.3,0.1", "data.mix: given several values", "'data.mix=[0.6,0.3,0.1]'"),
    ("data.mix=domain:0.6,general:0.3,format:0.1", "data.mix: given several values", f"'data.mix={MIX}'"),
    ("tune.target=q_proj,v_proj", "tune.target: given several values", "'tune.target=[q_proj,v_proj]'"),
    ("'optimizer.betas=(0.9,0.95)'", "optimizer.betas: given a list in round brackets", "'optimizer.betas=[0.9,0.95]'"),
    ("tracking.tags=a", "tracking.tags: given 'a', required a list", "tracking.tags=[a]"),
    ("optimizer.lr=1e-4,", "optimizer.lr: given a comma at the end", "optimizer.lr=1e-4"),
    ("'run.note=hello, world'", "run.note: given several values", "'run.note=\"hello, world\"'"),
    # mappings as JSON or Python writes them
    ('\'+data.mix={"domain":0.6,"general":0.3,"format":0.1}\'', "+data.mix: given {", f"'+data.mix={MIX}'"),
    ("\"data.mix={'domain':0.6,'general':0.3,'format':0.1}\"", "data.mix: given {", f"'data.mix={MIX}'"),
    ("\"+model.template_args={'a b':1}\"", "+model.template_args: given {", "'+model.template_args={a b:1}'"),
    (
        '\'model.template_args={"a": {"b" : "c, d"}}\'',
        "model.template_args: given {",
        "'model.template_args={a: {b: \"c, d\"}}'",
    ),
    ("'data.mix={domain:0.6'", "data.mix: given {domain:0.6, which cannot be read; a mapping reads", "{key:value"),
    ("'run.note={\"a\":1}'", "run.note: the value has characters", '\'run.note="{\\"a\\":1}"\''),
    (r"'run.note=a=b\'", "run.note: the value has characters", r"""'run.note="a=b\\"'"""),
    # groups, sections and keys
    ("data=my.jsonl", "data: given 'my.jsonl', required a section", "data.train=my.jsonl"),
    ("run=somewhere", "run: given 'somewhere', required a section", "run.dir=somewhere"),
    ("optimizer=1e-4", "optimizer: given 0.0001, required a section", "optimizer.lr=0.0001"),
    ("data.sources.domain=x.jsonl", "data.sources.domain: given 'x.jsonl'", "data.sources.domain.path=x.jsonl"),
    ("model=chatsmall", "model=chatsmall: not in conf/model", "chat_small"),
    ("zero/1", "zero/1: given a word without '='", "zero=1"),
    ("conf/zero=1", "conf/zero: unknown key", "zero=1"),
    ("zero@optimizer=1", "zero@optimizer=1: given @optimizer", "zero=1"),
    ("zero 1", "zero 1: given words without '='", "zero=1"),
    ("Optimizer.LR=1e-4", "Optimizer.LR: unknown key", "optimizer.lr"),
    ("optimiser.lr=1e-4", "optimiser.lr: unknown key", "optimizer.lr"),
    ("optimizer:lr=1e-4", "optimizer:lr=1e-4: given a key with characters", "optimizer.lr"),
    ("train.train.epochs=1", "train.train.epochs: unknown key", "train.epochs"),
    ("model.add_tokens=[<a>,b]", "model.add_tokens: the list has texts", '\'model.add_tokens=["<a>","b"]\''),
    ("run.note='${a'", "run.note: the value has characters that need quotes", "'run.note=\"\\${a\"'"),
]


@pytest.mark.parametrize(("line", "start", "advised"), ADVISED, ids=[line for line, _, _ in ADVISED])
def test_one_issue_that_says_what_to_write(line: str, start: str, advised: str) -> None:
    (issue,) = issues_of(["+exp=quickstart", *shlex.split(line)])
    assert issue.startswith(start)
    assert advised in issue
    assert not re.search(HYDRA_SPEAK, issue)
    if "=" in advised:
        assert issues_of(["+exp=quickstart", *shlex.split(advised)]) == [], "the advice is right"


PRESETS = [
    ("quickstart", "quickstart: given a word without '='", "+exp=quickstart"),
    ("exp quickstart", "exp quickstart: given words without '='", "exp=quickstart"),
    ("exp/quickstart", "exp/quickstart: given a word without '='", "exp=quickstart"),
    ("+experiment=quickstart", "experiment: unknown key", "+exp=quickstart"),
    ("--config=quickstart.yaml", "--config=quickstart.yaml: unknown option", "+exp=quickstart"),
    ("--config-name quickstart", "--config-name quickstart: unknown option", "+exp=quickstart"),
    ("+exp=quickstrat", "exp=quickstrat: not in conf/exp", "did you mean quickstart?"),
    ("+exp=quickstart.yaml", "exp=quickstart.yaml: not in conf/exp", "did you mean quickstart?"),
    ("+exp=conf/exp/quickstart.yaml", "exp=conf/exp/quickstart.yaml: not in conf/exp", "did you mean quickstart?"),
    ("exp=quickstart,lora", "exp: given several values", "add -m"),
    ("+exp=quickstart +exp=lora", "exp: given quickstart and lora", "required one preset"),
    ("+exp=[quickstart]", "+exp=[quickstart]: given no name", "+exp=NAME"),
    ("+exp=", "exp=: not in conf/exp", "llama8b_lora"),
]


@pytest.mark.parametrize(("line", "start", "advised"), PRESETS)
def test_a_preset_that_is_not_found_is_the_only_issue(line: str, start: str, advised: str) -> None:
    """That there is no model, no data and no step size then only follows."""
    (issue,) = issues_of(shlex.split(line))
    assert issue.startswith(start)
    assert advised in issue


def test_faults_of_several_words_come_together() -> None:
    words = ["+exp=quickstart", "--lr", "1e-4", "run.dir=/a", "b", "seed=1,2", "zero/1", "", "optimizer.lr=3e-4"]
    assert [issue.partition(":")[0] for issue in issues_of(words)] == ["--lr 1e-4", "run.dir=/a b", "zero/1", "seed"]


def test_a_later_word_wins_unless_a_shell_has_made_both() -> None:
    """Scripts put the user's words behind their own."""
    cfg = compose("quickstart", ["optimizer.lr=1", "optimizer.lr=2", "data.mix=balanced", "seed=1", "data.mix=[1,2,3]"])
    assert cfg.optimizer.lr == 2
    assert cfg.data.sources["format"].lam == pytest.approx(0.5)
    assert compose("quickstart", ["data.train=a.jsonl", "data.train=a.jsonl"]).data.sources["train"].path == "a.jsonl"


def test_rules_about_a_value_that_was_left_out_are_not_told() -> None:
    """With the default in its place they would speak of a number that nobody gave."""
    assert len(issues_of(["+exp=quickstart", "data.max_len=8k"])) == 1
    both = issues_of(["+exp=quickstart", "data.max_len=8k", "zero.stage=9", "optimizer.lr=0"])
    assert [issue.partition(":")[0] for issue in both] == ["data.max_len", "optimizer.lr", "zero.stage"]


@pytest.mark.parametrize(
    "text", [r"\${a}", r"\\${a", "a b", "it's", 'say "x"', "a,b", "${x}", "{a}", "", "k=v", "\\", "~/x", "1e-4", "null"]
)
def test_any_text_can_be_a_value(text: str) -> None:
    assert compose("quickstart", [word("run.note", text)]).run.note == text


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("key", ["seed", "optimizer.lr", "train.max_steps"])
def test_a_number_that_no_machine_holds_is_an_issue(key: str, digits: int) -> None:
    (issue,) = issues_of(["+exp=quickstart", f"{key}={'9' * digits}"])
    assert issue.startswith(f"{key}: ")


@pytest.mark.parametrize("name", [" ", " a", "a "])
def test_a_name_with_spaces_around_it_is_refused(name: str) -> None:
    (issue,) = issues_of(["+exp=quickstart", word("run.name", name)])
    assert issue.startswith(f"run.name: given {name!r}, required a name")
    assert issues_of(["+exp=quickstart", "run.name=a b"]) == []
