"""What is a bucket's own: other writers, killed writers, and stores that are not what they should be."""

from __future__ import annotations

import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import VerificationError, open_registry
from lightning_llm.registry.bucket import BucketRegistry
from tests.object_storage import ObjectStorage
from tests.registry.folders import check, content, kill_while_registering, write


def keys(storage: ObjectStorage, bucket: str) -> set[str]:
    return {item["Key"] for item in storage.client().list_objects_v2(Bucket=bucket).get("Contents", ())}


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(object_storage: ObjectStorage, tmp_path: Path, kills: int) -> None:
    bucket, bits = object_storage.bucket(), random.Random(6)
    sources = [write(tmp_path / f"source-{number}", number, size=100_000) for number in range(3)]

    seen, registry = 0, BucketRegistry(bucket)
    for _ in range(kills):
        kill_while_registering(registry.url, sources, bits)
        versions = registry.versions()
        assert len(versions) > seen, "a version that was there is lost"
        seen = len(versions)
    assert check(registry, tmp_path / "scratch") == seen
    for version in registry.versions():
        pulled = registry.pull("demo", str(version.version), tmp_path / f"pulled-{version.version}")
        assert content(pulled) == content(sources[int(version.metrics["number"]) % 3])


def test_uploads_of_the_dead_are_removed_and_those_of_the_living_are_not(
    object_storage: ObjectStorage, tmp_path: Path
) -> None:
    bucket = object_storage.bucket()
    registry = BucketRegistry(bucket, "models")
    first = registry.register("demo", write(tmp_path / "first", 1))
    object_storage.client().put_object(Bucket=bucket, Key="models/demo/20200101T000000-0123/config.json", Body=b"{}")
    object_storage.client().put_object(Bucket=bucket, Key="models/other/20200101T000000-0123/config.json", Body=b"{}")
    before = keys(object_storage, bucket)
    second = registry.register("demo", write(tmp_path / "second", 2))
    assert before < keys(object_storage, bucket), "a young upload may be somebody's work"
    BucketRegistry(bucket, "models", stale_after=timedelta(0)).register("demo", tmp_path / "second")
    assert keys(object_storage, bucket) == {
        "models/index.sqlite",
        "models/other/20200101T000000-0123/config.json",
        *(
            f"{version.location.removeprefix(f's3://{bucket}/')}/{file.path}"
            for version in (first, second)
            for file in registry.files(version)
        ),
    }
    check(registry, tmp_path / "scratch")


def test_a_failed_upload_leaves_nothing(object_storage: ObjectStorage, tmp_path: Path) -> None:
    """The source is changed while it is uploaded: a file is described, then another process writes to it."""
    bucket, source = object_storage.bucket(), write(tmp_path / "source", 1)
    registry = BucketRegistry(bucket)
    upload = registry._client.upload_file

    def upload_and_change(path: str, *rest: object) -> None:
        upload(path, *rest)
        (source / "config.json").write_text("changed")

    registry._client.upload_file = upload_and_change
    with pytest.raises(ConfigurationError, match=r"config\.json was changed while"):
        registry.register("demo", source)
    assert keys(object_storage, bucket) == set() and registry.versions() == []


def test_two_prefixes_are_two_registries(object_storage: ObjectStorage, tmp_path: Path) -> None:
    bucket, source = object_storage.bucket(), write(tmp_path / "source", 1)
    urls = [f"s3://{bucket}", f"s3://{bucket}/a/b", f"s3://{bucket}/a/"]
    for url in urls:
        made = open_registry(url).register("demo", source, aliases=["x"])
        assert made.version == 1 and made.location.startswith(f"{url.rstrip('/')}/demo/")
    for url in urls:
        assert open_registry(url).url == url.rstrip("/")
        assert len(open_registry(url).versions()) == 1


def test_no_such_bucket_and_no_server(object_storage: ObjectStorage, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 1)
    for use in (BucketRegistry.versions, lambda registry: registry.register("demo", source)):
        with pytest.raises(ConfigurationError, match="there is no such bucket"):
            use(BucketRegistry("not-there-at-all"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        environment.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(ConfigurationError, match="Is AWS_ENDPOINT_URL right"):
            BucketRegistry("bucket").versions()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.delenv(name)
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(ConfigurationError, match="no credentials"):
            BucketRegistry("bucket").versions()


def test_an_index_that_is_none(object_storage: ObjectStorage, tmp_path: Path) -> None:
    bucket = object_storage.bucket()
    object_storage.client().put_object(Bucket=bucket, Key="index.sqlite", Body=b"no database" * 1000)
    with pytest.raises(ConfigurationError, match="is not a registry's index"):
        BucketRegistry(bucket).versions()


def test_a_version_that_lost_its_files(object_storage: ObjectStorage, tmp_path: Path) -> None:
    bucket = object_storage.bucket()
    registry = BucketRegistry(bucket)
    made = registry.register("demo", write(tmp_path / "source", 1))
    for key in keys(object_storage, bucket) - {"index.sqlite"}:
        object_storage.client().delete_object(Bucket=bucket, Key=key)
    with pytest.raises(VerificationError, match=r"config\.json is missing"):
        registry.pull("demo", 1, tmp_path / "out")
    assert made.location in str(registry.get("demo").location)


@pytest.fixture
def careless_store(object_storage: ObjectStorage) -> Iterator[str]:
    """The same store behind a gateway that loses the conditions, as older stores ignore them."""

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:  # noqa: N802  http.server looks for this name
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("if-match", "host")}
            request = urllib.request.Request(
                object_storage.endpoint + self.path, data=body or None, headers=kept, method=self.command
            )
            try:
                answer = urllib.request.urlopen(request)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_DELETE = do_PUT  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_that_ignores_conditions_is_refused(
    careless_store: str, object_storage: ObjectStorage, tmp_path: Path
) -> None:
    bucket, source = object_storage.bucket(), write(tmp_path / "source", 1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", careless_store)
        registry = BucketRegistry(bucket)
        assert registry.versions() == []
        with pytest.raises(ConfigurationError, match="ignores If-Match"):
            registry.register("demo", source)
    assert keys(object_storage, bucket) == set()
