"""A bucket's checkpoint on this node: downloaded once, by whichever process is first, and verified each time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_llm.checkpoint.bucket import BucketStore
from lightning_llm.checkpoint.cache import CACHE_VARIABLE, UNUSED
from lightning_llm.checkpoint.verify import read_manifest
from tests.checkpoint.stores import CHUNK_SIZE, Store, damage, save, start, wait_for

NAME = "step=1.ckpt"
FILES = {"rank_00000.safetensors": b"0" * 5000, "assets/config.json": b"{}", "rank_00001.safetensors": b"1" * 5000}
WANTED = ["rank_00000.safetensors", "assets/config.json"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def downloads(store: BucketStore) -> list[str]:
    """What is asked of the storage from now on, of the files themselves."""
    asked: list[str] = []
    events = store._objects._client.meta.events
    events.register("before-send.s3.GetObject", lambda request, **_: asked.append(request.url.rpartition("/")[2]))
    return asked


def test_the_files_that_are_asked_for(store: Store, cache: Path) -> None:
    save(store, NAME, FILES)
    folder = store.fetch(NAME, read_manifest(store, NAME), WANTED)
    for file in WANTED:
        assert (folder / file).read_bytes() == FILES[file]
    if isinstance(store, BucketStore):
        assert folder.is_relative_to(cache)
        assert set(files_in(folder)) == set(WANTED)


def test_they_are_downloaded_once(bucket_store: BucketStore) -> None:
    save(bucket_store, NAME, FILES)
    manifest = read_manifest(bucket_store, NAME)
    folder = bucket_store.fetch(NAME, manifest, WANTED)
    asked = downloads(bucket_store)
    assert bucket_store.fetch(NAME, manifest, FILES) == folder
    assert {name for name in asked if name != "COMMIT.json"} == {"rank_00001.safetensors"}
    assert files_in(folder) == FILES


def test_what_is_damaged_here_is_downloaded_again(bucket_store: BucketStore) -> None:
    save(bucket_store, NAME, FILES)
    manifest = read_manifest(bucket_store, NAME)
    folder = bucket_store.fetch(NAME, manifest, FILES)
    (folder / WANTED[0]).write_bytes(b"1" + b"0" * 4999)
    (folder / WANTED[1]).write_bytes(b"")
    bucket_store.fetch(NAME, manifest, FILES)
    assert files_in(folder) == FILES


def test_what_is_damaged_there_is_refused(bucket_store: BucketStore, cache: Path) -> None:
    save(bucket_store, NAME, FILES)
    damage(bucket_store, NAME, WANTED[0], b"0" * 2000 + b"1" + b"0" * 2999)
    with pytest.raises(OSError, match="rank_00000.safetensors: chunk 2 .bytes 2000 to 3000. has the xxh3_128 digest"):
        bucket_store.fetch(NAME, read_manifest(bucket_store, NAME), WANTED)
    assert files_in(cache) == {}
    damage(bucket_store, NAME, WANTED[0], None)
    with pytest.raises(FileNotFoundError):
        bucket_store.fetch(NAME, read_manifest(bucket_store, NAME), WANTED)
    assert files_in(cache) == {}


def test_ranks_of_a_node_fetch_at_once(bucket_store: BucketStore, tmp_path: Path) -> None:
    save(bucket_store, NAME, FILES)
    manifest = read_manifest(bucket_store, NAME)

    all_are_here = multiprocessing.get_context("fork").Barrier(4)

    def fetch(rank: int) -> None:
        asked = downloads(bucket_store)
        all_are_here.wait(30)
        folder = bucket_store.fetch(NAME, manifest, FILES)
        assert files_in(folder) == FILES
        (tmp_path / f"rank-{rank}").write_text("\n".join(name for name in asked if name != "COMMIT.json"))

    pids = [start(lambda rank=rank: fetch(rank)) for rank in range(4)]
    assert [wait_for(pid) for pid in pids] == [0] * 4
    asked = [name for rank in range(4) for name in (tmp_path / f"rank-{rank}").read_text().split()]
    chunks = {Path(file).name: -(-len(content) // CHUNK_SIZE) for file, content in FILES.items()}
    assert Counter(asked) == chunks, "one of them downloads a file, the others wait"


def test_old_ones_make_room(bucket_store: BucketStore) -> None:
    def fetch(store: BucketStore, step: int) -> Path:
        name = f"step={step}.ckpt"
        if name not in store.names():
            save(store, name, FILES)
        return store.fetch(name, read_manifest(store, name), WANTED)

    folders = [fetch(bucket_store, step) for step in (1, 2, 3)]
    for folder, age in zip(folders, (2 * UNUSED, 0.5 * UNUSED, 0.0), strict=True):
        os.utime(folder, (time.time() - age, time.time() - age))
    fetch(BucketStore(f"{bucket_store.url}-other"), 1)
    assert [folder.exists() for folder in folders] == [True] * 3, "another store's are not ours to remove"
    assert fetch(bucket_store, 3) == folders[2]
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_it_is_in_the_home_folder_by_default(
    bucket_store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(bucket_store, NAME, FILES)
    folder = bucket_store.fetch(NAME, read_manifest(bucket_store, NAME), WANTED)
    assert folder.is_relative_to(tmp_path / ".cache/lightning_llm/checkpoints")
