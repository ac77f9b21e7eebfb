"""What is special about folders: disks that are full or read-only, leftovers of other machines, and old kernels."""

from __future__ import annotations

import os
import resource
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_llm.checkpoint import folder as folder_module
from lightning_llm.checkpoint.folder import STALE, FolderStore
from lightning_llm.checkpoint.owner import is_running, machine
from lightning_llm.checkpoint.verify import verify
from tests import disks
from tests.checkpoint.stores import everything, in_process, load, manifest_of, save

NAME = "step=1.ckpt"
OLD, NEW = {"file": b"old" * 1000}, {"file": b"new!" * 1000}


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", kilobytes=1024) as folder:
        yield folder


def test_a_full_disk(small_disk: Path) -> None:
    store = FolderStore(small_disk / "run")
    save(store, "step=0.ckpt", OLD)
    location = store.create(NAME, uuid.uuid4().hex)
    with pytest.raises(OSError, match="No space left"):
        store.write(location, "file", [bytes(300_000) for _ in range(9)], "xxh3_128")
    store.discard(location)
    assert store.names() == ["step=0.ckpt"]
    assert load(store, "step=0.ckpt") == OLD
    save(store, NAME, NEW)
    assert verify(store, NAME) == []


def test_a_disk_that_is_full_at_the_commit(small_disk: Path) -> None:
    store = FolderStore(small_disk / "run")
    save(store, NAME, OLD)
    location = store.create(NAME, uuid.uuid4().hex)
    store.write(location, "file", [NEW["file"]], "xxh3_128")
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        store.commit(location, NAME, manifest_of(NEW).to_bytes())
    store.discard(location)
    assert load(store, NAME) == OLD
    (small_disk / "ballast").unlink()
    save(store, NAME, NEW)
    assert load(store, NAME) == NEW


def test_a_read_only_disk(small_disk: Path) -> None:
    store = FolderStore(small_disk / "run")
    save(store, NAME, OLD)
    draft = store.create(NAME, uuid.uuid4().hex)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        store.create(NAME, uuid.uuid4().hex)
    with pytest.raises(OSError, match="Read-only"):
        store.write(draft, "file", [b"1"], "xxh3_128")
    store.mark(NAME, {"found": "now"})
    assert store.marked(NAME) is None
    assert verify(store, NAME) == [], "it can still be read"
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    save(store, NAME, NEW)
    assert load(store, NAME) == NEW


def test_a_limit_on_the_size_of_files(store: FolderStore) -> None:
    def limited() -> None:
        save(store, "step=0.ckpt", OLD)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        location = store.create(NAME, uuid.uuid4().hex)
        with pytest.raises(OSError, match="File too large"):
            store.write(location, "file", [bytes(20_000)], "xxh3_128")
        store.discard(location)
        assert store.names() == ["step=0.ckpt"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        save(store, NAME, {"file": bytes(20_000)})
        assert verify(store, NAME) == []

    assert in_process(limited) == 0
    assert sorted(store.names()) == ["step=0.ckpt", NAME]


def test_drafts_of_other_machines_have_an_hour(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setattr(folder_module, "machine", lambda: "elsewhere")
        location = Path(store.create(NAME, uuid.uuid4().hex))
    store.write(str(location), "file", [b"1"], "xxh3_128")
    os.utime(location, (0, 0))
    store.sweep()
    assert location.exists(), "a file in it is new"
    now = (location / "file").stat().st_mtime
    for age, stays in ((0.5 * STALE, True), (2 * STALE, False)):
        for path in (location / "file", location):
            os.utime(path, (now - age, now - age))
        store.sweep()
        assert location.exists() == stays


def test_attempts_of_any_form_are_swept(store: FolderStore) -> None:
    for attempt in ("1f3a", str(uuid.uuid4()), "a-12-b"):
        assert in_process(lambda attempt=attempt: store.create("a-1-b.ckpt", attempt)) == 0
    mine = store.create("a-1-b.ckpt", "a-12-b")
    store.sweep()
    assert os.listdir(store.root) == [Path(mine).name]


def test_an_empty_folder_is_no_obstacle(store: FolderStore) -> None:
    (store.root / NAME).mkdir(parents=True)
    save(store, NAME, NEW)
    assert load(store, NAME) == NEW


def test_a_crash_between_two_renames(store: FolderStore) -> None:
    """Where the kernel or the file system cannot exchange two folders."""
    save(store, NAME, OLD)
    before = store.root / f".replaced-{NAME}"
    (store.root / NAME).rename(before)
    assert store.names() == [NAME]
    assert load(store, NAME) == OLD
    (store.root / NAME).rename(before)
    save(store, NAME, NEW)
    store.sweep()
    assert load(store, NAME) == NEW
    assert everything(store) == {f"{NAME}/manifest.json", f"{NAME}/file"}


def test_the_owner_of_a_draft() -> None:
    assert "-" not in machine()
    seen = []

    def tell() -> None:
        assert machine() == seen[0]

    seen.append(machine())
    assert in_process(tell) == 0
    assert is_running(os.getpid())
    assert is_running(1)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert not is_running(pid)
