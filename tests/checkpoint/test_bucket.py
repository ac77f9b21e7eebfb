"""What is special about object storage: conditional commits, uploads in parts, lost answers, and errors of set-up."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.checkpoint import bucket as bucket_module
from lightning_llm.checkpoint import objects
from lightning_llm.checkpoint.bucket import COMMIT, DRAFT, BucketStore
from lightning_llm.checkpoint.manifest import MANIFEST
from lightning_llm.checkpoint.store import open_store
from lightning_llm.checkpoint.verify import verify
from lightning_llm.errors import ConfigurationError
from tests.checkpoint.digests import digest_of
from tests.checkpoint.stores import damage, everything, in_process, leftovers, load, manifest_of, save

NAME = "step=1.ckpt"
OLD, NEW = {"file": b"old" * 1000}, {"file": b"new!" * 1000}


@pytest.fixture
def store(bucket_store: BucketStore) -> BucketStore:
    return bucket_store


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest parts that storage takes."""
    for module in (objects, bucket_module):
        monkeypatch.setattr(module, "PART_SIZE", 5 << 20)
    return 5 << 20


def on_request(store: BucketStore, operation: str, act: Callable[[Any], Any]) -> None:
    """Calls `act` with each such request before it is sent; what it returns is taken for the answer."""
    store._objects._client.meta.events.register(f"before-send.s3.{operation}", lambda request, **_: act(request))


def answer(request: Any, status: int, body: bytes, **headers: str) -> Any:
    from botocore.awsrequest import AWSResponse
    from urllib3 import HTTPResponse

    raw = HTTPResponse(io.BytesIO(body), headers=headers, status=status, preload_content=False)
    return AWSResponse(request.url, status, raw.headers, raw)


def refuse(request: Any, status: int, code: str) -> Any:
    return answer(request, status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())


# Commits


def test_where_things_are(store: BucketStore) -> None:
    attempt = uuid.uuid4().hex
    location = store.create(NAME, attempt)
    assert location == f"{store.url}/{NAME}/{attempt}"
    store.write(location, "folder/file", [b"1"], "xxh3_128")
    store.commit(location, NAME, manifest_of({"folder/file": b"1"}).to_bytes())
    assert store.location(NAME) == location
    assert everything(store) == {f"{NAME}/{COMMIT}", f"{NAME}/{attempt}/{DRAFT}", f"{NAME}/{attempt}/folder/file"}


def test_a_commit_whose_answer_was_lost(store: BucketStore) -> None:
    """The client sends it once more, and the storage says that somebody has committed: it was this very process."""
    sent = []

    def lose_the_first(attempts: int, operation: Any, **_: Any) -> float | None:
        sent.append(attempts)
        return 0 if attempts == 1 else None

    for contents in (OLD, NEW):
        location = store.create(NAME, uuid.uuid4().hex)
        store.write(location, "file", [contents["file"]], "xxh3_128")
        events = store._objects._client.meta.events
        events.register_first("needs-retry.s3.PutObject", lose_the_first)
        store.commit(location, NAME, manifest_of(contents).to_bytes())
        events.unregister("needs-retry.s3.PutObject", lose_the_first)
        assert sent[:2] == [1, 2]
        sent.clear()
        assert load(store, NAME) == contents
        assert leftovers(store) == set()


def test_somebody_else_committed_meanwhile(store: BucketStore) -> None:
    other = BucketStore(store.url)
    intruders: list[dict[str, bytes]] = [{"file": b"theirs"}]

    def intrude(request: Any) -> None:
        if request.url.endswith(COMMIT) and intruders:
            save(other, NAME, intruders.pop())

    location = store.create(NAME, uuid.uuid4().hex)
    store.write(location, "file", [NEW["file"]], "xxh3_128")
    on_request(store, "PutObject", intrude)
    with pytest.raises(FileExistsError, match="committed by another process meanwhile"):
        store.commit(location, NAME, manifest_of(NEW).to_bytes())
    assert load(store, NAME) == {"file": b"theirs"}
    intruders.append({"file": b"theirs again"})
    with pytest.raises(FileExistsError):
        store.commit(location, NAME, manifest_of(NEW).to_bytes())
    assert load(store, NAME) == {"file": b"theirs again"}
    store.commit(location, NAME, manifest_of(NEW).to_bytes())
    assert load(store, NAME) == NEW
    assert leftovers(store) == set()


def test_a_conflict_is_tried_again(store: BucketStore) -> None:
    conflicts = [1, 2]
    on_request(
        store,
        "PutObject",
        lambda request: (
            refuse(request, 409, "ConditionalRequestConflict")
            if request.url.endswith(COMMIT) and conflicts and conflicts.pop()
            else None
        ),
    )
    save(store, NAME, NEW)
    assert conflicts == []
    assert load(store, NAME) == NEW


