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
from typing import Any, Literal

import torch.distributed as dist

from lightning_llm.checkpoint.manifest import Manifest, ManifestError, uuid_of
from lightning_llm.checkpoint.store import CheckpointStore, is_whole_bucket, open_store, split_url
from lightning_llm.checkpoint.verify import Problem, believe, find_problems, share_of
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
    """Those who decide together: whatever goes wrong on one of them, all take part in every step."""

    def __init__(self, alone: bool) -> None:
        several = dist.is_available() and dist.is_initialized() and not alone
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    def of_first(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on rank 0, on all; an error there is raised on all."""
        box: list[Any] = [_attempt(act) if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return _result(box[0])

    def of_all(self, act: Callable[[], list[Any]]) -> list[Any]:
        """The items that `act` returns on all ranks together; an error on one of them is raised on all."""
        shares: list[Any] = [_attempt(act)]
        if self.size > 1:
            mine, shares = shares[0], [None] * self.size
            dist.all_gather_object(shares, mine)
        return [item for share in shares for item in _result(share)]


def _attempt(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """A result, or the error instead, as it can be sent to other ranks."""
    try:
        return act(), None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("builtins", "lightning_llm"):
            return None, error
        # A library's own kind may not survive the way.
        return None, OSError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)


def _result(attempt: tuple[Any, Exception | None]) -> Any:
    result, error = attempt
    if error is not None:
        raise error
    return result


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
    name = ranks.of_first(lambda: _recovered(path))
    if name is not None:
        store = open_store(split_url(path)[0])
        found = _examine(store, name, ranks)
        if isinstance(found, Manifest):
            return Selected(store, name, found)
        if found is None:
            raise ranks.of_first(lambda: nothing_there(path))
        _report(store, name, found, ranks)
        raise NoGoodCheckpointError(f"The checkpoint {store.url}/{name} cannot be loaded: {_list(found)}")
    store = open_store(path)
    names: list[str] = ranks.of_first(lambda: newest_first(store))
    bad: list[str] = []
    for candidate in names:
        found = _examine(store, candidate, ranks)
        if isinstance(found, Manifest):
            if bad and ranks.rank == 0:
                log.warning("Going on from %s/%s, step %d, instead.", store.url, candidate, found.step)
            return Selected(store, candidate, found)
        if found is not None:
            _report(store, candidate, found, ranks)
            bad.append(f"  {candidate}: {_list(found)}")
    if not bad:
        raise ranks.of_first(lambda: nothing_there(path))
    raise NoGoodCheckpointError(
        f"None of the {len(bad)} checkpoints in {path} can be loaded:\n" + "\n".join(bad) + "\nTo start anew, use "
        "another folder or remove them."
    )


def _recovered(path: str | Path) -> str | None:
    """`one_at`, by its own name if it has others, after a commit that was interrupted has its end."""
    open_store(path).recover()
    if not is_whole_bucket(path):
        open_store(split_url(path)[0]).recover()
    name = one_at(path)
    return name if name is None else open_store(split_url(path)[0]).aliases().get(name, name)


def nothing_there(path: str | Path) -> ConfigurationError:
    """That there is no checkpoint, and what there is instead."""
    place = Path(path)
    if place.is_file():
        return ConfigurationError(
            f"{path} is a file; a checkpoint is a folder. `lightning-llm import` makes one of a Lightning .ckpt file."
        )
    for marker, kind in (
        (".metadata", "torch.distributed.checkpoint"),
        ("model.safetensors", "Hugging Face"),
        ("latest", "DeepSpeed"),
    ):
        if (place / marker).is_file():
            return ConfigurationError(
                f"{path} is a folder of {kind}, no checkpoint of lightning_llm. `lightning-llm import` makes one of it."
            )
    return ConfigurationError(
        f"There is no checkpoint at {path}: no manifest.json in it, nor in a folder within it. A run that was "
        "interrupted before its first checkpoint was committed leaves none."
    )


def one_at(path: str | Path) -> str | None:
    """The name of the checkpoint at `path`, be it damaged; None if that is a folder of several, or nothing."""
    if is_whole_bucket(path):
        return None
    url, name = split_url(path)
    return name if is_one(open_store(url), name) else None


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


def _examine(store: CheckpointStore, name: str, ranks: _Ranks) -> Manifest | list[Problem] | None:
    """What all ranks together found wrong with a checkpoint; its manifest if nothing; None if it was removed just now.

    Rank 0 alone reads the manifest and believes it or not: the others may have another key.
    """
    while True:
        manifest, problems = ranks.of_first(lambda: believe(store, name))
        if manifest is not None:
            problems = ranks.of_all(lambda: _find_my_problems(store, name, manifest, ranks))  # noqa: B023  called here
        if not problems:
            if ranks.rank == 0 and store.marked(name) is not None:
                store.mark(name, None)
            return manifest
        match ranks.of_first(lambda: became_of(store, name, manifest)):  # noqa: B023
            case "removed":
                return None
            case "stays":
                return problems


def _find_my_problems(store: CheckpointStore, name: str, manifest: Manifest, ranks: _Ranks) -> list[Problem]:
    return find_problems(store, store.location(name), manifest, share_of(manifest, ranks.rank, ranks.size))


def became_of(store: CheckpointStore, name: str, manifest: Manifest | None) -> Literal["stays", "replaced", "removed"]:
    """What a run has done meanwhile to a checkpoint in which problems were found: only of what stays they are true.

    Args:
        store: Of the checkpoint.
        name: Of it.
        manifest: As it was read before; None if that could not be believed.
    """
    try:
        if not is_one(store, name):
            return "removed"
        now = uuid_of(store.manifest(name))
    except OSError:
        return "stays"
    if manifest is None:
        return "replaced" if believe(store, name)[0] is not None else "stays"
    return "replaced" if now is not None and now != manifest.uuid else "stays"


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


def saved_before(url: str, step: int) -> list[str]:
    """Paths of the checkpoints in a folder that were saved before a step, newest first, good or bad. Collective."""

    def find() -> list[str]:
        store, found = open_store(url), []
        for name in store.names():
            with suppress(ManifestError, OSError):
                manifest = Manifest.from_bytes(store.manifest(name))
                if manifest.step < step and not manifest.weights_only:
                    found.append((manifest.step, manifest.created, f"{store.url}/{name}"))
        return [path for *_, path in sorted(found, reverse=True)]

    return _Ranks(alone=False).of_first(find)


def newest_step(url: str) -> int:
    """The latest step of the checkpoints in a folder, good or bad; -1 if there is none."""
    store, steps = open_store(url), [-1]
    for name in store.names():
        with suppress(ManifestError, OSError):
            steps.append(Manifest.from_bytes(store.manifest(name)).step)
    return max(steps)
