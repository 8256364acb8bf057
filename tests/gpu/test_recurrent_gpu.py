"""Hybrid models on CUDA, where the kernels that honour borders are installed: packs pass the check of the start."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sftdist.model.checks import check_isolation
from tests.models import HYBRIDS, VOCABULARY, tiny_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is None, reason="needs causal_conv1d"),
]


@pytest.mark.parametrize("family", [name for name in HYBRIDS if name != "jamba"])
def test_documents_of_a_pack_do_not_meet(family: str) -> None:
    device = torch.device("cuda")
    model = tiny_model(family).to(device, torch.bfloat16)
    found = check_isolation(model, VOCABULARY, device)
    assert found is not None
    assert found.control > 0.0