def test_storage_without_conditions(store: BucketStore) -> None:
    refused = []

    def refuse_conditions(request: Any) -> Any:
        if {"If-None-Match", "If-Match"} & set(request.headers):
            refused.append(request.url)
            return refuse(request, 501, "NotImplemented")
        return None

    on_request(store, "PutObject", refuse_conditions)
    for contents in (OLD, NEW):
        save(store, NAME, contents)
        assert load(store, NAME) == contents
    assert len(refused) == 2


def test_other_refusals_are_errors_and_commit_nothing(store: BucketStore) -> None:
    save(store, NAME, OLD)
    on_request(
        store, "PutObject", lambda request: refuse(request, 400, "QuotaExceeded") if COMMIT in request.url else None
    )
    with pytest.raises(OSError, match="QuotaExceeded"):
        save(store, NAME, NEW)
    assert load(store, NAME) == OLD


def test_a_copy_is_a_checkpoint_with_its_last_object(store: BucketStore, bucket: str) -> None:
    """Copied object by object to another prefix, it is none before `COMMIT.json` has arrived."""
    save(store, NAME, {"a": b"1" * 5000, "b": b"2"})
    copy = BucketStore(f"{store.url}-copy")
    keys = [each.key for each in store._objects.list(store._prefix)]
    for key in sorted(keys, key=lambda key: key.endswith(COMMIT)):
        assert copy.names() == []
        found = store._objects.get(key)
        assert found is not None
        copy._objects.put(copy._prefix + key.removeprefix(store._prefix), found.body)
    assert copy.names() == [NAME]
    assert verify(copy, NAME) == []


def test_sweeping_keeps_what_a_damaged_commit_may_have_meant(store: BucketStore) -> None:
    assert in_process(lambda: save(store, NAME, OLD)) == 0
    found = store._objects.get(store._key(NAME, COMMIT))
    assert found is not None
    damage(store, NAME, MANIFEST, found.body.replace(b"attempt", b"Attempt"))
    assert [problem.file for problem in verify(store, NAME)] == [MANIFEST]
    store.sweep()
    damage(store, NAME, MANIFEST, found.body)
    assert verify(store, NAME) == []


