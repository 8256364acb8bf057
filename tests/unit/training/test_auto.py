"""`auto=true`: what is chosen, what is kept, what is refused, and what a run may be resumed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sftdist.core import snapshot
from sftdist.core.config import compose, given_keys
from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig
from sftdist.model.hardware import CPU, GPUS, Cluster
from sftdist.training import auto
from sftdist.training.choices import KEYS, words_of
from sftdist.training.opening import refuse_other_config

H100 = Cluster(GPUS["H100"], 8)
GIB = 2**30


def on(patch: pytest.MonkeyPatch, cluster: Cluster, gib: float) -> None:
    patch.setattr(auto, "this_machine", lambda cfg: (cluster, gib * GIB))


def llama(*words: str) -> TrainConfig:
    return compose("llama8b", ["auto=true", *words])


def settled(cfg: TrainConfig, *given: str) -> tuple[TrainConfig, list[str]]:
    said: list[str] = []
    return auto.settled(cfg, given, said.append), said


def test_the_fastest_that_fits_is_taken_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H100, 79)
    chosen, said = settled(llama())
    assert (chosen.zero.stage, chosen.zero.offload, chosen.model.loss_chunk) == (3, "none", 2048)
    assert chosen.model.activation_checkpointing
    assert 0 < (chosen.model.recompute_layers or 0) < 16, "as few as fit"
    assert said[0].startswith("auto: 8 x H100 with 79.0 GiB each; ")
    assert " ".join(words_of(chosen)) in said[0]
    assert "GiB a rank" in said[1]
    assert "s a step" in said[1]
    assert said[2].startswith("auto: the next faster one would need ")
    on(monkeypatch, H100, 1000)
    roomy, _ = settled(llama())
    assert not roomy.model.activation_checkpointing
    on(monkeypatch, H100, 25)
    tight, _ = settled(llama())
    assert tight.zero.offload == "optimizer"


def test_fewer_logits_only_where_nothing_else_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = llama("model.loss_chunk=8192")
    found = []
    for gib in (79, 40, 30, 25, 22, 20, 19, 18):
        on(monkeypatch, H100, gib)
        try:
            found.append(settled(cfg)[0])
        except ConfigError:
            break
    assert found[0].model.loss_chunk == 8192
    assert found[-1].model.loss_chunk in (1024, 512)
    assert all(one.model.activation_checkpointing for one in found if one.model.loss_chunk < 8192)


def test_without_auto_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "this_machine", lambda cfg: pytest.fail("not looked at"))
    cfg = compose("llama8b")
    assert settled(cfg) == (cfg, [])


@pytest.mark.parametrize(
    "words",
    [
        ("zero.stage=2",),
        ("zero.offload=optimizer",),
        ("model.activation_checkpointing=true", "model.recompute_layers=30"),
        ("model.activation_checkpointing=true", "model.recompute_layers=null"),
        ("zero=2",),
    ],
)
def test_what_the_command_line_names_is_kept(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H100, 79)
    cfg = llama(*words)
    chosen, said = settled(cfg, *given_keys(["auto=true", "+exp=llama8b", *words]))
    for key in words:
        name = "zero.stage" if key.startswith("zero=") else key.partition("=")[0]
        section, _, leaf = name.partition(".")
        before, after = (snapshot.to_dict(one)[section][leaf] for one in (cfg, chosen))
        assert before == after
        assert name in said[1]
    other = settled(llama())[0]
    assert words_of(chosen) != words_of(other)


def test_no_checkpointing_on_request_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H100, 79)
    chosen, _ = settled(llama("model.activation_checkpointing=false"), "model.activation_checkpointing")
    assert not chosen.model.activation_checkpointing
    assert chosen.zero.offload == "optimizer", "what else fits"


def test_a_choice_that_is_handed_on_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sftdist train` gives to its ranks."""
    on(monkeypatch, H100, 79)
    chosen, _ = settled(llama())
    words = auto.chosen_words(chosen)
    assert auto.chosen_words(compose("llama8b")) == []
    on(monkeypatch, Cluster(CPU, 1), 1000)
    again = llama(*words)
    assert settled(again, *given_keys(words)) == (again, [])
    assert words_of(again) == words_of(chosen)


def test_where_nothing_fits_the_proposals_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Cluster(GPUS["RTX 4090"], 1), 23.5)
    with pytest.raises(ConfigError) as found:
        settled(llama())
    said = str(found.value)
    assert "makes tune.method=full fit on 1 x RTX 4090 with 23.5 GiB each" in said
    assert "tune.method=lora zero.stage=" in said
    assert "tune.method=qlora zero.stage=" in said
    on(monkeypatch, Cluster(GPUS["RTX 4090"], 1), 2)
    with pytest.raises(ConfigError, match="use more or larger GPUs"):
        settled(llama())


def test_on_a_cpu_nothing_is_offloaded_to_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Cluster(CPU, 2, per_node=2), 12)
    for gib in (1000, 110, 100):
        on(monkeypatch, Cluster(CPU, 2, per_node=2), gib)
        assert settled(llama())[0].zero.offload == "none"
    tiny, said = settled(compose("chat_small", ["auto=true"]))
    assert tiny.zero.stage < 3, "gathering a tiny model takes longer than it saves"
    assert "2 x CPU rank" in said[0]


def test_what_the_rules_refuse_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model has no ZeRO 3 (core.rules), and keys for DeepSpeed no stage 0."""
    on(monkeypatch, H100, 79)
    assert settled(llama("model.compile=true", "zero.stage=2"))[0].zero.stage < 3
    on(monkeypatch, H100, 1000)
    words = ("zero.deepspeed={zero_optimization:{overlap_comm:false}}",)
    assert settled(llama(*words))[0].zero.stage > 0


def test_a_resume_may_choose_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that auto chooses may change, but for the chunk of logits, which the run keeps."""
    on(monkeypatch, H100, 79)
    first, _ = settled(llama(f"run.dir={tmp_path}/r"))
    first = replace(first, model=replace(first.model, loss_chunk=512))
    snapshot.write_config(tmp_path / "r", first)
    on(monkeypatch, Cluster(GPUS["H100"], 64), 200)
    second, _ = settled(llama(f"run.dir={tmp_path}/r"))
    assert (second.zero, second.model.activation_checkpointing) != (first.zero, first.model.activation_checkpointing)
    assert second.model.loss_chunk == 512
    refuse_other_config(second, tmp_path / "r")
    with pytest.raises(ConfigError, match=r"model\.loss_chunk: was 512, now 2048"):
        refuse_other_config(llama(f"run.dir={tmp_path}/r"), tmp_path / "r")


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("model.activation_checkpointing=false", True),
        ("model.recompute_layers=3", True),
        ("auto=true", True),
        ("zero.stage=1", True),
        ("model.loss_chunk=512", False),
        ("model.kernels=torch", False),
    ],
)
def test_what_names_a_run(word: str, same: bool) -> None:
    plain, other = compose("llama8b"), compose("llama8b", [word])
    assert (snapshot.config_hash(plain) == snapshot.config_hash(other)) == same
    assert (snapshot.differences(plain, other) == {}) == same
    assert (plain.run.name == other.run.name) == same
    assert snapshot.identifies_run(word.partition("=")[0]) != same


def test_all_keys_are_keys() -> None:
    assert [word.partition("=")[0] for word in words_of(compose("llama8b"))] == list(KEYS)
    assert words_of(compose("llama8b", words_of(compose("llama8b")))) == words_of(compose("llama8b"))
