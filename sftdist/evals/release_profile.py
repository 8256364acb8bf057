"""The profile of a model that is about to be released: of the prompts it was made from, and of its own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftdist.data.store import TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.evals.features import features_of
from sftdist.evals.live import Forms, answer_counts
from sftdist.evals.profile import Profile, profile_of
from sftdist.evals.user_turns import prompts_of


def profile_release(
    stores: Sequence[TokenStore], template: ChatTemplate, rows: Sequence[Mapping[str, Any]], forms: Forms
) -> Profile:
    """The profile of the train and validation prompts of open `stores`, and of what the model answers.

    `rows` are those of the evaluation (`rows.jsonl`): counted are its answers to prompts of the sources, as they are.
    Raises DataError where there are too few prompts, or the template does not let them be read back.
    """
    profile = profile_of(prompts_of(stores, template))
    asked = [row for row in rows if row["variant"] is None and row["source"] in profile.by_source]
    counts = answer_counts(
        profile.model, features_of([_question(row) for row in asked]), [str(row["tuned"]) for row in asked], forms
    )
    return replace(profile, answers=counts.to_json())


def _question(row: Mapping[str, Any]) -> str:
    """What the user said last."""
    return next((str(turn["content"]) for turn in reversed(row["prompt"]) if turn["role"] == "user"), "")
