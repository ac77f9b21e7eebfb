"""Checkpoints in a folder of a local or shared file system.

root/step=1000.ckpt/manifest.json, rank_00000.safetensors, ...    committed
root/.staging-step=1000.ckpt-host-4711.93-1f3a/                   a draft, or what is left of one
root/.trash-...                                                   being removed
root/step=1000.ckpt.corrupt                                       a note that the checkpoint is damaged
root/.claim                                                       which process saves here
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from typing_extensions import Buffer

from lightning_llm._disk import make_folder, sync
from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.files import write_file
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest, uuid_of
from lightning_llm.checkpoint.owner import is_running, machine, this_process
from lightning_llm.errors import ConfigurationError

CLAIM = ".claim"
STALE = 3600.0  # seconds without a change after which a draft of another machine is taken for abandoned
_OWNED = re.compile(r"\.(?:staging|trash)-.*-(?P<machine>[^-]+)-(?P<process>\d+(?:\.\d+)?)-[^-]+")
_ALWAYS_THERE = ("index.json", "rank_00000.safetensors")  # in a checkpoint, beside its manifest
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class FolderStore:
    """See `CheckpointStore`. A commit is a rename.

    Args:
        root: The folder; it is made with the first checkpoint.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def create(self, name: str, attempt: str) -> str:
        """Makes the draft's folder."""
        self._refuse_foreign(name)
        make_folder(self.root)
        draft = self.root / self._owned("staging", name, attempt)
        draft.mkdir()
        return str(draft)

    def _refuse_foreign(self, name: str) -> None:
        if _is_foreign(self.root / name):
            raise ConfigurationError(
                f"{self.root / name} is there already and is not a checkpoint of lightning_llm. Choose another name or "
                "folder."
            )

    def _owned(self, kind: str, name: str, attempt: str) -> str:
        """A name that tells which process it belongs to, so that others can tell whether that one still lives."""
        return f".{kind}-{name}-{machine()}-{this_process()}-{attempt.replace('-', '_')}"

    def write(self, location: str, file: str, buffers: Iterable[Buffer], algorithm: str) -> FileRecord:
        """Writes a file and syncs it to the disk."""
        path = Path(location, file)
        if not Path(location).is_dir():
            raise FileNotFoundError(f"rank 0 made {location}, which is not there: all nodes must share {self.root}")
        make_folder(path.parent)
        record = write_file(path, buffers, algorithm)
        sync(path.parent)
        return record

    def commit(self, location: str, name: str, manifest: bytes) -> None:
        """Writes the manifest, syncs, renames, syncs."""
        self._refuse_foreign(name)
        draft, target = Path(location), self.root / name
        write_file(draft / f"{MANIFEST}.tmp", [manifest], "xxh3_128")
        (draft / f"{MANIFEST}.tmp").rename(draft / MANIFEST)
        sync(draft)
        with suppress(OSError):
            (self.root / f"{name}.corrupt").unlink()  # the note is on the one before
        if _is_empty(target):
            target.rmdir()
        self._put(draft, target)

    def _put(self, new: Path, target: Path) -> None:
        """Puts a folder or link in the place of what may be there, which is removed."""
        if os.path.lexists(target):
            self._exchange(new, target)
            sync(self.root)
            with suppress(FileNotFoundError):  # `sweep` of another process may have been faster
                self._throw_away(new)
        else:
            new.rename(target)
            sync(self.root)

    def _exchange(self, draft: Path, target: Path) -> None:
        """Lets a draft and a checkpoint change places in one step, or where the file system has none, in two."""
        if _exchange(draft, target):
            return
        before = self.root / f".replaced-{target.name}"  # from which `recover` takes it after a crash here
        _delete(before)
        target.rename(before)
        draft.rename(target)
        with suppress(FileNotFoundError):  # `sweep` of another process has removed it
            before.rename(draft)

    def recover(self) -> None:
        """Takes back what a crash between the two renames of `_exchange` has left out of sight."""
        for before in self.root.glob(".replaced-*"):
            target = self.root / before.name.removeprefix(".replaced-")
            if not os.path.lexists(target):
                with suppress(OSError):  # another process was faster, or the disk is read-only
                    before.rename(target)

    def discard(self, location: str) -> None:
        """Removes a draft's folder."""
        shutil.rmtree(location, ignore_errors=True)

    def sweep(self) -> None:
        """Removes drafts and trash of processes that are gone."""
        if not self.root.is_dir():
            return
        self.recover()
        for before in self.root.glob(".replaced-*"):
            if os.path.lexists(self.root / before.name.removeprefix(".replaced-")):
                _delete(before)  # a crash came after the second step of `_exchange`
        for path in self.root.glob(".*-*"):
            found = _OWNED.fullmatch(path.name)
            if found and not _lives(path, found["machine"], found["process"]):
                _delete(path)

    def names(self) -> list[str]:
        """Folders with a manifest, or of which only that is missing; aliases not."""
        if not self.root.is_dir():
            return []
        return [
            path.name
            for path in self.root.iterdir()
            if not path.name.startswith(".") and not path.is_symlink() and _is_checkpoint(path)
        ]

    def aliases(self) -> dict[str, str]:
        """Symbolic links between folders here."""
        if not self.root.is_dir():
            return {}
        links = [path for path in self.root.iterdir() if path.is_symlink() and not path.name.startswith(".")]
        return {path.name: os.readlink(path) for path in links if _is_checkpoint(path)}

    def drafts(self) -> dict[str, int]:
        """Hidden folders that `sweep` would look at."""
        found = [path for path in self.root.glob(".*-*") if _OWNED.fullmatch(path.name) and path.is_dir()]
        return {path.name: _size(path) for path in found}

    def manifest(self, name: str) -> bytes:
        """Reads `manifest.json`."""
        try:
            return (self.root / name / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def location(self, name: str) -> str:
        """The checkpoint's folder."""
        return str(self.root / name)

    def files(self, location: str) -> list[str]:
        """All that is in the folder."""
        root = Path(location)
        found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
        return [file for file in found if file != MANIFEST]

    def read(self, location: str, file: str, chunk_size: int) -> Iterator[Buffer]:
        """Reads a file in parts."""
        buffer = memoryview(bytearray(min(chunk_size, max(1, os.path.getsize(Path(location, file))))))
        with Path(location, file).open("rb", buffering=0) as stream:
            while count := _fill(stream, buffer):
                yield buffer[:count]

    def read_back(self, location: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Buffer]:
        """Drops what the kernel keeps of the parts, then reads them."""
        descriptor = os.open(Path(location, file), os.O_RDONLY)
        try:
            for start, size in ranges:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
                yield os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)

    def fetch(self, name: str, manifest: Manifest, files: Iterable[str]) -> Path:
        """The checkpoint's own folder."""
        return self.root / name

    def remove(self, name: str, uuid: str | None = None) -> None:
        """Renames the checkpoint's folder out of sight, then removes it."""
        path = self.root / name
        if not os.path.lexists(path) or (uuid is not None and uuid_of(self.manifest(name)) != uuid):
            return
        if path.is_symlink():
            path.unlink()
            return
        if _is_foreign(path):
            raise ConfigurationError(f"{path} is not a checkpoint of lightning_llm, so it is not removed.")
        self._throw_away(path)
        with suppress(OSError):
            (self.root / f"{name}.corrupt").unlink()

    def _throw_away(self, path: Path) -> None:
        trash = self.root / self._owned("trash", path.name.lstrip("."), uuid4().hex[:8])
        path.rename(trash)
        sync(self.root)
        _delete(trash)

    def alias(self, name: str, target: str) -> None:
        """Makes a symbolic link."""
        self._refuse_foreign(name)
        link = self.root / self._owned("trash", name, uuid4().hex[:8])
        link.symlink_to(target)
        self._put(link, self.root / name)

    def claim(self, owner: str) -> None:
        """Writes `.claim`, and syncs it: a machine that fails must not forget it."""
        make_folder(self.root)
        new = self.root / f"{CLAIM}.{this_process()}"
        write_file(new, [owner.encode()], "xxh3_128")
        new.replace(self.root / CLAIM)
        sync(self.root)

    def claimant(self) -> str:
        """Reads `.claim`."""
        try:
            return (self.root / CLAIM).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def mark(self, name: str, report: dict[str, Any] | None) -> None:
        """Writes or removes `NAME.corrupt`; on a file system that is read-only nothing happens."""
        note = self._note(name)
        with suppress(OSError):
            if report is None:
                note.unlink(missing_ok=True)
            else:
                note.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _note(self, name: str) -> Path:
        """Of an alias it is its checkpoint's."""
        path = self.root / name
        return self.root / f"{os.readlink(path) if path.is_symlink() else name}.corrupt"

    def marked(self, name: str) -> dict[str, Any] | None:
        """Reads `NAME.corrupt`."""
        try:
            return json.loads(self._note(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder was committed: a checkpoint without a manifest is a damaged one, not none."""
    return (path / MANIFEST).is_file() or all((path / file).is_file() for file in _ALWAYS_THERE)


def _is_foreign(path: Path) -> bool:
    """Whether there is something that was not made here, which nothing may take the place of."""
    return os.path.lexists(path) and not (path.is_symlink() or _is_checkpoint(path) or _is_empty(path))


def _size(folder: Path) -> int:
    """Bytes of all files in a folder from which others may remove some meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size
    return size


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lives(path: Path, on: str, process: str) -> bool:
    """Whether the process that a draft belongs to may still be at work on it."""
    if on == machine():
        return is_running(process)
    try:
        latest = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except OSError:
        return True
    return time.time() - latest < STALE


def _fill(stream: Any, buffer: memoryview) -> int:
    """Reads until `buffer` is full or the file ends; returns the bytes read."""
    count = 0
    while count < len(buffer) and (got := stream.readinto(buffer[count:])):
        count += got
    return count


def _exchange(first: Path, second: Path) -> bool:
    """Lets two folders change places in one step, where kernel and file system can (Linux, not NFS)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))
