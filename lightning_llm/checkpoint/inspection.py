"""What is in a folder of checkpoints, and which of it can be believed.

`lightning-llm verify` and `lightning-llm checkpoints` show it, as tables (tables.py) or JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.checkpoint.selection import became_of, mark_damaged, newest_first, nothing_there, one_at
from lightning_llm.checkpoint.store import CheckpointStore, open_store, split_url
from lightning_llm.checkpoint.verify import MISSING, Problem, believe, find_problems

THREADS = min(4, os.cpu_count() or 1)  # each holds a chunk in memory
LARGE = 2 << 30  # bytes from which on a person wants to see that something goes on


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as it was found.

    Attributes:
        name: In its folder.
        path: Folder or URL.
        manifest: None if it cannot be believed.
        problems: What is wrong; nothing beyond the manifest was looked at if it was not verified.
        verified: Whether every file was read.
        unlisted: Files that the manifest does not list; loading ignores them.
        note: That it was found to be damaged, beside it.
    """

    name: str
    path: str
    manifest: Manifest | None
    problems: list[Problem]
    verified: bool
    unlisted: list[str]
    note: dict[str, Any] | None

    @property
    def good(self) -> bool:
        """Whether it would be loaded, as far as that is known."""
        return self.manifest is not None and not self.problems and (self.verified or self.note is None)

    @property
    def status(self) -> str:
        """In a word or two."""
        if self.problems:
            return "damaged" if any(problem.damaged for problem in self.problems) else "unreadable"
        if self.note is not None:
            return "noted as damaged"
        return "verified" if self.verified else "not verified"

    def files(self) -> list[tuple[str, int, str, str]]:
        """File, size in bytes, digest and state of each, as the manifest lists them."""
        if self.manifest is None:
            return []
        found = {problem.file: problem for problem in self.problems}
        good = "ok" if self.verified else "not verified"
        return [
            (file, record.size, record.digest, _state(found[file]) if file in found else good)
            for file, record in sorted(self.manifest.files.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        described: dict[str, Any] = {}
        if self.manifest is not None:
            described = asdict(self.manifest)
            del described["files"]
            described["size"] = self.manifest.size
        return {
            "name": self.name,
            "path": self.path,
            "status": self.status,
            **described,
            "problems": [asdict(problem) for problem in self.problems],
            "unlisted": self.unlisted,
            "note": self.note,
        }


def _state(problem: Problem) -> str:
    if problem.reason == MISSING:
        return "missing"
    return "damaged" if problem.damaged else "unreadable"


@dataclass(frozen=True)
class Survey:
    """A folder of checkpoints.

    Attributes:
        path: Of it.
        checkpoints: Newest first.
        aliases: Other names, each with what it stands for.
        drafts: What is left of saves, or under way: name -> bytes.
    """

    path: str
    checkpoints: list[Inspection]
    aliases: dict[str, str]
    drafts: dict[str, int]

    @property
    def loaded(self) -> str | None:
        """The name that `ckpt_path=path` would go on from."""
        return next((found.name for found in self.checkpoints if found.good), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "path": self.path,
            "loaded": self.loaded,
            "checkpoints": [found.to_dict() for found in self.checkpoints],
            "aliases": self.aliases,
            "drafts": self.drafts,
        }


def inspect(path: str | Path) -> list[Inspection]:
    """Verifies the checkpoint at `path`, or all of those in the folder `path`, and notes beside each what was found.

    Raises:
        ConfigurationError: There is none.
    """
    name = one_at(path)
    store = open_store(path if name is None else split_url(path)[0])
    found = _inspect_all(store, newest_first(store) if name is None else [name])
    if not found:
        raise nothing_there(path)
    return found


def survey(path: str | Path, *, verify: bool = True) -> Survey:
    """What is in a folder of checkpoints.

    Args:
        path: Folder or URL.
        verify: Read every file, and note what was found; else believe manifests and notes.

    Raises:
        ConfigurationError: There is nothing, not even the remains of a save.
    """
    store = open_store(path)
    names, drafts = newest_first(store), store.drafts()
    if not names and not drafts:
        raise nothing_there(path)
    found = _inspect_all(store, names) if verify else [_look(store, name) for name in names]
    return Survey(store.url, found, store.aliases(), drafts)


def _inspect_all(store: CheckpointStore, names: list[str]) -> list[Inspection]:
    looks = [_look(store, name) for name in names]
    with _progress(sum(look.manifest.size for look in looks if look.manifest is not None)) as on_read:
        verified = (_verify(store, look, on_read) for look in looks)
        return [inspection for inspection in verified if inspection is not None]


def _look(store: CheckpointStore, name: str) -> Inspection:
    """What a checkpoint says of itself."""
    manifest, problems = believe(store, name)
    unlisted: list[str] = []
    if manifest is not None and manifest.files:
        with suppress(OSError):  # it may be removed at this moment
            unlisted = [file for file in store.files(store.location(name)) if file not in manifest.files]
    return Inspection(name, f"{store.url}/{name}", manifest, problems, False, unlisted, store.marked(name))


def _verify(store: CheckpointStore, look: Inspection, on_read: Callable[[int], None]) -> Inspection | None:
    """Reads all of a checkpoint; None if a run has removed it meanwhile."""
    problems = look.problems
    if look.manifest is not None:
        location = store.location(look.name)
        problems = find_problems(store, location, look.manifest, threads=THREADS, on_read=on_read)
    if problems:
        match became_of(store, look.name, look.manifest):
            case "removed":
                return None
            case "replaced":
                return _verify(store, _look(store, look.name), on_read)
        mark_damaged(store, look.name, problems)
    elif look.note is not None:
        store.mark(look.name, None)
    note = store.marked(look.name)
    return Inspection(look.name, look.path, look.manifest, problems, look.manifest is not None, look.unlisted, note)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """What to call with the bytes that were read; a bar, where somebody waits and watches."""
    if total < LARGE or not sys.stderr.isatty():
        yield lambda size: None
        return
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)
