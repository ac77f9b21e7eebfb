"""Model folders that were fetched or converted, kept on this node: each is made once, while others wait for it.

    LIGHTNING_LLM_CACHE/models/<key>/model.safetensors, config.json, ..., entry.json
                               <key>.lock    of who makes it, or looks at it
                               <key>.used    of who has it loaded

An entry comes into being by a rename, with the sizes and digests of its files; it is checked whenever it is used, and
made again if it is damaged. Those used longest ago make room for new ones. `sources.py` calls it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_llm._disk import make_folder, sync
from lightning_llm.checkpoint.cache import CACHE_VARIABLE
from lightning_llm.checkpoint.digest import Digester, FileRecord
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.weights import parse_size

log = logging.getLogger(__name__)

LIMIT_VARIABLE = "LIGHTNING_LLM_CACHE_LIMIT"
DEFAULT_LIMIT = "200GB"
ENTRY = "entry.json"
_ALGORITHM = "xxh3_128"
_READ = 8 << 20  # bytes


class ModelCache:
    """A node's model folders; all processes of the node may use it at once.

    Args:
        root: Folder; None: `LIGHTNING_LLM_CACHE`, or ~/.cache/lightning_llm.
        limit: Most bytes that it keeps, as a number or like "200GB"; None: `LIGHTNING_LLM_CACHE_LIMIT`, or 200GB. What
            is in use stays in any case.
        verify: Read all of an entry and compare digests before it is used, instead of names and sizes only.
    """

    def __init__(self, root: str | Path | None = None, *, limit: int | str | None = None, verify: bool = False) -> None:
        chosen = root or os.environ.get(CACHE_VARIABLE) or "~/.cache/lightning_llm"
        self.folder = Path(chosen).expanduser().absolute() / "models"
        size = limit if limit is not None else os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT
        try:
            self.limit = parse_size(size)
        except ConfigurationError:
            raise ConfigurationError(
                f"The cache's limit {size!r} is not a size: write bytes, or like 200GB ({LIMIT_VARIABLE})."
            ) from None
        self._verify = verify

    @contextmanager
    def entry(self, identity: Mapping[str, Any], make: Callable[[Path], object]) -> Iterator[Path]:
        """A folder with the content of `identity`, which no one removes while the `with` lasts.

        Files that are mapped by then stay readable after it, too.

        Args:
            identity: All that decides the content, as JSON.
            make: Writes it into an empty folder; called if it is not there yet, by one process at a time.

        Raises:
            ConfigurationError: The disk is full.
        """
        key = _key(identity)
        folder = self.folder / key
        make_folder(self.folder)
        while True:
            with self._locked(key, fcntl.LOCK_SH):
                if self._is_good(folder):
                    with suppress(OSError):  # a cache that others filled may be read-only
                        os.utime(folder / ENTRY)
                    yield folder
                    return
            with self._locked(key, fcntl.LOCK_EX):
                if not self._is_good(folder):
                    self._make(folder, identity, make)
                    self._make_room(keep=folder)

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Whether there is such an entry, good or not."""
        return (self.folder / _key(identity) / ENTRY).is_file()

    def hold(self, folder: Path, user: object) -> None:
        """Keeps an entry from making room for others as long as `user` is alive. It may still be made again, if it is
        damaged.

        Args:
            folder: What `entry` yielded, while its `with` lasts; folders from elsewhere are left alone.
            user: What reads the folder, or has mapped its files; it can be referred to weakly.
        """
        if folder.parent != self.folder:
            return
        try:
            file = self._open_lock(f"{folder.name}.used", fcntl.LOCK_SH)
        except ConfigurationError:
            return  # of a cache that others filled, in which only they make room
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for no one: to take it, `_remove` has to have the other lock
        weakref.finalize(user, os.close, file)

    def _open_lock(self, name: str, mode: int) -> int:
        """A descriptor of a lock's file. Of one that is there, others than its owner may take shared locks."""
        path = self.folder / name
        try:
            if mode == fcntl.LOCK_SH and path.is_file():
                return os.open(path, os.O_RDONLY)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ConfigurationError(
                f"{path} cannot be written: the cache is another user's or read-only, and does not have this model, or "
                f"has it damaged. Have its owner load it first, or set {CACHE_VARIABLE} to a folder of your own."
            ) from None

    @contextmanager
    def _locked(self, key: str, mode: int) -> Iterator[None]:
        file = self._open_lock(f"{key}.lock", mode)
        try:
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("Waiting for another process that is making %s.", self.folder / key)
                fcntl.flock(file, mode)
            yield
        finally:
            os.close(file)

    def _is_good(self, folder: Path) -> bool:
        """Whether an entry is what was made once; says what is wrong if there is one and it is not."""
        if not folder.is_dir():
            return False
        problem = self._problem(folder)
        if problem is not None:
            log.warning("%s is damaged and is made again: %s.", folder, problem)
        return problem is None

    def _problem(self, folder: Path) -> str | None:
        try:
            entry = json.loads((folder / ENTRY).read_bytes())
            listed, digest = entry["files"], entry["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{ENTRY} cannot be read ({error!r})"
        if digest != _digest_of(listed):
            return f"{ENTRY} is not what was written"
        for name, record in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != record["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {record['size']}"
            if self._verify and asdict(_record(path)) != record | {"chunks": tuple(record["chunks"])}:
                return f"{name} does not have its digest"
        return None

    def _make(self, folder: Path, identity: Mapping[str, Any], make: Callable[[Path], object]) -> None:
        for leftover in self.folder.glob(f".{folder.name}-*"):  # of a process that ended in the middle
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=self.folder))
        try:
            make(draft)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            listed = {str(path.relative_to(draft)): asdict(_record(path)) for path in files}
            content = {"identity": dict(identity), "files": listed, "digest": _digest_of(listed)}
            (draft / ENTRY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for path in (*files, draft / ENTRY, draft):
                sync(path)
            draft.chmod(0o755)
            os.close(self._open_lock(f"{folder.name}.used", fcntl.LOCK_EX))  # for others, who may only read
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
            sync(self.folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ConfigurationError(
                f"The disk of {self.folder} is full: make room there, or set {CACHE_VARIABLE} to a folder elsewhere."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _make_room(self, keep: Path) -> None:
        """Removes what was used longest ago and is not in use, until the limit is kept."""
        entries = []
        for path in self.folder.glob(f"*/{ENTRY}"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                files = json.loads(path.read_bytes())["files"]
                entries.append((path.stat().st_mtime, path.parent, sum(record["size"] for record in files.values())))
        total = sum(size for *_, size in entries)
        for _, folder, size in sorted(entries):
            if total <= self.limit:
                return
            if folder != keep and self._remove(folder):
                log.info("Removed %s, %d bytes, to make room.", folder, size)
                total -= size

    def _remove(self, folder: Path) -> bool:
        with suppress(BlockingIOError, ConfigurationError), ExitStack() as locks:
            for name in (f"{folder.name}.lock", f"{folder.name}.used"):
                file = self._open_lock(name, fcntl.LOCK_EX)
                locks.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / ENTRY).unlink(missing_ok=True)  # first: half an entry is none
            shutil.rmtree(folder, ignore_errors=True)
            return True
        return False


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of(listed: Mapping[str, Any]) -> str:
    digester = Digester(_ALGORITHM)
    digester.update(json.dumps(listed, sort_keys=True).encode())
    return digester.record().digest


def _record(path: Path) -> FileRecord:
    digester, buffer = Digester(_ALGORITHM), bytearray(_READ)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digester.update(memoryview(buffer)[:count])
    return digester.record()
