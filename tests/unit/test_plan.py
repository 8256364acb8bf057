"""`sftdist plan`: memory and time of every choice, what fits, how a job scales, and what would fit instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sftdist import plan
from sftdist.core import config
from sftdist.core.errors import ConfigError
from sftdist.core.settings import PlanConfig
from sftdist.model import cost
from sftdist.model.hardware import GPUS, Cluster
from sftdist.training.choices import choice, recomputing, typical_step
from sftdist.training.plan_view import PlanResult, as_json, efficiency, lines, page, scaling_svg
from sftdist.training.planned_model import planned_config

LLAMA = planned_config(config.compose("llama8b", (), PlanConfig), 0).to_dict()
EIGHT = ("cluster.gpus=8", "cluster.memory_gib=80")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFTDIST_DATA", raising=False)


def planned(exp: str, *words: str) -> PlanResult:
    return plan.run(config.compose(exp, words, PlanConfig), lambda text: None)


@pytest.fixture(scope="module")
def eight() -> PlanResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SFTDIST_DATA", raising=False)
        return planned("llama8b", *EIGHT)


def test_every_choice_is_there(eight: PlanResult) -> None:
    kinds = {(one.cfg.zero.stage, str(one.cfg.zero.offload)) for one in eight.choices}
    assert kinds == {(0, "none"), *((stage, place) for stage in (1, 2, 3) for place in ("none", "optimizer"))}
    for kind in kinds:
        counts = [one.recomputed for one in eight.choices if (one.cfg.zero.stage, str(one.cfg.zero.offload)) == kind]
        assert counts[0] == 0
        assert counts[-1] == 32
        assert len(counts) == 3
    assert all(one.fits == (one.needed <= 80 * cost.GIB) for one in eight.choices)
    assert (eight.parameters, eight.trainable) == (8_030_261_248, 8_030_261_248)


@pytest.mark.parametrize("exp", ["llama8b", "quickstart"])
def test_each_line_of_the_table_adds_up(exp: str) -> None:
    result = planned(exp, *EIGHT, *([] if exp == "llama8b" else ["data.train=absent.jsonl"]))
    text = list(lines(result))
    heads = text[4].split()
    table = [line.replace(",", "").split() for line in text[5 : 5 + len(result.choices)]]
    for line in table:
        cells = dict(zip(reversed(heads), reversed(line), strict=False))
        parts = heads[heads.index("recomputed") + 1 : heads.index("total")]
        assert {"weights", "gradients", "optimizer", "activations", "logits", "margin"} <= set(parts)
        assert sum(float(cells[part]) for part in parts) == pytest.approx(float(cells["total"]), abs=0.5)
        assert float(cells["activations"]) > 0


def test_selective_recomputation_is_the_least_that_fits(eight: PlanResult) -> None:
    found = False
    for none, some, every in zip(*(iter(eight.choices),) * 3, strict=True):
        assert none.needed > some.needed > every.needed
        assert none.terms.total < some.terms.total < every.terms.total
        if every.fits and not none.fits:
            found = True
            fewer = recomputing(some.cfg, some.recomputed - 1, 32)
            assert some.fits
            assert not choice(fewer, LLAMA, Cluster(eight.gpu, 8), eight.step, 80 * cost.GIB).fits
    assert found


def test_the_fastest_that_fits(eight: PlanResult) -> None:
    assert eight.best is not None
    assert eight.best.fits
    least = min(one.terms.total for one in eight.choices if one.fits)
    assert eight.best.terms.total <= 1.02 * least
    assert eight.configured.recomputed == 32
    assert eight.best.terms.total < eight.configured.terms.total
    again = planned("llama8b", *EIGHT, *eight.best.words())
    assert again.configured.needed == eight.best.needed, "the words stand for the choice"
    assert again.configured.terms == eight.best.terms


@pytest.mark.parametrize("exp", ["llama8b", "llama8b_lora", "chat_small", "quickstart"])
def test_every_preset_is_planned(exp: str) -> None:
    result = planned(exp, *EIGHT)
    assert result.best is not None
    text = "\n".join(lines(result))
    assert "The fastest" in text or "It is the fastest" in text
    assert ("The whole job: not known" in text) == (exp != "quickstart"), "only the quickstart brings its data along"
    assert "nan" not in text
    assert "inf" not in text


def test_the_job_of_the_actual_store() -> None:
    result = planned("quickstart", "cluster.gpus=2")
    assert result.totals is not None
    assert result.best is not None
    hours = result.hours(result.best.terms, result.step)
    assert hours * 3600 == pytest.approx(result.totals.steps * result.best.terms.total, rel=0.02)
    assert 0.5 < result.step.balance <= 1
    assert result.step.tokens == pytest.approx(result.totals.tokens / result.totals.packs)
    assert f"{result.totals.steps:,} steps" in "\n".join(lines(result))


def test_how_a_job_scales() -> None:
    result = planned("llama8b", "cluster.gpus=[8,64,512]")
    assert [one.gpus for one in result.scaling] == [8, 64, 512]
    shares = [efficiency(result, one) for one in result.scaling]
    assert shares[0] == (1, 1)
    assert shares[1][0] < 0.3, "16 packs for 64 GPUs"
    assert shares[2][0] < shares[1][0]
    assert min(weak for _, weak in shares) > 0.85, "the step grows with the GPUs"
    text = "\n".join(lines(result))
    assert "with 64 GPUs and 16 packs a step 48 GPUs have nothing to do: train.packs_per_step=64 or more" in text
    slow = planned("llama8b", "cluster.gpus=[8,64]", "cluster.network_gbps=10")
    assert efficiency(slow, slow.scaling[1])[1] < efficiency(result, result.scaling[1])[1] - 0.2
    drawing = ElementTree.fromstring(scaling_svg(result))
    said = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"8", "64", "512", "GPUs"} <= set(said)
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 4, "three points and the legend's"
    html = page(result)
    assert "<svg" in html
    assert not re.search(r'(src|href)="', html), "no outside file"


def test_what_would_fit_instead() -> None:
    result = planned("llama8b", "cluster.gpus=1", "cluster.gpu=rtx-4090")
    assert result.best is None
    assert [one.cfg.tune.method.value for one in result.proposals] == ["lora", "qlora"]
    assert all(one.fits for one in result.proposals)
    text = "\n".join(lines(result))
    assert re.search(r"tune.method=qlora zero.stage=\d .*\([\d.]+ GiB a GPU, [\d.]+ s a step\)", text)
    assert "does not fit" in text
    nothing = planned("llama8b", "cluster.gpus=1", "cluster.memory_gib=2")
    assert nothing.proposals == ()
    assert "More or larger GPUs are needed" in "\n".join(lines(nothing))
    assert "none of the settings fits" in scaling_svg(nothing)
    json.dumps(as_json(nothing))


def test_json_for_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cfg = config.compose("llama8b", [*EIGHT, "output=json", f"file={tmp_path}/plan.svg"], PlanConfig)
    assert plan.command(cfg) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["gpus"] == 8
    assert {one["stage"] for one in found["choices"]} == {0, 1, 2, 3}
    first = found["choices"][0]
    assert first["needed"] >= sum(first["memory"].values())
    assert found["fastest"]["fits"]
    assert found["job"]["of"] == "a million tokens"
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert "written:" in said.err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cluster.gpu=h101", "cluster.gpu: given 'h101', required one of gb200"),
        ("cluster.gpus=0", "cluster.gpus: given 0, required a number of at least 1"),
        ("cluster.gpus=[8,many]", "cluster.gpus: given"),
        ("cluster.gpus=[]", "cluster.gpus: given"),
        ("cluster.network_gbps=0", "cluster.network_gbps: given 0, required a number above 0"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node: given 0"),
        ("output=html", "output: given 'html', required one of terminal, json"),
        ("file=plan.pdf", "file: given 'plan.pdf', required a name that ends with .html, .svg, .json"),
    ],
)
def test_what_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        config.compose("llama8b", [word], PlanConfig, checks=[plan.known_gpu])
    assert said in str(found.value)


def test_what_is_configured_has_a_line_whatever_it_is() -> None:
    words = ("model.activation_checkpointing=true", "model.recompute_layers=7")
    marks = [line.split()[0] for line in list(lines(planned("llama8b", *EIGHT, *words)))[5:27]]
    assert sum(">" in mark for mark in marks) == sum("*" in mark for mark in marks) == 1


def test_plan_and_auto_look_at_the_same_settings() -> None:
    """Where only fewer logits at a time make it fit, that is what is proposed."""
    result = planned("llama8b", "tune.method=qlora", "cluster.gpus=1", "cluster.memory_gib=12")
    assert result.best is not None
    assert result.best.cfg.model.loss_chunk < 2048
    assert any(one.is_like(result.best) for one in result.choices)


def test_nothing_is_said_of_a_job_that_fits_nowhere() -> None:
    result = planned("llama8b", "cluster.memory_gib=0.1")
    assert as_json(result)["job"] is None
    assert not [line for line in lines(result) if "GPU-hours" in line]


def test_gpus_without_work_are_named() -> None:
    said = list(lines(planned("llama8b", "cluster.gpus=32")))
    assert any("with 32 GPUs and 16 packs a step 16 GPUs have nothing to do" in line for line in said)


def test_offloaded_states_are_counted_on_the_host(eight: PlanResult) -> None:
    offloaded, kept = (
        next(one for one in eight.choices if str(one.cfg.zero.offload) == place) for place in ("optimizer", "none")
    )
    assert offloaded.host == pytest.approx(16 * 8_030_261_248 / 8)
    assert kept.host == 0
    narrow = Cluster(GPUS["H100"], 8, host_memory=10 * cost.GIB)
    assert not choice(offloaded.cfg, LLAMA, narrow, typical_step(offloaded.cfg, LLAMA), 1000 * cost.GIB).fits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.recompute_layers=99", "model.activation_checkpointing=true"), "given 99, required at most 32"),
        (
            ("tune.method=qlora", "+model.shape.num_local_experts=8"),
            "given qlora, required full or lora",
        ),
        (("model.shape.model_type=nosuchmodel",), "which transformers does not take"),
    ],
)
def test_what_training_would_refuse_is_not_planned(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned("llama8b", *EIGHT, *words)
