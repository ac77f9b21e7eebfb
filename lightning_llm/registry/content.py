"""Files, their digests, and folders that appear whole or not at all. Every registry of this room uses it.

Digests are xxh3_128: they find damage, at the speed of memory. They are no defence against somebody who forges files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError

ALGORITHM = "xxh3_128"
STAGING = ".registry-staging"

_CHUNK = 4 * 2**20  # bytes


class VerificationError(RuntimeError):
    """Stored files are not what was registered."""


@dataclass(frozen=True, order=True)
class FileRecord:
    """A file of a version.

    Attributes:
        path: Relative to the version's folder, with "/".
        size: Bytes.
        digest: "xxh3_128:" and 32 hexadecimal digits.
    """

    path: str
    size: int
    digest: str


def list_files(folder: Path) -> list[str]:
    """The paths of all files, relative and sorted. Links to files count as files, as in Hugging Face's cache.

    Raises:
        ConfigurationError: There are none, or there is something that is neither file nor folder.
    """
    paths = []
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            if not path.is_file() and (path.is_symlink() or not path.is_dir()):
                raise ConfigurationError(f"{path} is neither a file nor a folder: it cannot be registered.")
        paths += [Path(parent, name).relative_to(folder).as_posix() for name in names]
    if not paths:
        raise ConfigurationError(f"{folder} has no files.")
    return sorted(paths)


def describe(folder: Path, path: str) -> FileRecord:
    """Reads a file and computes its digest."""
    hasher, size = xxhash.xxh3_128(), 0
    with (folder / path).open("rb") as source:
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return FileRecord(path, size, f"{ALGORITHM}:{hasher.hexdigest()}")


def copy(source: Path, target: Path, path: str) -> FileRecord:
    """Copies a file durably; the digest is of the very bytes that were written, should the source change meanwhile."""
    hasher, size = xxhash.xxh3_128(), 0
    place = target / path
    place.parent.mkdir(parents=True, exist_ok=True)
    with (source / path).open("rb") as reader, place.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileRecord(path, size, f"{ALGORITHM}:{hasher.hexdigest()}")


def digest_of(files: Iterable[FileRecord]) -> str:
    """One digest for all: over path, size and digest of each, in the order of paths."""
    hasher = xxhash.xxh3_128()
    for file in sorted(files):
        hasher.update(f"{file.path}\0{file.size}\0{file.digest}\n".encode())
    return f"{ALGORITHM}:{hasher.hexdigest()}"


def matches(folder: Path, files: Iterable[FileRecord]) -> bool:
    """Whether a folder holds exactly these files."""
    expected = sorted(files)
    return list_files(folder) == [file.path for file in expected] and all(
        describe(folder, file.path) == file for file in expected
    )


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """An empty folder on the file system of `parent`, to be filled and then given to `publish`. It goes at the end.

    What killed processes have left here is removed: each staging folder has a lock, which ends with its owner.
    """
    area = parent / STAGING
    place, lock = _claim(area)
    try:
        _sweep(area)
        folder = place / "files"
        folder.mkdir()
        yield folder
    finally:
        _remove(place)
        os.close(lock)
        with contextlib.suppress(OSError):  # others are at work here
            area.rmdir()


def publish(folder: Path, target: Path) -> None:
    """Makes a staged folder durable, then visible as `target` at once, which must be missing or empty."""
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))
    folder.rename(target)
    sync(target.parent)


def _claim(area: Path) -> tuple[Path, int]:
    """A new place with its lock held. Between making and locking it, another process may sweep it away: then again."""
    while True:
        place = area / uuid.uuid4().hex
        try:
            place.mkdir(parents=True)
            lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (place / "lock").stat().st_ino == os.fstat(lock).st_ino:
                return place, lock
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)


def _sweep(area: Path) -> None:
    for place in area.iterdir():
        try:
            lock = os.open(place / "lock", os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(OSError):  # being made, being removed, or killed before it had a lock
                place.rmdir()
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(place)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)


def _remove(place: Path) -> None:
    """The lock goes last: without it nobody could tell that what is left has no owner."""
    with contextlib.suppress(OSError):  # another process is removing it too
        for entry in sorted(place.iterdir(), key=lambda entry: entry.name == "lock"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        place.rmdir()
