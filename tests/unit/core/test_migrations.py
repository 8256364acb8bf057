"""Renamed and removed keys: named wherever they are written, with what to write; earlier files are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core import migrations, snapshot
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.settings import CONFIG_VERSION, TrainConfig
from sftdist.core.typed import options

TABLE = {
    2: {
        "train.pack_length": "train.packed",
        "data.sources.<name>.share": "data.sources.<name>.lam",
        "logging": "tracking",
        "tune.quantised": "bitsandbytes is gone; give a quantised model.path instead",
    },
    3: {"train.packed": "train.pack_tokens"},
}
KEYS = {key for key, _, _ in options(TrainConfig)}


@pytest.fixture
def version_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A later sftdist, that has renamed some keys twice, in an empty working directory."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(migrations, "CHANGES", TABLE)
    for module in (migrations, snapshot):
        monkeypatch.setattr(module, "CONFIG_VERSION", 3)
    return tmp_path


def issues_of(*words: str, exp: str | None = "quickstart") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(exp, words, complete=True)
    return caught.value.issues


def test_the_shipped_table_is_of_keys_that_are_gone() -> None:
    assert set(migrations.CHANGES) <= set(range(2, CONFIG_VERSION + 1))
    for number, changes in migrations.CHANGES.items():
        for old in changes:
            assert not any(key == old or key.startswith(f"{old}.") for key in KEYS), f"{old} of {number} is in use"
            assert migrations.advice(old) is not None


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train.pack_length", "renamed to train.pack_tokens in config_version 3: write train.pack_tokens=..."),
        ("train.packed", "renamed to train.pack_tokens in config_version 3: write train.pack_tokens=..."),
        ("logging.project", "renamed to tracking.project in config_version 2: write tracking.project=..."),
        ("logging", "renamed to tracking in config_version 2: write tracking=..."),
        ("data.sources.a.share", "renamed to data.sources.a.lam in config_version 2: write data.sources.a.lam=..."),
        ("tune.quantised", "removed in config_version 2: bitsandbytes is gone; give a quantised model.path instead"),
        ("train.pack_lengths", None),
        ("loggings.project", None),
        ("train.pack_tokens", None),
    ],
)
def test_what_is_said_of_a_key(version_3: Path, key: str, said: str | None) -> None:
    assert migrations.advice(key) == (None if said is None else f"{key}: {said}")


def test_old_keys_on_the_command_line_and_in_a_users_files_come_with_all_other_issues(version_3: Path) -> None:
    own = version_3 / "conf" / "exp"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [quickstart, _self_]\nconfig_version: 1\n"
        "logging: {project: x, entity: y}\ndata: {sources: {domain: {share: 0.5}}}\n"
    )
    found = issues_of("+train.pack_length=4096", "zero.stage=9", "nonsense=1", exp="mine")
    starts = [issue.partition(" in config_version")[0] for issue in found]
    assert sorted(starts) == [
        "data.sources.domain.share: renamed to data.sources.domain.lam",
        "logging.entity: renamed to tracking.entity",
        "logging.project: renamed to tracking.project",
        "nonsense: unknown key; see --help for all keys",
        "train.pack_length: renamed to train.pack_tokens",
        "zero.stage: given 9, required 0, 1, 2 or 3",
    ]


def test_a_run_of_an_earlier_version_goes_on_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is in no hash: with it in, every upgrade would begin every run anew."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "out" / "one"
    snapshot.write_config(run_dir, compose("quickstart", ["run.dir=out/one", "run.note=two ${oc.env:HOME}"]))
    assert (run_dir / "config.yaml").read_text().startswith("config_version: 1\n")
    before, name = snapshot.read_config(run_dir), compose("quickstart").run.name
    for module in (migrations, snapshot):
        monkeypatch.setattr(module, "CONFIG_VERSION", 2)
    again = compose(None, ["run.dir=out/one"], complete=True)
    assert snapshot.differences(snapshot.read_config(run_dir), again) == {}
    assert snapshot.config_hash(again) == snapshot.config_hash(before)
    assert (again.config_version, again.run.note) == (2, before.run.note)
    assert compose("quickstart").run.name == name
    snapshot.write_config(run_dir, again)
    assert (run_dir / "config.yaml").read_text().startswith("config_version: 2\n")


def test_old_keys_of_a_run_directory_are_named_with_its_file(version_3: Path) -> None:
    run_dir = version_3 / "out" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("config_version: 1\nlogging: {project: x}\ntrain: {packed: 5}\n")
    expected = [
        "out/one/config.yaml: logging.project: renamed to tracking.project",
        "out/one/config.yaml: train.packed: renamed to train.pack_tokens",
    ]
    found = issues_of("run.dir=out/one", "zero.stage=9", exp=None)
    assert [issue.partition(" in config_version")[0] for issue in found][:2] == expected
    assert "zero.stage: given 9, required 0, 1, 2 or 3" in found
    with pytest.raises(ConfigError, match=r"logging\.project: renamed to tracking\.project in"):
        snapshot.read_config(run_dir)


@pytest.mark.parametrize("version", ["4", "0", "-1", "1.5", "new", "true", "null"])
def test_a_version_that_cannot_be_read_is_the_only_issue(version_3: Path, version: str) -> None:
    """What a later sftdist has written may hold keys that we would call wrong."""
    run_dir = version_3 / "out" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"config_version: {version}\nfrom_the_future: 1\n")
    for words, exp in ((["run.dir=out/one"], None), ([f"config_version={version}"], "quickstart")):
        (issue,) = issues_of(*words, exp=exp)
        assert issue.startswith("config_version: given " if exp else "out/one/config.yaml: config_version: given ")
        assert "3" in issue
    assert ("newer one" in issue) == (version == "4")
