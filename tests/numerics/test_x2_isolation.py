"""X2: documents in a pack cannot see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sftdist.model.backends.interface import Documents
from sftdist.model.loss import hidden_states
from tests.models import MIXTURES_OF_EXPERTS, SHAPES, VOCABULARY, tiny_model

DOCUMENTS = Documents.of_lengths([11, 7, 30, 1, 5])
CONTROL_RATIO = 1_000  # a leak is at least this many times larger than what experts' rounding moves


def _logits(model: torch.nn.Module, ids: Tensor, documents: Documents) -> Tensor:
    with torch.no_grad():
        hidden = hidden_states(model, ids, DOCUMENTS.positions(), documents)
        return model.get_output_embeddings()(hidden)  # type: ignore[operator]


def _change_elsewhere(model: torch.nn.Module, document: int, documents: Documents, seed: int) -> float:
    """The largest change of the logits outside a document when its last token, the nearest to the next one, changes."""
    ids = torch.randint(VOCABULARY, (DOCUMENTS.tokens,), generator=torch.Generator().manual_seed(seed))
    start, end = DOCUMENTS.cu_seqlens[document : document + 2].tolist()
    changed = ids.clone()
    changed[end - 1] = (ids[end - 1] + 1) % VOCABULARY
    difference = (_logits(model, ids, documents) - _logits(model, changed, documents)).abs()
    assert difference[end - 1].max() > 0
    difference[start:end] = 0
    return difference.max().item()


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_changed_token_moves_no_other_document(family: str) -> None:
    model = tiny_model(family)
    joined = Documents.of_lengths([DOCUMENTS.tokens])
    for document in range(4):
        leak = _change_elsewhere(model, document, DOCUMENTS, seed=document)
        control = _change_elsewhere(model, document, joined, seed=document)
        assert control > 1e-3, "the control must leak, or the test proves nothing"
        if family in MIXTURES_OF_EXPERTS:
            assert leak <= 1e-5
            assert leak * CONTROL_RATIO <= control
        else:
            assert leak == 0.0
