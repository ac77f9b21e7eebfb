"""What is done beside the training once a checkpoint is committed: names, registration, removals.

`AsyncDistributedCheckpoint` keeps one `PendingSave` from the decision to save until all ranks know what became of it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lightning_llm.checkpoint.manifest import ManifestError
from lightning_llm.checkpoint.store import open_store, split_url
from lightning_llm.checkpoint.verify import read_manifest
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError

log = logging.getLogger(__name__)


@dataclass
class PendingSave:
    """A save that is not agreed on yet. All ranks have one at the same time.

    Attributes:
        path: Of the checkpoint.
        decisions: ModelCheckpoint's attributes as they were before, to be taken back if nothing comes of it.
        metrics: As they were logged at its step.
        due: When it was due, by `time.monotonic`.
        blocked: Seconds that training stood still until the save returned: for the one before, the dump, the snapshot.
        aliases: Other names that it gets when it is committed.
        removals: Checkpoints that go then, each with the uuid that was meant.
    """

    path: str
    decisions: dict[str, Any]
    metrics: dict[str, float]
    due: float = field(default_factory=time.monotonic)
    blocked: float = 0.0
    aliases: list[str] = field(default_factory=list)
    removals: list[tuple[str, str]] = field(default_factory=list)

    def remove(self, path: str) -> None:
        """Queues a removal, of the very checkpoint that has this name now."""
        uuid = uuid_of(path)
        if uuid is not None:
            self.removals.append((path, uuid))

    def tidy(self) -> None:
        """Gives the checkpoint its other names, then removes what it takes the place of."""
        url, target = split_url(self.path)
        for alias in self.aliases:
            open_store(url).alias(split_url(alias)[1], target)
        for path, uuid in reversed(self.removals):  # an alias before what it stands for
            url, name = split_url(path)
            open_store(url).remove(name, uuid)


class Housekeeping:
    """One thread, which does one thing after the other. What fails there costs nothing but a warning."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, act: Callable[..., object], *arguments: object) -> None:
        """Has something done after all that was submitted before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "checkpoint-housekeeping")
        self._pool.submit(attempt, act, *arguments)

    def finish(self) -> None:
        """Returns when everything is done."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def attempt(act: Callable[..., object], *arguments: object) -> None:
    """Does something that may fail without harm: what could not be removed stays, what could not be named is said."""
    try:
        act(*arguments)
    except (OSError, ConfigurationError, NoGoodCheckpointError) as error:
        log.warning("%s", error)
    except Exception:
        log.exception("After a checkpoint was committed")


def place_of(path: str) -> str:
    """Where a checkpoint is, whatever name or link it is called by."""
    url, name = split_url(path)
    return os.path.realpath(path) if "://" not in path else open_store(url).location(name)


def uuid_of(path: str) -> str | None:
    """Of the checkpoint that has this name now; None if there is none that can be believed."""
    url, name = split_url(path)
    try:
        return read_manifest(open_store(url), name).uuid
    except (ManifestError, OSError, ConfigurationError):
        return None
