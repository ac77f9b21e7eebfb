"""Both stores as the tests see them: how to save into one, how to damage what is in it, and how to die at any point."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_llm.checkpoint import bucket, files, folder, objects
from lightning_llm.checkpoint.bucket import BucketStore
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest
from tests.checkpoint.digests import digest_of

CHUNK_SIZE = 1000  # bytes, so that small files have several chunks
Store = FolderStore | BucketStore


def manifest_of(
    contents: Mapping[str, bytes], step: int = 1, algorithm: str = "xxh3_128", chunk_size: int = CHUNK_SIZE
) -> Manifest:
    """The manifest of a checkpoint of these files."""
    records = {file: digest_of([content], algorithm, chunk_size) for file, content in contents.items()}
    return Manifest(
        uuid=uuid.uuid4().hex,
        step=step,
        created="2026-01-01T00:00:00+00:00",
        world_size=1,
        files=records,
        algorithm=algorithm,
        chunk_size=chunk_size,
    )


def save(store: Store, name: str, contents: Mapping[str, bytes], manifest: bytes | None = None) -> bytes:
    """Commits a checkpoint of these files; returns its manifest."""
    manifest = manifest if manifest is not None else manifest_of(contents).to_bytes()
    location = store.create(name, uuid.uuid4().hex)
    for file, content in contents.items():
        store.write(location, file, [content], "xxh3_128")
    store.commit(location, name, manifest)
    return manifest


def load(store: Store, name: str) -> dict[str, bytes]:
    """A checkpoint's files."""
    manifest = Manifest.from_bytes(store.manifest(name))
    location = store.location(name)
    return {file: b"".join(map(bytes, store.read(location, file, CHUNK_SIZE))) for file in manifest.files}


def stored(store: Store, name: str, file: str) -> bytes:
    """What lies in the store as a checkpoint's file; `MANIFEST` is the object or file that has the manifest."""
    if isinstance(store, FolderStore):
        return (store.root / name / file).read_bytes()
    found = store._objects.get(_key(store, name, file))
    assert found is not None
    return found.body


def damage(store: Store, name: str, file: str, content: bytes | None) -> None:
    """Changes a checkpoint's file behind the store's back; None deletes it."""
    if isinstance(store, FolderStore):
        path = store.root / name / file
        path.unlink() if content is None else path.write_bytes(content)
    elif content is None:
        store._objects.delete(_key(store, name, file))
    else:
        store._objects.put(_key(store, name, file), content)


def _key(store: BucketStore, name: str, file: str) -> str:
    if file == MANIFEST:
        return store._key(name, bucket.COMMIT)
    return f"{store.location(name)}/{file}".removeprefix(store._root)


def put_foreign(store: Store, path: str) -> None:
    """Puts something that the store has not made."""
    if isinstance(store, FolderStore):
        (store.root / path).parent.mkdir(parents=True, exist_ok=True)
        (store.root / path).write_bytes(b"mine")
    else:
        store._objects.put(store._prefix + path, b"mine")


def everything(store: Store) -> set[str]:
    """All files or objects, and unfinished uploads."""
    if isinstance(store, FolderStore):
        return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir()}
    found = [each.key for each in store._objects.list(store._prefix)]
    found += [f"{each.key} (upload)" for each in store._objects.uploads(store._prefix)]
    return {key.removeprefix(store._prefix) for key in found}


def leftovers(store: Store) -> set[str]:
    """What belongs to no checkpoint, alias or note."""
    if isinstance(store, FolderStore):
        return {file for file in everything(store) if file.startswith(".")}
    locations = tuple(store.location(name).removeprefix(f"{store.url}/") for name in store.names())
    known = (bucket.COMMIT, bucket.ALIAS, ".corrupt")
    return {file for file in everything(store) if not file.endswith(known) and not file.startswith(locations)}


def in_process(act: Callable[[], Any]) -> int:
    """Runs something in a process of its own and returns its exit code: 1 after an OSError, 2 after another error."""
    return wait_for(start(act))


def start(act: Callable[[], Any]) -> int:
    """As `in_process`, but returns the process at once."""
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        act()
        code = 0
    except OSError:
        code = 1
    finally:
        if code == 2:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int) -> int:
    """Exit code, or minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(line: int, act: Callable[[], Any]) -> bool:
    """Runs something in a process that gets SIGKILL before the given line that it comes to in the stores' own code.

    Returns:
        Whether it came so far.
    """
    code = in_process(lambda: _count_lines(act, lambda count: os.kill(os.getpid(), signal.SIGKILL), line))
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def lines_of(act: Callable[[], Any], folder: Path) -> int:
    """How many lines of the stores' own code something takes, in a process of its own."""
    result = folder / "lines"
    assert in_process(lambda: result.write_text(str(_count_lines(act)))) == 0
    return int(result.read_text())


def _count_lines(act: Callable[[], Any], at: Callable[[int], None] | None = None, line: int = -1) -> int:
    traced = {module.__file__ for module in (bucket, files, folder, objects, shutil)}
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            count += 1
            if at is not None and count == line:
                at(count)
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return count
