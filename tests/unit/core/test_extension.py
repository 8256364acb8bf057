"""Import paths: what is found, what is said of what is not, and which edits are seen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.extension import load_function, load_named, require_call, require_same_code, source_of
from sftdist.core.snapshot import config_hash, differences, from_dict, hashed_part, to_dict

KEY = "train.loss"
RUN = ("model.path=model", "data.train=my.jsonl")
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the working directory; what an earlier version of it was is forgotten."""
    monkeypatch.chdir(tmp_path)
    names: set[str] = set()

    def written(name: str, code: str) -> None:
        names.add(name)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        for known in names:
            sys.modules.pop(known, None)
        importlib.invalidate_caches()

    yield written
    for known in names:
        sys.modules.pop(known, None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("own_code", "given own_code, required package.module:name"),
        ("own_code:", "given own_code:, required package.module:name"),
        (":double", "given :double, required package.module:name"),
        ("no_such_module:f", "required a module that imports: No module named 'no_such_module'"),
        ("own_code:triple", "required a name that is in own_code; it has no triple"),
        ("own_code:NUMBER", "required a function or class; it is int"),
        (
            "own_broken:f",
            r"required a module that imports: ZeroDivisionError: .* \(own_broken.py, line 3\)",
        ),
        ("own_torn:f", "required a module that imports: SyntaxError"),
    ],
)
def test_what_is_not_there_is_named(path: str, said: str, write: Write) -> None:
    write("own_code", "NUMBER = 3\n\n\ndef double(x):\n    return 2 * x\n")
    write("own_broken", "def f():\n    pass\na = 1 / 0\n")
    write("own_torn", "def f(:\n")
    with pytest.raises(
        ConfigError, match=f"^{KEY}: given {path}, {said}" if "given" not in said else f"^{KEY}: {said}"
    ):
        load_function(path, KEY)


def test_what_is_there_is_found_in_the_working_directory(write: Write) -> None:
    write("own_code", "NUMBER = 3\n\n\ndef double(x):\n    return 2 * x\n")
    assert load_function("own_code:double", KEY)(4) == 8
    assert load_named("own_code:NUMBER", KEY) == 3


def test_a_signature_that_does_not_fit_is_shown() -> None:
    def short(logits: Any) -> Any:
        return logits

    assert require_call(short, "own:short", KEY, "a function (logits)", 1) is short
    with pytest.raises(ConfigError, match=r"required a function \(logits, targets\); too many .*: it is short\(logits"):
        require_call(short, "own:short", KEY, "a function (logits, targets)", 1, 2)
    assert require_call(max, "builtins:max", KEY, "anything", 1, 2, 3) is max  # it says nothing of itself


def test_an_edit_of_what_it_uses_is_seen_and_of_others_not(write: Write) -> None:
    def hashed() -> str:
        return source_of("own_code:f", KEY)["sha256"]

    write("own_other", "def g():\n    return 1\n")
    write("own_used", "def h():\n    return 1\n")
    write("own_code", "import json\n\nfrom own_used import h\n\n\ndef f():\n    return h()\n")
    first = hashed()
    write("own_other", "def g():\n    return 2\n")
    assert hashed() == first
    write("own_used", "def h():\n    return 2\n")
    assert hashed() != first


def test_an_environment_below_the_folder_is_not_the_users_source(tmp_path: Path, write: Write) -> None:
    library = tmp_path / "venv/lib/site-packages"
    library.mkdir(parents=True)
    (library / "own_library.py").write_text("def g():\n    return 1\n")
    sys.path.insert(0, str(library))
    try:
        write("own_code", "import own_library\n\n\ndef f():\n    return own_library.g()\n")
        first = source_of("own_code:f", KEY)
        (library / "own_library.py").write_text("def g():\n    return 2\n")
        assert source_of("own_code:f", KEY) == first
    finally:
        sys.path.remove(str(library))
        sys.modules.pop("own_library", None)


LOSS = "def loss(logits, targets):\n    return (logits * {}).sum(-1)\n"


def test_the_source_of_what_is_trained_by_is_part_of_the_configuration(write: Write) -> None:
    plain = compose("lora", RUN)
    assert plain.code == {}
    assert "code" not in hashed_part(plain)  # nothing changes for a run without
    write("own_loss", LOSS.format(1))
    before = compose("lora", [*RUN, "train.loss=own_loss:loss"])
    write("own_loss", LOSS.format(2))
    after = compose("lora", [*RUN, "train.loss=own_loss:loss"])
    assert config_hash(before) != config_hash(after)
    assert before.run.name != after.run.name
    assert list(differences(before, after)) == ["code.train.loss"]
    assert from_dict(to_dict(after)) == after
    write("own_loss", LOSS.format(3))
    with pytest.raises(ConfigError, match=r"train.loss: given own_loss:loss, whose source on .* is not that of rank 0"):
        require_same_code(after)


def test_hooks_and_trackers_are_no_part_of_what_is_trained(write: Write) -> None:
    write("own_hook", "class Hook:\n    pass\n")
    plain = compose("lora", RUN)
    more = compose("lora", [*RUN, "train.hooks=[own_hook:Hook]", "tracking.sinks=[own_hook:Hook]"])
    assert config_hash(plain) == config_hash(more)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("optimizer.name=adamW",),
            "given 'adamW', required one of adamw, sgd, or package.module:name;",
        ),
        (("optimizer.schedule=cosin",), "or package.module:name; did you mean cosine"),
        (("optimizer.args={lr:1}",), r"optimizer.args: given \{'lr': 1\} with optimizer.name=adamw, which takes none"),
        (("optimizer.schedule_args={a:1}",), "optimizer.schedule_args: .* with optimizer.schedule=cosine"),
        (("train.loss_args={a:1}",), "train.loss_args: given .* without train.loss"),
        (("train.loss=focal",), "train.loss: given 'focal', required package.module:name"),
        (("train.hooks=[own]",), "train.hooks: given 'own', required package.module:name"),
        (("tracking.sinks=[a:b,a:b]",), "tracking.sinks: given .*, required each of them once"),
        (("optimizer.name=torch.optim:Adamax", "optimizer.betas=[0.5,0.5]"), "optimizer.betas: .* in optimizer.args"),
        (("optimizer.name=torch.optim:Nothing",), "optimizer.name: .* it has no Nothing"),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("lora", [*RUN, *words])