def test_drafts_of_other_machines_have_a_day(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setattr(bucket_module, "machine", lambda: "elsewhere")
        location = store.create(NAME, uuid.uuid4().hex)
    store.write(location, "file", [b"1"], "xxh3_128")
    before = everything(store)
    store.sweep()
    assert everything(store) == before
    monkeypatch.setattr(bucket_module, "STALE", timedelta(0))
    store.sweep()
    assert everything(store) == set()


# Uploads and downloads


@pytest.mark.parametrize("parts, more", [(1, -1), (1, 0), (1, 1), (6, 0)])
def test_sizes_around_a_part(store: BucketStore, small_parts: int, parts: int, more: int) -> None:
    content = os.urandom(size := parts * small_parts + more)
    location = store.create(NAME, uuid.uuid4().hex)
    pieces = [content[start : start + 300_000] for start in range(0, size, 300_000)]
    assert store.write(location, "file", pieces, "xxh3_128") == digest_of([content], "xxh3_128")
    assert b"".join(map(bytes, store.read(location, "file", 7_000_000))) == content
    assert store.write(location, "file", [b"again"], "xxh3_128").size == 5
    assert b"".join(map(bytes, store.read(location, "file", 10))) == b"again"


def test_memory_is_bounded(store: BucketStore, small_parts: int) -> None:
    location = store.create(NAME, uuid.uuid4().hex)
    piece = os.urandom(100_000)
    tracemalloc.start()
    try:
        record = store.write(location, "file", (piece for _ in range(800)), "xxh3_128")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert record.size == 80_000_000
    assert peak < (objects.THREADS + 4) * small_parts


def test_a_source_that_fails_leaves_no_upload(store: BucketStore, small_parts: int) -> None:
    def broken() -> Iterator[bytes]:
        yield b"1" * 12_000_000
        raise OSError("the source fails")

    location = store.create(NAME, uuid.uuid4().hex)
    with pytest.raises(OSError, match="the source fails"):
        store.write(location, "file", broken(), "xxh3_128")
    assert everything(store) == {f"{NAME}/{location.rpartition('/')[2]}/{DRAFT}"}
    store.write(location, "file", [b"1" * 12_000_000], "xxh3_128")
    store.commit(location, NAME, manifest_of({"file": b"1" * 12_000_000}, 1, "xxh3_128", 1 << 20).to_bytes())
    assert verify(store, NAME) == []


def test_a_part_that_arrives_damaged_is_refused_and_nothing_is_left(store: BucketStore, small_parts: int) -> None:
    def flip(request: Any) -> None:
        if "partNumber=3" in request.url:
            request.body[1000] ^= 1  # on the wire, after the checksum was made

    # SeaweedFS compares the signed SHA-256 too, so that either refuses it.
    on_request(store, "UploadPart", flip)
    location = store.create(NAME, uuid.uuid4().hex)
    with pytest.raises((OSError, ConfigurationError)):
        store.write(location, "file", [bytes(20_000_000)], "xxh3_128")
    assert everything(store) == {f"{NAME}/{location.rpartition('/')[2]}/{DRAFT}"}


def test_an_upload_cut_off_by_the_death_of_its_process(store: BucketStore, small_parts: int) -> None:
    def die() -> Iterator[bytes]:
        yield b"1" * 40_000_000
        os.kill(os.getpid(), signal.SIGKILL)

    code = in_process(lambda: store.write(store.create(NAME, uuid.uuid4().hex), "file", die(), "xxh3_128"))
    assert code == -signal.SIGKILL
    assert sum("upload" in key for key in everything(store)) == 1
    store.sweep()
    assert everything(store) == set()


def test_a_download_that_breaks_off_is_tried_again(store: BucketStore) -> None:
    content = os.urandom(20_000)
    save(store, NAME, {"file": content})
    broken = [1, 2]

    def cut_off(request: Any) -> Any:
        if request.url.endswith("/file") and broken:
            broken.pop()
            return answer(request, 206, content[:100], **{"Content-Length": "20000"})
        return None

    on_request(store, "GetObject", cut_off)
    assert b"".join(map(bytes, store.read(store.location(NAME), "file", 1 << 20))) == content
    assert broken == []


def test_what_cannot_be_read_now_is_not_called_damaged(store: BucketStore) -> None:
    save(store, NAME, NEW)
    on_request(
        store,
        "GetObject",
        lambda request: answer(request, 206, b"", **{"Content-Length": "9"}) if request.url.endswith("/file") else None,
    )
    (problem,) = verify(store, NAME)
    assert not problem.damaged
    assert problem.reason.startswith("it cannot be read")


# Set-up


def test_it_is_imported_without_torch() -> None:
    """The process that writes in the background starts in a moment."""
    package = Path(bucket_module.__file__).parents[1]
    code = (
        "import sys, types\n"
        "package = types.ModuleType('lightning_llm')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "sys.modules['lightning_llm'] = package\n"
        "from lightning_llm.checkpoint.store import open_store\n"
        "open_store('s3://bucket/prefix')\n"
        "print(sorted({'torch', 'numpy', 'lightning', 'boto3'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "s3:bucket", "bucket/prefix"])
def test_an_address_without_a_bucket(url: str) -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket/prefix"):
        BucketStore(url)


def test_a_whole_bucket(object_storage: Any) -> None:
    store = open_store(f"s3://{object_storage.bucket('whole')}")
    save(store, NAME, OLD)
    assert store.names() == [NAME]
    assert load(store, NAME) == OLD
    store.sweep()
    store.remove(NAME)
    assert everything(store) == set()


def test_there_is_no_such_bucket(object_storage: Any) -> None:
    with pytest.raises(ConfigurationError, match="no bucket 'nowhere' at http://127.0.0.1"):
        BucketStore("s3://nowhere/run").names()
    with pytest.raises(ConfigurationError, match="no bucket 'nowhere'"):
        BucketStore("s3://nowhere/run").create(NAME, "1")


@pytest.mark.parametrize(
    "code, status, advice",
    [
        ("SignatureDoesNotMatch", 403, "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"),
        ("InvalidAccessKeyId", 403, "Check AWS_ACCESS_KEY_ID"),
        ("AccessDenied", 403, "lack a permission"),
    ],
)
def test_the_storage_lets_nobody_in(store: BucketStore, code: str, status: int, advice: str) -> None:
    save(store, NAME, OLD)
    for operation in ("PutObject", "DeleteObjects"):
        on_request(store, operation, lambda request: refuse(request, status, code))
    with pytest.raises(ConfigurationError, match=advice):
        store.create(NAME, "1")
    store.mark(NAME, {"found": "now"})
    assert store.marked(NAME) is None
    assert verify(store, NAME) == [], "it can still be read"


def test_nobody_listens(object_storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="cannot be reached.*AWS_ENDPOINT_URL says where it is"):
        BucketStore("s3://bucket/run").names()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ConfigurationError, match="AWS_ENDPOINT_URL is an address such as http://"):
        BucketStore("s3://bucket/run").names()


def test_nobody_says_who_asks(object_storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        BucketStore("s3://bucket/run").names()
    monkeypatch.setenv("AWS_PROFILE", "none-of-this-name")
    with pytest.raises(ConfigurationError, match="none-of-this-name"):
        BucketStore("s3://bucket/run").names()


def test_boto3_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigurationError, match=r"pip install lightning-llm\[s3\]"):
        BucketStore("s3://bucket/run").names()
