"""Copies of a bucket's checkpoints on this node, for files that are to be mapped into memory.

LIGHTNING_LLM_CACHE/<store>/<uuid of the checkpoint>/rank_00000.safetensors
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import Digester
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.checkpoint.store import CheckpointStore
from lightning_llm.checkpoint.verify import check_file, compare

CACHE_VARIABLE = "LIGHTNING_LLM_CACHE"
UNUSED = 3600.0  # seconds after which a checkpoint makes room for the next one of its store


class CheckpointCache:
    """A node's copies of one store's checkpoints; all processes of the node may use it at once.

    Args:
        url: Of the store.
    """

    def __init__(self, url: str) -> None:
        root = os.environ.get(CACHE_VARIABLE) or "~/.cache/lightning_llm/checkpoints"
        self._folder = Path(root).expanduser().absolute() / hashlib.sha256(url.encode()).hexdigest()[:16]

    def fetch(self, store: CheckpointStore, location: str, manifest: Manifest, files: Iterable[str]) -> Path:
        """Brings files here that are not here yet, and verifies all of them.

        Args:
            store: That has them.
            location: Where it has them.
            manifest: What they must be.
            files: Paths within the checkpoint.

        Returns:
            The folder that they are in.

        Raises:
            OSError: One cannot be read, or is not what it must be.
        """
        folder = self._folder / manifest.uuid
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        self._prune(folder)
        for file in files:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f".{path.name}.lock")):
                if not self._has(folder, manifest, file):
                    _download(store.read(location, file, manifest.chunk_size), manifest, file, path)
        return folder

    def _has(self, folder: Path, manifest: Manifest, file: str) -> bool:
        expected = manifest.files[file]
        local = FolderStore(self._folder)
        return check_file(local, str(folder), file, expected, manifest.algorithm, manifest.chunk_size) is None

    def _prune(self, used: Path) -> None:
        for folder in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process tidies up too
                if folder != used and time.time() - folder.stat().st_mtime > UNUSED:
                    shutil.rmtree(folder, ignore_errors=True)


def _download(content: Iterator[Buffer], manifest: Manifest, file: str, path: Path) -> None:
    part, digester = path.with_name(f".{path.name}.part"), Digester(manifest.algorithm, manifest.chunk_size)
    try:
        with part.open("wb") as stream:
            for buffer in content:
                digester.update(buffer)
                stream.write(buffer)
        expected = manifest.files[file]
        problem = compare(file, expected, digester.record(), manifest.algorithm, manifest.chunk_size)
        if problem is not None:
            raise OSError(f"The download of a checkpoint's file failed: {problem}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this node at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
