"""The peers that are known, and whose file a file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftdist.commands.migrate_peers import axolotl, llamafactory, trl
from sftdist.commands.migrate_peers.account import Account
from sftdist.commands.migrate_peers.rule import Peer, carry_over
from sftdist.core.errors import ConfigError

PEERS: dict[str, Peer] = {peer.name: peer for peer in (axolotl.PEER, llamafactory.PEER, trl.PEER)}
# A key that only one of them has, and that hardly any of its files lacks.
_SIGNS = {
    "axolotl": ("base_model", "sequence_len", "micro_batch_size", "num_epochs"),
    "llamafactory": ("stage", "finetuning_type", "cutoff_len", "template", "dataset"),
    "trl": ("dataset_name", "use_peft", "assistant_only_loss", "per_device_train_batch_size", "max_length"),
}


def whose(given: Mapping[str, Any]) -> Peer:
    """The peer that knows most of these keys, its own ones first. Raises ConfigError where that is none or several."""
    scores = {
        name: (sum(key in given for key in _SIGNS[name]), sum(key in set(peer.known) for key in given))
        for name, peer in PEERS.items()
    }
    best = max(scores.values())
    found = [name for name, score in scores.items() if score == best]
    if best[0] == 0 or len(found) > 1:
        keys = ", ".join(list(map(str, given))[:8]) or "no key"
        raise ConfigError(f"given {keys}; required a file of {', '.join(PEERS)}: say which with --from NAME")
    return PEERS[found[0]]


def migrate(given: Mapping[str, Any], peer: Peer, *, folder: Path, gpus: int) -> Account:
    """Carry a peer's file over. `folder`: where its relative files are looked for. Raises ConfigError for a value that
    the peer would not take either."""
    account = Account(given, folder=folder, gpus=gpus)
    carry_over(peer.rules, account)
    for word, text in peer.always:
        account.differs(word, text)
    return account
