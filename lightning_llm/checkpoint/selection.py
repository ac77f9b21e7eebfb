"""Which checkpoint a run goes on from: the newest one that can be believed, the same on all ranks.

Each rank verifies its share of the files, and all of them decide by what any of them found. A bad checkpoint is
reported, marked and passed over for the one before; if all are bad the run ends, and never starts at step 0 instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_llm.checkpoint.manifest import MANIFEST, Manifest, ManifestError, secret
from lightning_llm.checkpoint.store import CheckpointStore, open_store, split_url
from lightning_llm.checkpoint.verify import Problem, find_problems, share_of
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """A checkpoint that was verified just now.

    Attributes:
        store: Where it is.
        name: Under which.
        manifest: Of it.
    """

    store: CheckpointStore
    name: str
    manifest: Manifest

    @property
    def path(self) -> str:
        """Folder or URL."""
        return f"{self.store.url}/{self.name}"


class _Ranks:
    """Those who decide together."""

    def __init__(self, alone: bool) -> None:
        several = dist.is_available() and dist.is_initialized() and not alone
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    def of_first(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on rank 0, on all; an error there is raised on all."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [(act(), None)]
            except (OSError, ConfigurationError) as error:
                box = [(None, error)]
        if self.size > 1:
            dist.broadcast_object_list(box)
        result, failure = box[0]
        if failure is not None:
            raise failure
        return result

    def of_all(self, mine: list[Any]) -> list[Any]:
        """All ranks' items."""
        if self.size == 1:
            return mine
        shares: list[Any] = [None] * self.size
        dist.all_gather_object(shares, mine)
        return [item for share in shares for item in share]


def select(path: str | Path, *, alone: bool = False) -> Selected:
    """The checkpoint at `path`, or the newest good one in the folder `path`. Collective.

    Args:
        path: Folder or URL of one checkpoint, or of several.
        alone: Other processes do not take part.

    Raises:
        ConfigurationError: There is none.
        NoGoodCheckpointError: There are some, all bad; or the one that was named is bad.
    """
    ranks = _Ranks(alone)
    url, name = split_url(path)
    store = open_store(url)
    if ranks.of_first(lambda: is_one(store, name)):
        problems = _problems(store, name, ranks)
        if isinstance(problems, Manifest):
            return Selected(store, name, problems)
        _report(store, name, problems, ranks)
        raise NoGoodCheckpointError(f"The checkpoint {url}/{name} cannot be loaded: {_list(problems)}")
    store = open_store(path)
    names: list[str] = ranks.of_first(lambda: newest_first(store))
    if not names:
        raise ranks.of_first(lambda: nothing_there(path))
    bad: list[str] = []
    for candidate in names:
        problems = _problems(store, candidate, ranks)
        if isinstance(problems, Manifest):
            if bad and ranks.rank == 0:
                log.warning("Going on from %s/%s, step %d, instead.", store.url, candidate, problems.step)
            return Selected(store, candidate, problems)
        _report(store, candidate, problems, ranks)
        bad.append(f"  {candidate}: {_list(problems)}")
    raise NoGoodCheckpointError(
        f"None of the {len(bad)} checkpoints in {path} can be loaded:\n" + "\n".join(bad) + "\nTo start anew, use "
        "another folder or remove them."
    )


def nothing_there(path: str | Path) -> ConfigurationError:
    """That there is no checkpoint, and what there is instead."""
    place = Path(path)
    if place.is_file():
        return ConfigurationError(
            f"{path} is a file; a checkpoint is a folder. `lightning-llm import` makes one of a Lightning .ckpt file."
        )
    for marker, kind in ((".metadata", "torch.distributed.checkpoint"), ("model.safetensors", "Hugging Face")):
        if (place / marker).is_file():
            return ConfigurationError(
                f"{path} is a folder of {kind}, no checkpoint of lightning_llm. `lightning-llm import` makes one of it."
            )
    return ConfigurationError(
        f"There is no checkpoint at {path}: no manifest.json in it, nor in a folder within it. A run that was "
        "interrupted before its first checkpoint was committed leaves none."
    )


def is_one(store: CheckpointStore, name: str) -> bool:
    """Whether there is a checkpoint of this name, be it damaged, or another name of one."""
    return name in store.names() or bool(store.manifest(name))


def newest_first(store: CheckpointStore) -> list[str]:
    """Names of all checkpoints by their step; such as do not even tell it come first, to be reported."""

    def age(name: str) -> tuple[bool, int, str]:
        try:
            manifest = Manifest.from_bytes(store.manifest(name))
        except (ManifestError, OSError):
            return (True, 0, name)
        return (False, manifest.step, manifest.created)

    return sorted(store.names(), key=age, reverse=True)


def _problems(store: CheckpointStore, name: str, ranks: _Ranks) -> Manifest | list[Problem]:
    """What all ranks together found wrong with a checkpoint; its manifest if nothing."""
    try:
        raw = ranks.of_first(lambda: store.manifest(name))
    except OSError as error:
        return [Problem(MANIFEST, f"it cannot be read: {error}", damaged=False)]
    try:
        manifest = Manifest.from_bytes(raw, secret())
    except ManifestError as error:
        return [Problem(MANIFEST, str(error), damaged=error.damaged)]
    share = share_of(manifest, ranks.rank, ranks.size)
    problems = ranks.of_all(find_problems(store, store.location(name), manifest, share))
    if not problems and ranks.rank == 0 and store.marked(name) is not None:
        store.mark(name, None)
    return problems or manifest


def _report(store: CheckpointStore, name: str, problems: list[Problem], ranks: _Ranks) -> None:
    if ranks.rank != 0:
        return
    for problem in problems:
        log.error("The checkpoint %s/%s is bad and is passed over: %s", store.url, name, problem)
    mark_damaged(store, name, problems)


def mark_damaged(store: CheckpointStore, name: str, problems: list[Problem]) -> None:
    """Notes what was found beside the checkpoint, unless it may only have been unreadable for the moment."""
    if any(problem.damaged for problem in problems):
        found = datetime.now(UTC).isoformat(timespec="seconds")
        store.mark(name, {"found": found, "problems": [asdict(problem) for problem in problems]})


def _list(problems: list[Problem]) -> str:
    return "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def newest_step(url: str) -> int:
    """The latest step of the checkpoints in a folder, good or bad; -1 if there is none."""
    store, steps = open_store(url), [-1]
    for name in store.names():
        with suppress(ManifestError, OSError):
            steps.append(Manifest.from_bytes(store.manifest(name)).step)
    return max(steps)
