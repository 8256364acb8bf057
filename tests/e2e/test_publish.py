"""Publish, with a small real run: what leaves, what is stopped and why, and what the registry can say afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.storage import read_json, write_manifest
from tests.e2e.workshop import sftdist

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]  # two trainings, on a busy machine

WEIGHTS = "model.safetensors"
EARLIER = "checkpoint.every_steps=40"
TRAIN = ("train", "+exp=quickstart", "launch.nproc=1", "tracking.wandb=disabled")
JUDGE = ("evals.probes=[task,loss]", "evals.adversarial=false", "evals.max_prompts=40", "gate.min_prompts=30")
RULES = '["domain.chrf >= base + 0.1", "all.loss <= base", "domain.chrf >= last - 0.5"]'


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune in runs/full and a LoRA one in runs/lora, of the quickstart's base and data."""
    folder = tmp_path_factory.mktemp("shop")
    for method, steps in (("full", 60), ("lora", 30)):
        words = (
            f"run.dir=runs/{method}",
            f"run.name={method}",
            f"tune.method={method}",
            f"train.max_steps={steps}",
            EARLIER,
        )
        done = sftdist([*TRAIN, *words], folder, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def publish(folder: Path, run: str, *words: str, rules: str = RULES) -> subprocess.CompletedProcess[str]:
    return sftdist(
        ["publish", f"run.dir={run}", "name=bot", f"gate.rules={rules}", *JUDGE, *words], folder, timeout=900
    )


def release(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return sftdist(["release", *words], folder, timeout=900)


def copy_of(folder: Path, run: str, name: str) -> Path:
    """A copy of a run to plant a fault in."""
    return Path(shutil.copytree(folder / "runs" / run, folder / "runs" / name))


# --- what leaves --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def released(shop: Path) -> Path:
    """The shop with bot@v1 (the full run) and bot@v2 (the LoRA run)."""
    for number, run in ((1, "full"), (2, "lora")):
        done = publish(shop, f"runs/{run}", rules='["all.loss <= base", "domain.chrf >= base"]')
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"released bot@v{number}: registry/bot/v{number}" in done.stdout
    return shop


def test_a_release_holds_everything_and_verifies(released: Path) -> None:
    made = released / "registry" / "bot" / "v1"
    for name in ("README.md", "CHANGELOG.md", "release.json", "decision.json", "profile.json", "config.yaml"):
        assert (made / name).is_file(), name
    for name in ("report.json", "report.html", "rows.jsonl"):
        assert (made / "report" / name).is_file(), name
    exported, facts = read_json(released / "runs/full/export/manifest.json")["files"], read_json(made / "release.json")
    assert {name: facts["files"][name] for name in exported} == exported, "the model is the export, byte by byte"
    decision = read_json(released / "runs/full/report/decision.json")
    assert decision["passed"]
    assert decision["model"] == facts["model_sha256"]
    done = release(released, "verify", "bot@v1")
    assert done.returncode == 0, done.stderr
    assert "it loads in a fresh process; asked 'What can you help me with?' it says" in done.stdout
    lora = released / "registry" / "bot" / "v2"
    assert (lora / "adapter" / "adapter_model.safetensors").is_file(), "the adapter beside the merged model"
    assert "adapters (LoRA), rank 16" in (lora / "README.md").read_text()


def test_the_card_and_the_changelog_say_what_changed(released: Path) -> None:
    card = (released / "registry/bot/v1/README.md").read_text()
    report = read_json(released / "registry/bot/v1/report/report.json")
    assert report["split"] == "holdout"
    assert "This holdout was looked at" in card
    assert "| domain.chrf | 40 |" in card
    text = (released / "registry/bot/v2/CHANGELOG.md").read_text()
    assert text.index("## v2") < text.index("## v1")
    for words in ("Compared with v1", "tune.method: full -> lora", "train.max_steps: 60 -> 30", "- all.loss: 0."):
        assert words in text, words
    assert "domain, general, format: the rows are the same, and in the same splits" in text


def test_list_diff_and_rollback(released: Path) -> None:
    found: list[dict[str, Any]] = json.loads(release(released, "list", "--json").stdout)
    assert [(one["release"], one["in_use"]) for one in found] == [("bot@v1", False), ("bot@v2", True)]
    done = release(released, "diff", "bot@v1", "bot@v2")
    assert done.returncode == 0, done.stderr
    for words in ("tune.method: full -> lora", "adapter/adapter_model.safetensors: added", f"{WEIGHTS}: changed"):
        assert words in done.stdout, words
    assert release(released, "rollback", "bot@v1").stdout == "bot: in use is v1 now; before it was v2\n"
    assert "bot@v1   yes" in release(released, "list").stdout
    again = publish(released, "runs/lora", rules='["all.loss <= base"]')
    assert again.returncode == 0, again.stderr
    assert "this very model is released already: bot@v2" in again.stdout
    assert "bot@v1   yes" in release(released, "list").stdout, "what a rollback has done is not undone"
    assert release(released, "verify", "bot@v7").returncode == 2


def test_verify_names_what_was_added_changed_and_removed(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released / "registry", tmp_path / "registry")
    made = tmp_path / "registry" / "bot" / "v1"
    (made / "CHANGELOG.md").unlink()
    (made / "more.txt").touch()
    weights = made / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    done = release(tmp_path, "verify", "bot@v1")
    assert done.returncode == 4
    for words in ("more.txt: not in release.json", "CHANGELOG.md: missing", f"{WEIGHTS}: its sha256 is not the one"):
        assert words in done.stderr, words


# --- what is stopped ----------------------------------------------------------------------------------


def test_a_report_of_the_last_release_that_was_changed_decides_nothing(released: Path, tmp_path: Path) -> None:
    """Worse figures of the last release would let any model pass."""
    shutil.copytree(released / "registry", tmp_path / "registry")
    told = tmp_path / "registry/bot" / (tmp_path / "registry/bot/latest").read_text().strip() / "report/report.json"
    found = read_json(told)
    found["metrics"]["domain.chrf"]["tuned"] = [0.0] * len(found["metrics"]["domain.chrf"]["tuned"])
    told.chmod(0o644)
    told.write_text(json.dumps(found))
    done = publish(released, "runs/full", f"registry={tmp_path / 'registry'}", rules='["domain.chrf >= last + 0.2"]')
    assert done.returncode == 4, done.stdout
    assert "is not what was published:" in done.stderr
    assert "report/report.json" in done.stderr


def test_an_earlier_checkpoint_is_released_with_its_own_evaluation(released: Path) -> None:
    run = released / "runs" / "full"
    done = sftdist(["export", "run.dir=runs/full", "step=40"], released, timeout=900)
    assert done.returncode == 0, done.stderr
    (export,) = run.glob("export-step-*")
    done = publish(released, "runs/full", f"candidate={export}", rules='["all.loss <= base"]')
    assert done.returncode == 0, done.stdout + done.stderr
    made = released / "registry" / "bot" / "v3"
    told = read_json(made / "report" / "report.json")["tuned"]["sha256"]
    assert told == read_json(made / "release.json")["model_sha256"]
    assert told != read_json(released / "registry/bot/v1/release.json")["model_sha256"]
    assert "| steps | 40, " in (made / "README.md").read_text()
    assert " -> 40\n" in (made / "CHANGELOG.md").read_text()


def resealed(export: Path) -> None:
    """Whoever plants a fault may write a new manifest, too."""
    write_manifest(export)


def base_for_tuned(export: Path) -> None:
    shutil.copy(export.parents[2] / "quickstart" / "base" / WEIGHTS, export / WEIGHTS)
    resealed(export)


def nan_in_a_shard(export: Path) -> None:
    # bf16 has no numpy type: the bytes of one value, in place
    with (export / WEIGHTS).open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xc0\x7f")
    resealed(export)


def other_template(export: Path) -> None:
    template = export / "chat_template.jinja"
    template.write_text(template.read_text() + "{# more #}")
    resealed(export)


def flipped_byte(export: Path) -> None:
    content = bytearray((export / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (export / WEIGHTS).write_bytes(content)


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "base": ("full", base_for_tuned, "nothing was learned, or the base was put in the place of the tuned model"),
    "unmerged": ("lora", base_for_tuned, "is not merged into them; merge it"),
    "template": ("full", other_template, "the chat template is not the one of training"),
    "nan": ("full", nan_in_a_shard, "holds 1 value that is not finite"),
    "byte": ("full", flipped_byte, "its sha256 is not the one in manifest.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_speak_against_a_release(shop: Path, fault: str) -> None:
    """Before any prompt is asked: nothing is in the registry, and the holdout was not looked at."""
    run, plant, words = FAULTS[fault]
    made = copy_of(shop, run, f"bad-{fault}")
    plant(made / "export")
    looks = shop / "stores" / "holdout-looks.jsonl"
    before = looks.read_text() if looks.is_file() else ""
    done = publish(shop, str(made), f"registry=registry-{fault}")
    assert done.returncode == 4, done.stdout + done.stderr
    assert words in done.stderr
    assert "is not released" in done.stderr
    assert not (shop / f"registry-{fault}").exists()
    decision = read_json(made / "report" / "decision.json")
    assert not decision["passed"]
    assert any(words in reason for reason in decision["reasons"])
    assert (looks.read_text() if looks.is_file() else "") == before


def test_the_base_itself_and_another_runs_model_are_refused(shop: Path) -> None:
    done = publish(shop, "runs/full", "candidate=quickstart/base", "registry=registry-other")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "its weights are those of the base" in done.stderr
    done = publish(shop, "runs/full", "candidate=runs/lora/export", "registry=registry-other")
    assert done.returncode == 4
    assert "required an export of the run, which lies in runs/full" in done.stderr


def test_a_gate_that_is_not_passed(shop: Path) -> None:
    done = publish(shop, "runs/full", "registry=registry-gate", rules='["domain.chrf >= 0.999"]')
    assert done.returncode == 4, done.stdout + done.stderr
    assert "required at least 0.999" in done.stderr
    assert "rank 0" not in done.stderr, "it is a decision, not a failure of a rank"
    assert not (shop / "registry-gate").exists()


def test_five_prompts_decide_nothing(shop: Path) -> None:
    made = copy_of(shop, "full", "few")
    done = publish(shop, str(made), "evals.max_prompts=5", "registry=registry-few")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "5 prompts" in done.stderr
    assert "refused" in done.stderr
    assert not (shop / "registry-few").exists()


def test_a_row_of_the_holdout_among_the_training_data(shop: Path) -> None:
    """A run that was given the rows which are held out now. (With them held out, prepare itself keeps them away.)"""
    made = copy_of(shop, "full", "leaky")
    words = ("data.val_fraction=0", "data.holdout_fraction=0", "data.store_dir=all-stores")
    done = sftdist(["prepare", "+exp=quickstart", *words], shop, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(shop / "all-stores" / "data-manifest.json", made / "data-manifest.json")
    for store in (shop / "all-stores").glob("*-*/"):
        shutil.copytree(store, shop / "stores" / store.name, dirs_exist_ok=True)
    done = publish(shop, str(made), "registry=registry-leaky")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "held-out rows whose content the model was trained on, in source domain" in done.stderr
    assert not (shop / "registry-leaky").exists()


def test_nobody_chooses_an_easier_holdout_or_another_base(shop: Path) -> None:
    """All issues at once, before anything is loaded."""
    words = ("data.holdout=leaky.jsonl", "base=runs/lora/export", "split=validation", "name=a/b", "gate.rules=[]")
    done = sftdist(["publish", "run.dir=runs/full", *words], shop)
    assert done.returncode == 2
    for part in (
        "data.holdout: the run has None",
        "base: given",
        "split: given validation",
        "name: given",
        "gate.rules",
    ):
        assert part in done.stderr, part
    done = sftdist(["publish", "run.dir=nowhere", "name=bot", "gate=chat"], shop)
    assert done.returncode == 2
    assert "run.dir: given nowhere, required the directory of a run" in done.stderr
