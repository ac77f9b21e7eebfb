"""Whose place is it? The newest run that saves into it; an older one that comes back may write nothing any more.

A run is taken for dead, another one goes on from its last checkpoint, and then it wakes: a suspended process, a node
that was cut off. What it would commit is a future that has been given up.
"""

from __future__ import annotations

from lightning_llm.checkpoint.owner import machine, this_process
from lightning_llm.checkpoint.store import CheckpointStore
from lightning_llm.errors import ConfigurationError

_claimed: set[str] = set()  # by this process


def claim(store: CheckpointStore) -> None:
    """This process saves there from now on, and whoever did before does not."""
    store.claim(_me())
    _claimed.add(store.url)


def taken_over(store: CheckpointStore) -> str:
    """Which process has claimed a place since this one did; empty where none has, or this one never did."""
    if store.url not in _claimed:
        return ""
    now = store.claimant()
    return "" if now in ("", _me()) else now


def check_claim(store: CheckpointStore) -> None:
    """Refuses to go on where another process has taken over.

    Raises:
        ConfigurationError: One has.
    """
    other = taken_over(store)
    if other:
        raise ConfigurationError(
            f"{store.url} has been taken over by another run (process {other}), which goes on from its checkpoints: "
            "this one must not write there any more. For two runs at the same time use two folders."
        )


def _me() -> str:
    return f"{machine()}-{this_process()}"
