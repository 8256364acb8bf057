"""The plan in words, printed before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from sftdist.data.plan import Plan, PlanTotals

FEW_STEPS = 100


def describe_plan(plan: Plan, totals: PlanTotals, world_size: int) -> Iterator[str]:
    """Lines with the steps, the step size in all three units, and what each source gives."""
    spec = plan.spec
    per_step = totals.packs / totals.steps
    micro = -(-(spec.packs_per_step or round(per_step)) // world_size)
    packs = f"{spec.packs_per_step} packs" if spec.packs_per_step else f"{spec.conversations_per_step} conversations"
    yield (
        f"plan: {totals.steps:,} steps of {packs} (packs of at most {spec.pack_tokens:,} tokens; on average "
        f"{per_step:.1f} packs, {totals.tokens / totals.steps:,.0f} tokens, "
        f"{totals.targets / totals.steps:,.0f} supervised, {totals.conversations / totals.steps:,.1f} conversations), "
        f"fill {totals.fill:.2%}; "
        f"{world_size} rank{'s' if world_size > 1 else ''}, {micro} micro-batch{'es' if micro > 1 else ''} each"
    )
    for source in totals.sources:
        repeats = " (repeated)" if source.passes > 1.005 else ""
        yield (
            f"source {source.name}: lambda {source.lam:.3f}, share {source.share:.3f}, "
            f"{source.passes:.2f} passes{repeats}, {source.conversations:,} conversations, "
            f"{source.targets:,.0f} supervised tokens"
        )
    if spec.packing and spec.packs_per_step:
        yield (
            f"without packing, {spec.packs_per_step} conversations a step would make {totals.unpacked_steps:,} steps "
            "over the same conversations"
        )
    if totals.steps < FEW_STEPS:
        yield (
            f"NOTE: only {totals.steps} optimizer steps. A fine-tune usually needs at least {FEW_STEPS}: lower "
            "train.packs_per_step, or raise train.epochs or train.max_steps"
        )
