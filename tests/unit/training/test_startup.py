"""The start-up contract: every check fires on what it is there for, with figures and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError, DataError, StartupError
from sftdist.core.settings import CheckpointSettings
from sftdist.model.loss import LossModel
from sftdist.training.memory_probe import gradients_reached
from sftdist.training.shortage import ran_out_of_memory
from sftdist.training.startup import (
    Check,
    Supervision,
    check_bos,
    check_copy,
    check_disk,
    check_dtypes,
    check_grace,
    check_gradients,
    check_rows,
    check_supervision,
    run_checks,
    same_on_every_rank,
)
from sftdist.training.trial import checkpoints_at_once, write_and_compare
from tests.models import tiny_model
from tests.packed import random_row
from tests.ranks import RankError, run_ranks

ALONE = World(0, 1, 0, torch.device("cpu"))
SOUND = Supervision(tokens=100, supervised=40.0, stopped=1.0, doubled_bos=0)


def test_every_check_is_printed_with_its_figures() -> None:
    said: list[str] = []
    run_checks(ALONE, [Check("first", lambda: "1 of 1"), Check("second", lambda: "2 of 2")], said.append)
    assert [line.split(" (")[0] for line in said] == ["check  1/2 first: 1 of 1", "check  2/2 second: 2 of 2"]


def _refused_by_rank_1(world: World) -> str:
    def figures() -> str:
        if world.rank == 1:
            raise DataError("only this rank sees it")
        return "fine"

    try:
        run_checks(world, [Check("one", figures)], lambda line: None)
    except DataError as error:
        return str(error)
    return "went on"


def test_one_rank_that_refuses_stops_all() -> None:
    texts = run_ranks(_refused_by_rank_1, 2)
    assert texts == ["only this rank sees it (found by rank 1)", "only this rank sees it"]


def _compare(world: World) -> str:
    return same_on_every_rank(world, "the plan", f"hash-of-{'a' if world.rank else 'b'}")


def test_different_plans_are_refused_on_every_rank() -> None:
    with pytest.raises(RankError, match="the plan differs between ranks"):
        run_ranks(_compare, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervised": 0.0}, "no supervised token in 100 tokens"),
        ({"stopped": 0.99}, r"only 99\.00% of the conversations end"),
    ],
)
def test_supervision_that_cannot_teach_is_refused(changes: dict[str, Any], message: str) -> None:
    broken = replace(SOUND, **changes)
    with pytest.raises(DataError, match=message):
        check_supervision({"good": SOUND, "mine": broken}, [], trained=False)


def test_an_untrained_template_token_must_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"tokens \[7, 8\] whose embedding rows were never trained"):
        check_supervision({"mine": SOUND}, [7, 8], trained=False)
    said = check_supervision({"mine": SOUND}, [7, 8], trained=True)
    assert "2 token rows that the base never trained are trained too" in said


def test_a_second_bos_is_refused() -> None:
    with pytest.raises(DataError, match="source mine: 3 conversations begin with two BOS"):
        check_bos({"mine": Supervision(100, 40.0, 1.0, doubled_bos=3)})


def test_an_id_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="token id 100 is in the data, but the embedding has 100 rows"):
        check_rows(100, 100)
    check_rows(101, 100)


def test_weights_masters_and_moments_have_the_types_that_were_asked_for() -> None:
    sound = {"weights": "bfloat16", "masters": "float32", "exp_avg": "float32"}
    assert "weights bfloat16, masters float32" in check_dtypes(sound, "bfloat16")
    for name in sound:
        with pytest.raises(StartupError, match=f"{name} are float16, they must be .*float"):
            check_dtypes({**sound, name: "float16"}, "bfloat16")


def test_layers_that_no_gradient_reaches_are_named() -> None:
    """S18: a graph that is cut behind the layers, as reentrant checkpointing of frozen inputs does, trains the rest."""
    model = tiny_model("llama")
    module = LossModel(model, num_sources=2, chunk=16).train()
    names = [name for name, _ in module.named_parameters()]
    cut = model.model.layers[1].register_forward_hook(lambda layer, inputs, output: output.detach())
    with gradients_reached(module) as reached:
        (module(**random_row([7, 9]).fields(), weights=None).sum * 0).backward()
    with pytest.raises(StartupError, match=r"19 of 21 tensors .* get no gradient .*layers\.0\.self_attn"):
        check_gradients(names, reached, may_miss=False)
    assert "no gradient reaches 19 of 21" in check_gradients(names, reached, may_miss=True)
    cut.remove()
    with gradients_reached(module) as reached:
        (module(**random_row([7, 9]).fields(), weights=None).sum * 0).backward()
    assert check_gradients(names, reached, may_miss=False) == "a gradient reaches all 21 trained tensors"
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_lack_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(2**50, dtype=torch.uint8)
    assert ran_out_of_memory(huge.value)
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))


def test_a_disk_without_room_for_what_will_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="3 more checkpoints need"):
        check_disk(tmp_path, 2**60, 3)
    assert checkpoints_at_once(CheckpointSettings(keep_last=2)) == 3
    assert checkpoints_at_once(CheckpointSettings(keep_last=1, keep_best=True)) == 3
    assert checkpoints_at_once(CheckpointSettings(keep_last=1, keep_best=True, best="general.exact_match")) == 6


def test_a_copy_that_does_not_fit_into_host_memory_is_refused() -> None:
    with pytest.raises(StartupError, match=r"2\.00 GiB .* only 1\.00 GiB are free there\. Set .*background=false"):
        check_copy(2**31, 2**30)
    check_copy(2**30, 2**31)


def test_a_save_longer_than_the_grace_is_refused() -> None:
    with pytest.raises(StartupError, match=r"Set checkpoint\.grace_seconds=151"):
        check_grace(100.0, 30.0, None)
    assert check_grace(20.0, 30.0, None) == "about 20.0 s of 30 s grace"


def test_a_save_longer_than_torchrun_waits_is_refused() -> None:
    """torchrun's default is 30 s, whatever checkpoint.grace_seconds says."""
    with pytest.raises(StartupError, match=r"kills its ranks 30 s after.*--shutdown-timeout 300"):
        check_grace(100.0, 300.0, 30.0)
    assert check_grace(20.0, 300.0, 30.0) == "about 20.0 s of 30 s grace"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="a trial save failed"):
        write_and_compare(tmp_path / "absent" / "trial", {"weight": torch.ones(4)})
    assert write_and_compare(tmp_path / "trial", {"weight": torch.ones(4)}) > 0
    assert not list(tmp_path.iterdir()), "the trial leaves nothing behind"
