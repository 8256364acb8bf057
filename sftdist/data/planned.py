"""From a configuration and its stores to the corpus and the plan's specification, for train, plan and inspect."""

from __future__ import annotations

from sftdist.core.settings import SourceSettings, TrainConfig
from sftdist.data.corpus import Corpus, Mix, open_corpus
from sftdist.data.pipeline import Prepared
from sftdist.data.plan import PlanSpec


def corpus_of(cfg: TrainConfig, prepared: Prepared) -> Corpus:
    """The train split of every store as the plan sees it."""
    data = cfg.data
    settings = {name: data.sources.get(name, SourceSettings()) for name in prepared.stores}
    mixes = {
        name: Mix(one.lam, one.max_passes if one.max_passes is not None else data.max_passes)
        for name, one in settings.items()
    }
    return open_corpus(
        prepared.stores,
        prepared.held_out,
        prepared.template,
        mixes,
        max_len=data.max_len,
        overlong=data.overlong.value,
        temperature=data.temperature,
    )


def pack_tokens(cfg: TrainConfig) -> int:
    """Tokens in one forward: as configured, else the longest conversation."""
    return cfg.train.pack_tokens or cfg.data.max_len


def plan_spec(cfg: TrainConfig) -> PlanSpec:
    """What a step is. `tokens_per_step` is a number of packs: the nearest one, at least one."""
    train, packs = cfg.train, cfg.train.packs_per_step
    if train.tokens_per_step is not None:
        packs = max(1, round(train.tokens_per_step / pack_tokens(cfg)))
    return PlanSpec(
        pack_tokens=pack_tokens(cfg),
        packs_per_step=packs,
        conversations_per_step=train.conversations_per_step,
        packing=train.packing,
        window=train.window,
        seed=cfg.seed,
        mix_mode=cfg.data.mix_mode.value,
        max_steps=train.max_steps,
        epochs=train.epochs,
        loss_weighting=train.loss_weighting.value,
    )
