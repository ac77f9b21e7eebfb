"""A registry in a bucket that speaks S3 (AWS, MinIO, Ceph, SeaweedFS, ...), through boto3.

    s3://bucket/prefix/index.sqlite           what is registered
    s3://bucket/prefix/NAME/UPLOAD/...        the files of a version; each registration has an UPLOAD of its own

Files are uploaded first. The commit is one PUT of the index with `If-Match` (or `If-None-Match: *` for the first): the
store refuses it when somebody else has written since it was read, and then it is done again on what is there now. So
writers need no lock, readers see a version whole or not at all, and a crash leaves at most an upload that no row names.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import Lineage, ModelRegistry, ModelVersion
from lightning_llm.registry.content import FileRecord, describe, list_files
from lightning_llm.registry.index import INDEX, Index

if TYPE_CHECKING:
    from botocore.client import BaseClient

PATIENCE = 120.0  # seconds of being overtaken by other writers
STALE_AFTER = timedelta(days=1)

_PROBE = ".conditional-write"
_OVERTAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
_MISSING = ("404", "NoSuchKey", "NotFound")

T = TypeVar("T")


class BucketRegistry(ModelRegistry):
    """A registry in a bucket. Endpoint and credentials are boto3's: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...

    Any number of processes on any number of machines may use it at once. The store must honour conditional writes,
    which is tried before the first write.

    Args:
        bucket: It must exist.
        prefix: Where in the bucket.
        stale_after: Uploads without a version (their writer was killed) are removed when they are older than this.
    """

    def __init__(self, bucket: str, prefix: str = "", *, stale_after: timedelta = STALE_AFTER) -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.stale_after = stale_after
        self._client = _client()
        self._honours_conditions = False

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """As of `ModelRegistry`."""
        return [self._located(version) for version in self._read(lambda index: index.versions(name))]

    def files(self, version: ModelVersion) -> tuple[FileRecord, ...]:
        """As of `ModelRegistry`."""
        return self._read(lambda index: index.files(version.name, version.version))

    def _register(
        self, name: str, source: Path, metrics: dict[str, float], lineage: Lineage, aliases: tuple[str, ...]
    ) -> ModelVersion:
        if name.startswith(INDEX):
            raise ConfigurationError(f"{name!r} cannot name a model here: the registry's index has that name.")
        upload = f"{name}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
        paths = list_files(source)
        before = [(source / path).stat() for path in paths]
        files = [describe(source, path) for path in paths]
        wanted = ModelVersion.before_commit(name, files, metrics, lineage, location=upload)

        def commit(index: Index) -> ModelVersion:
            version = index.find(wanted)
            if version is None:
                version = replace(wanted, version=index.next_version(name))
                index.add(version, files)
            return index.point(version, aliases)

        self._require_conditional_writes()
        known = self._read(lambda index: index.find(wanted))
        if known is None:
            try:
                self._upload(source, paths, upload)
                for path, old, new in zip(paths, before, [(source / path).stat() for path in paths], strict=True):
                    if (old.st_size, old.st_mtime_ns) != (new.st_size, new.st_mtime_ns):
                        raise ConfigurationError(f"{source / path} was changed while it was being registered.")
            except BaseException:
                self._remove(self._objects(upload))
                raise
        # From here on an error does not tell whether the row was written, so the upload stays; `_remove_stale` decides.
        version = self._change(commit)
        if version.location != upload:
            self._remove(self._objects(upload))
        self._remove_stale(name)
        return self._located(version)

    def _point(self, version: ModelVersion, alias: str) -> None:
        self._require_conditional_writes()
        self._change(lambda index: index.point(version, [alias]))

    def _fetch(self, version: ModelVersion, file: FileRecord, folder: Path) -> FileRecord:
        key = f"{version.location.removeprefix(f's3://{self.bucket}/')}/{file.path}"
        with _explained(self.url, missing=True):
            self._client.download_file(self.bucket, key, str(folder / file.path))
        sync(folder / file.path)
        return describe(folder, file.path)

    def _located(self, version: ModelVersion) -> ModelVersion:
        return replace(version, location=f"{self.url}/{version.location}")

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".lstrip("/")

    # The index

    def _read(self, read: Callable[[Index], T]) -> T:
        with self._open(write=False) as (index, _, _):
            return read(index)

    def _change(self, change: Callable[[Index], T]) -> T:
        """Reads, changes and writes the index, as often as it takes until nobody else was faster."""
        from botocore.exceptions import ClientError

        deadline, pause = time.monotonic() + PATIENCE, 0.02
        while True:
            with self._open(write=True) as (index, connection, etag):
                result = change(index)
                if not connection.total_changes:
                    return result
                index.commit()
                condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
                try:
                    with _explained(self.url):
                        self._client.put_object(
                            Bucket=self.bucket, Key=self._key(INDEX), Body=connection.serialize(), **condition
                        )
                    return result
                except ClientError as error:
                    if error.response["Error"]["Code"] not in _OVERTAKEN or time.monotonic() > deadline:
                        raise
            time.sleep(random.uniform(0, pause))
            pause = min(2 * pause, 2.0)

    @contextlib.contextmanager
    def _open(self, *, write: bool) -> Iterator[tuple[Index, sqlite3.Connection, str | None]]:
        """The index, in memory, and the ETag that it had."""
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            etag = None
            with contextlib.suppress(FileNotFoundError), _explained(self.url, missing=True):
                stored = self._client.get_object(Bucket=self.bucket, Key=self._key(INDEX))
                etag = stored["ETag"]
                connection.deserialize(stored["Body"].read())
            yield Index(connection, self.url, write=write), connection, etag

    def _require_conditional_writes(self) -> None:
        """A store that takes a PUT in spite of its condition would let two writers lose each other's versions."""
        from botocore.exceptions import ClientError

        if self._honours_conditions:
            return
        probe = {"Bucket": self.bucket, "Key": self._key(_PROBE)}
        try:
            with _explained(self.url):
                self._client.put_object(**probe, Body=b"", IfMatch='"never"')
        except ClientError as error:
            if error.response["Error"]["Code"] not in (*_OVERTAKEN, *_MISSING):
                raise
            self._honours_conditions = True
            return
        self._client.delete_object(**probe)
        raise ConfigurationError(
            f"The store at {self.url} ignores If-Match, so that two writers could lose each other's versions. Use a "
            "store with conditional writes, or a registry in a folder or in MLflow."
        )

    # The files

    def _upload(self, source: Path, paths: list[str], upload: str) -> None:
        for path in paths:
            with _explained(self.url):
                self._client.upload_file(str(source / path), self.bucket, self._key(f"{upload}/{path}"))

    def _remove_stale(self, name: str) -> None:
        """Removes uploads that no version has and that nobody can be working on any more."""
        uploads: dict[str, list[dict[str, Any]]] = {}
        for item in self._objects(name):
            upload = "/".join(item["Key"].removeprefix(self._key("")).split("/")[:2])
            uploads.setdefault(upload, []).append(item)
        for version in self._read(lambda index: index.versions(name)):
            uploads.pop(version.location, None)
        limit = datetime.now(UTC) - self.stale_after
        for items in uploads.values():
            if max(item["LastModified"] for item in items) < limit:
                self._remove(items)

    def _objects(self, folder: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._key(f"{folder}/")
        )
        return [item for page in pages for item in page.get("Contents", ())]

    def _remove(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            self._client.delete_object(Bucket=self.bucket, Key=item["Key"])


def _client() -> BaseClient:
    try:
        import boto3
    except ImportError as error:
        raise ConfigurationError('A registry in a bucket needs boto3: pip install "lightning-llm[s3]"') from error
    return boto3.Session().client("s3")  # the default session would keep credentials of earlier days


@contextlib.contextmanager
def _explained(url: str, *, missing: bool = False) -> Iterator[None]:
    """Turns what a user can mend into ConfigurationError; with `missing`, an object's absence to FileNotFoundError."""
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise ConfigurationError(
            f"{url}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        ) from error
    except EndpointConnectionError as error:
        raise ConfigurationError(f"{url}: {error}. Is AWS_ENDPOINT_URL right?") from error
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            raise ConfigurationError(f"{url}: there is no such bucket. Make it, or name another.") from error
        if missing and code in _MISSING:
            raise FileNotFoundError(url) from error
        raise
