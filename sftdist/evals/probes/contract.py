"""Whether answers keep the contract of their source, the very file that its training answers were held against."""

from __future__ import annotations

from collections.abc import Mapping

from sftdist.data.contract import Breach, Contract
from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.prompts import Answer, Prompt

KEPT = Metric("contract_kept", True, 0.0, 1.0, "share of answers that keep every rule of their source's contract")


def contract_probe(contracts: Mapping[str, Contract]) -> Probe:
    """Contracts by source; nothing applies to a source without one.

    Raises ConfigError where a rule takes too long on an answer.
    """

    def score(prompt: Prompt, answer: Answer) -> dict[str, float]:
        contract = contracts.get(prompt.source)
        return {} if contract is None else {KEPT.name: float(not contract.breaches(answer.spoken))}

    def explain(prompt: Prompt, answer: Answer) -> list[str]:
        return [str(breach) for breach in breaches(contracts, prompt, answer)]

    return Probe("contract", (KEPT,), score, explain=explain)


def breaches(contracts: Mapping[str, Contract], prompt: Prompt, answer: Answer) -> list[Breach]:
    """The rules that an answer breaks, each by its place in the contract."""
    contract = contracts.get(prompt.source)
    return [] if contract is None else contract.breaches(answer.spoken)
