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
from lightning_llm.checkpoint.owner import is_running, machine, this_process
from lightning_llm.checkpoint.selection import select
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import ConfigurationError
from tests import disks
from tests.checkpoint.stores import everything, in_process, load, manifest_of, put_foreign, save, start, wait_for

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
    assert store.names() == [], "looking changes nothing"
    assert before.is_dir()
    store.recover()
    assert store.names() == [NAME]
    assert load(store, NAME) == OLD
    (store.root / NAME).rename(before)
    assert select(store.root, alone=True).name == NAME, "a run that goes on finds it"
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
    assert is_running(this_process()) and is_running(str(os.getpid()))
    assert is_running("1")
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert not is_running(str(pid))


def test_another_process_of_the_same_id_is_not_the_owner(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a container has started anew, where the trainer has the same id each time."""
    pid, started = this_process().split(".")
    assert not is_running(f"{pid}.{int(started) - 1}")
    with monkeypatch.context() as before:
        before.setattr(folder_module, "this_process", lambda: f"{pid}.{int(started) - 1}")
        store.create(NAME, uuid.uuid4().hex)
    mine = store.create(NAME, uuid.uuid4().hex)
    store.sweep()
    assert os.listdir(store.root) == [Path(mine).name]


def test_many_look_and_one_recovers(store: FolderStore) -> None:
    """Two that recover at once do not disturb each other."""
    for _ in range(20):
        for number in range(5):
            (store.root / f".replaced-{number}").mkdir(parents=True, exist_ok=True)
        assert [wait_for(pid) for pid in [start(store.recover) for _ in range(4)]] == [0] * 4
        assert sorted(os.listdir(store.root)) == list("01234")
        for number in range(5):
            (store.root / str(number)).rmdir()


def test_a_file_is_foreign_and_stays(store: FolderStore) -> None:
    put_foreign(store, "last.ckpt")
    save(store, NAME, OLD)
    before = everything(store)
    for act in (
        lambda: store.alias("last.ckpt", NAME),
        lambda: store.create("last.ckpt", uuid.uuid4().hex),
        lambda: store.remove("last.ckpt"),
    ):
        with pytest.raises(ConfigurationError, match="not a checkpoint"):
            act()
    location = store.create("new.ckpt", uuid.uuid4().hex)
    put_foreign(store, "new.ckpt")
    with pytest.raises(ConfigurationError, match="not a checkpoint"):
        store.commit(location, "new.ckpt", b"")
    store.discard(location)
    assert everything(store) == before | {"new.ckpt"}


def test_trash_that_is_a_file_is_swept(store: FolderStore) -> None:
    store.root.mkdir(parents=True)
    (store.root / f".trash-x-{machine()}-999999999-1f3a").write_bytes(b"1")
    store.sweep()
    assert everything(store) == set()


def test_a_folder_of_litdata_is_no_checkpoint(store: FolderStore) -> None:
    put_foreign(store, "train/index.json")
    put_foreign(store, "train/chunk-0-0.bin")
    assert store.names() == []
    with pytest.raises(ConfigurationError, match="not a checkpoint"):
        store.remove("train")
    put_foreign(store, "damaged/index.json")
    put_foreign(store, "damaged/rank_00000.safetensors")
    assert store.names() == ["damaged"], "of which only the manifest is missing"


def test_folders_that_are_made_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    store = FolderStore(tmp_path / "a" / "b" / "run")
    location = store.create(NAME, uuid.uuid4().hex)
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    store.write(location, "assets/deep/file", [b"1"], "xxh3_128")
    assert {location, f"{location}/assets", f"{location}/assets/deep"} <= set(synced)
