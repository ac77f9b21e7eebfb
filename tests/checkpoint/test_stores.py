"""One contract, held by folders and buckets alike: what is committed is whole, and what is not is not seen."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.checkpoint import folder
from lightning_llm.checkpoint.bucket import BucketStore
from lightning_llm.checkpoint.claim import check_claim, claim, taken_over
from lightning_llm.checkpoint.digest import ALGORITHMS, CHUNK_SIZE
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.checkpoint.store import open_store, split_url
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import ConfigurationError
from tests.checkpoint.digests import digest_of
from tests.checkpoint.stores import (
    Store,
    everything,
    in_process,
    killed_at,
    leftovers,
    lines_of,
    load,
    manifest_of,
    put_foreign,
    save,
    start,
    wait_for,
)

NAME = "step=1.ckpt"
OLD = {"rank_00000.safetensors": b"old" * 1000, "assets/config.json": b"{}"}
NEW = {"rank_00000.safetensors": b"new!" * 1000, "assets/config.json": b"{1}", "more": b""}


def test_a_draft_is_not_seen_until_it_is_committed(store: Store) -> None:
    location = store.create(NAME, uuid.uuid4().hex)
    for file, content in NEW.items():
        parts = [content[:7], memoryview(content)[7:]]
        assert store.write(location, file, parts, "xxh3_128") == digest_of([content], "xxh3_128")
        assert store.names() == []
        assert store.manifest(NAME) == b""
    (size,) = store.drafts().values()
    assert size >= sum(map(len, NEW.values()))
    manifest = manifest_of(NEW).to_bytes()
    store.commit(location, NAME, manifest)
    assert store.drafts() == {}
    assert store.files(store.location(NAME)) == sorted(NEW)
    assert store.names() == [NAME]
    assert store.manifest(NAME) == manifest
    assert load(store, NAME) == NEW
    assert verify(store, NAME) == []
    assert leftovers(store) == set()


def test_reading_in_parts(store: Store) -> None:
    content = bytes(range(256)) * 20
    save(store, NAME, {"file": content})
    location = store.location(NAME)
    for size in (1000, 1024, len(content), 10**6):
        parts = [bytes(part) for part in store.read(location, "file", size)]
        assert parts == [content[start : start + size] for start in range(0, len(content), size)]
    assert list(map(bytes, store.read_back(location, "file", [(1000, 500), (7, 3)]))) == [
        content[1000:1500],
        content[7:10],
    ]
    with pytest.raises(FileNotFoundError):
        list(store.read(location, "other", 1000))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_large_file(store: Store, algorithm: str) -> None:
    content = os.urandom(1 << 20) * 70  # two chunks, and for the bucket three parts
    location = store.create(NAME, uuid.uuid4().hex)
    record = store.write(location, "file", [content[:5], memoryview(content)[5:]], algorithm)
    assert record == digest_of([content], algorithm)
    assert len(record.chunks) == 2
    store.commit(location, NAME, manifest_of({"file": content}, 1, algorithm, CHUNK_SIZE).to_bytes())
    assert verify(store, NAME) == []
    store.remove(NAME)


def test_an_equal_store_is_made_from_its_url(store: Store) -> None:
    save(store, NAME, OLD)
    assert type(open_store(store.url)) is type(store)
    assert load(open_store(f"{store.url}/"), NAME) == OLD
    assert split_url(f"{store.url}/{NAME}") == (store.url, NAME)


def test_a_discarded_draft_leaves_nothing(store: Store) -> None:
    location = store.create(NAME, uuid.uuid4().hex)
    store.write(location, "file", [b"1"], "xxh3_128")
    store.discard(location)
    assert everything(store) == set()
    store.discard(location)


def test_what_is_committed_cannot_be_discarded(store: Store) -> None:
    """The answer to a commit may be lost, and whoever waited for it tidies up."""
    location = store.create(NAME, uuid.uuid4().hex)
    store.write(location, "file", [b"1"], "xxh3_128")
    store.commit(location, NAME, manifest_of({"file": b"1"}).to_bytes())
    store.discard(location)
    assert load(store, NAME) == {"file": b"1"}


def test_a_name_is_saved_again(store: Store) -> None:
    save(store, NAME, OLD)
    store.mark(NAME, {"found": "now"})
    save(store, NAME, NEW)
    assert store.names() == [NAME]
    assert load(store, NAME) == NEW
    assert store.marked(NAME) is None, "the note was on the one before"
    assert leftovers(store) == set()


def test_removal(store: Store) -> None:
    save(store, NAME, OLD)
    save(store, "other.ckpt", NEW)
    store.mark(NAME, {})
    store.remove(NAME)
    assert store.names() == ["other.ckpt"]
    assert store.manifest(NAME) == b""
    assert store.marked(NAME) is None
    assert {path.split("/")[0] for path in everything(store)} == {"other.ckpt"}
    store.remove(NAME)


def test_removal_of_what_was_replaced_meanwhile(store: Store) -> None:
    """A removal may be due after others: what has the name by then may be another checkpoint."""
    before, after = (Manifest.from_bytes(save(store, NAME, contents)).uuid for contents in (OLD, NEW))
    store.remove(NAME, before)
    assert load(store, NAME) == NEW
    store.remove(NAME, after)
    assert store.names() == []
    store.remove(NAME, after)
    save(store, NAME, OLD, b"damaged")
    store.remove(NAME, after)
    assert store.names() == [NAME]


@pytest.mark.parametrize(
    "url", ["gs://bucket/run/x", "memory://run/x", "http://host/x", "s3:/bucket/x", "file://host/x"]
)
def test_an_address_of_no_store(url: str) -> None:
    for act in (open_store, split_url):
        with pytest.raises(ConfigurationError, match="s3://bucket/prefix"):
            act(url)


def test_addresses() -> None:
    for bucket in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(ConfigurationError, match="s3://bucket/prefix/name"):
            split_url(bucket)
    assert split_url("s3://bucket/name/") == ("s3://bucket", "name")
    assert split_url("file:///a%20b/name") == ("/a b", "name")
    assert open_store("file:///a/b").url == "/a/b" == open_store(Path("/a/b")).url
    assert split_url("/a/step=1-val:2.ckpt") == ("/a", "step=1-val:2.ckpt")


def test_what_was_not_made_here_is_not_touched(store: Store) -> None:
    put_foreign(store, "data/tokens.bin")
    put_foreign(store, "notes/2026/today.txt")
    put_foreign(store, "README")
    before = everything(store)
    for name in ("data", "notes"):
        with pytest.raises(ConfigurationError, match="not a checkpoint"):
            store.create(name, uuid.uuid4().hex)
        with pytest.raises(ConfigurationError, match="not a checkpoint"):
            store.alias(name, NAME)
        with pytest.raises(ConfigurationError, match="not a checkpoint"):
            store.remove(name)
    store.sweep()
    assert store.names() == []
    assert everything(store) == before


def test_an_alias_moves(store: Store) -> None:
    first, second = save(store, "step=1.ckpt", OLD), save(store, "step=2.ckpt", NEW)
    store.alias("last.ckpt", "step=1.ckpt")
    assert store.manifest("last.ckpt") == first
    store.alias("last.ckpt", "step=2.ckpt")
    assert store.manifest("last.ckpt") == second
    assert load(store, "last.ckpt") == NEW
    assert verify(store, "last.ckpt") == []
    assert sorted(store.names()) == ["step=1.ckpt", "step=2.ckpt"]
    assert store.aliases() == {"last.ckpt": "step=2.ckpt"}
    store.mark("last.ckpt", {"found": "now"})
    assert store.marked("step=2.ckpt") == store.marked("last.ckpt") == {"found": "now"}
    assert store.marked("step=1.ckpt") is None
    store.remove("last.ckpt")
    assert store.aliases() == {}
    assert store.manifest("last.ckpt") == b""
    assert load(store, "step=2.ckpt") == NEW


def test_alias_and_checkpoint_take_each_others_place(store: Store) -> None:
    target = save(store, "step=1.ckpt", OLD)
    save(store, "last.ckpt", NEW)
    store.alias("last.ckpt", "step=1.ckpt")
    assert (store.names(), store.manifest("last.ckpt")) == (["step=1.ckpt"], target)
    store.mark("step=1.ckpt", {"found": "now"})
    save(store, "last.ckpt", NEW)
    assert store.aliases() == {}
    assert (store.marked("last.ckpt"), store.marked("step=1.ckpt")) == (None, {"found": "now"})
    assert sorted(store.names()) == ["last.ckpt", "step=1.ckpt"]
    assert (load(store, "last.ckpt"), load(store, "step=1.ckpt")) == (NEW, OLD)
    assert leftovers(store) == set()
    store.remove("last.ckpt")
    assert store.manifest("last.ckpt") == b"", "the alias of before is gone too"


def test_an_alias_of_what_is_gone(store: Store) -> None:
    save(store, "step=1.ckpt", OLD)
    store.alias("last.ckpt", "step=1.ckpt")
    store.remove("step=1.ckpt")
    assert store.manifest("last.ckpt") == b""
    assert store.aliases() == {}
    save(store, "step=2.ckpt", NEW)
    store.alias("last.ckpt", "step=2.ckpt")
    assert load(store, "last.ckpt") == NEW


def test_notes_on_damage(store: Store) -> None:
    save(store, NAME, OLD)
    assert store.marked(NAME) is None
    report = {"found": "2026-01-01", "problems": [{"file": "a", "chunk": 3}]}
    store.mark(NAME, report)
    assert store.marked(NAME) == report
    assert store.names() == [NAME]
    store.mark(NAME, None)
    assert store.marked(NAME) is None


def test_sweeping_removes_drafts_of_the_dead_alone(store: Store) -> None:
    save(store, NAME, OLD)
    mine = store.create("step=2.ckpt", uuid.uuid4().hex)
    store.write(mine, "file", [b"2"], "xxh3_128")
    before = everything(store)

    def die() -> None:
        for name in (NAME, "step=2.ckpt", "step=3.ckpt"):
            store.write(store.create(name, uuid.uuid4().hex), "file", [b"3"], "xxh3_128")

    assert in_process(die) == 0
    assert len(everything(store)) > len(before)
    store.sweep()
    assert everything(store) == before
    store.commit(mine, "step=2.ckpt", manifest_of({"file": b"2"}).to_bytes())
    assert verify(store, "step=2.ckpt") == []


def test_two_processes_commit_the_same_name(store: Store) -> None:
    """One of them may be told that the other was faster; a mixture there is never."""
    contents = [{"a": letter * 2000, "b": letter * 100} for letter in (b"x", b"y")]
    both_are_here = multiprocessing.get_context("fork").Barrier(2)

    def commit(own: dict[str, bytes]) -> None:
        location = store.create(NAME, uuid.uuid4().hex)
        for file, content in own.items():
            store.write(location, file, [content], "xxh3_128")
        both_are_here.wait(30)
        store.commit(location, NAME, manifest_of(own).to_bytes())

    for _ in range(10):
        codes = sorted(wait_for(pid) for pid in [start(lambda own=own: commit(own)) for own in contents])
        assert codes in ([0, 0], [0, 1]), codes
        assert store.names() == [NAME]
        assert verify(store, NAME) == []
        assert load(store, NAME) in contents
        store.sweep()
        assert leftovers(store) == set()


@dataclass(frozen=True)
class Change:
    """Something that must happen in one step: how the store is before, and what is done then."""

    prepare: Callable[[Store], Any]
    act: Callable[[Store], Any]


CHANGES = {
    "save": Change(lambda store: None, lambda store: save(store, NAME, NEW)),
    "save again": Change(lambda store: save(store, NAME, OLD), lambda store: save(store, NAME, NEW)),
    "save over an alias": Change(
        lambda store: (save(store, "target", OLD), store.alias(NAME, "target")), lambda store: save(store, NAME, NEW)
    ),
    "remove": Change(lambda store: save(store, NAME, OLD), lambda store: store.remove(NAME)),
    "move an alias": Change(
        lambda store: (save(store, "target", OLD), save(store, "next", NEW), store.alias(NAME, "target")),
        lambda store: store.alias(NAME, "next"),
    ),
    "alias over a checkpoint": Change(
        lambda store: (save(store, "next", NEW), save(store, NAME, OLD)), lambda store: store.alias(NAME, "next")
    ),
}


@pytest.fixture(params=["folder", "folder without exchange", "bucket"])
def killed_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "bucket":
        return request.getfixturevalue("bucket_store")
    if request.param == "folder without exchange":
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)  # as it answers on NFS
    return FolderStore(tmp_path / "run")


@pytest.mark.parametrize("points", ["some", pytest.param("most", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_any_point(killed_store: Store, change: str, points: str, tmp_path: Path) -> None:
    """Whatever line of the stores' code it is that a process does not come to: before or after, and nothing else."""
    store = killed_store
    stride = {"some": 111, "most": 3}[points] if isinstance(store, BucketStore) else {"some": 11, "most": 1}[points]
    prepare, act = CHANGES[change].prepare, CHANGES[change].act
    names = (NAME, "target", "next")

    def anew() -> None:
        for name in names:
            store.remove(name)
        prepare(store)

    def contents() -> dict[str, bytes]:
        return load(store, NAME) if store.manifest(NAME) else {}

    assert in_process(anew) == 0
    before = contents()
    lines = lines_of(lambda: act(store), tmp_path)
    after = contents()
    assert before != after
    seen = []
    for line in range(1, lines + 1, stride):
        assert in_process(anew) == 0
        assert killed_at(line, lambda: act(store)), f"{line} of {lines}"
        store.recover()
        for name in store.names():
            assert verify(store, name) == [], f"{name} at {line} of {lines}"
        seen.append(contents())
        store.sweep()
        assert contents() == seen[-1], f"swept at {line} of {lines}"
        assert leftovers(store) == set(), f"{line} of {lines}"
    changed = seen.index(after) if after in seen else len(seen)
    assert seen == [before] * changed + [after] * (len(seen) - changed)


def test_the_one_that_claims_a_place_last_is_known_to_all(store: Store) -> None:
    assert store.claimant() == ""
    store.claim("first-1.1")
    store.claim("second-2.2")
    assert open_store(store.url).claimant() == "second-2.2"
    assert store.names() == [] and store.drafts() == {} and store.aliases() == {}


def test_where_another_process_has_claimed_a_place_this_one_commits_nothing_more(store: Store) -> None:
    check_claim(store)  # whoever claims nothing is refused nothing
    claim(store)
    check_claim(store)
    store.claim("another-2.2")
    assert taken_over(store) == "another-2.2"
    with pytest.raises(ConfigurationError, match="taken over by another run .process another-2.2."):
        check_claim(store)
    claim(store)  # a run that begins anew takes it back
    check_claim(store)
