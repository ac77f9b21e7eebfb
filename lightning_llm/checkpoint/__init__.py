"""The one on-disk format: committed folders that vouch for themselves, in any layout, written at once or in the
background.

    digest  manifest  files            what a checkpoint is made of, without torch
    store  folder  bucket              where it is kept, and how a commit happens
    verify                             whether it is still what was committed
    encoding  planning  staging        a run's state as files: plain values, who writes what, the snapshot
    overlap                            the part of a snapshot that is taken while training goes on
    saver  worker  rendezvous          from the snapshot to the commit, over all ranks
    selection  reading                 which checkpoint is loaded, and its content
    module_state  random_state         what a run's state is, and how it comes back
    pieces                             state that lies in flat ranges of one buffer
    export  importing  plugin          out to Hugging Face; what others saved; for Lightning's own strategies
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_llm.checkpoint.plugin import VerifiedCheckpointIO
    from lightning_llm.checkpoint.reading import Checkpoint
    from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
    from lightning_llm.checkpoint.store import open_store

__all__ = ["Checkpoint", "CheckpointSaver", "RunState", "VerifiedCheckpointIO", "open_store"]

_ROOMS = {
    "Checkpoint": "reading",
    "CheckpointSaver": "saver",
    "RunState": "saver",
    "VerifiedCheckpointIO": "plugin",
    "open_store": "store",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used: the process that writes in the background must not import torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
