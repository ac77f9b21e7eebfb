"""What `BucketStore` needs of an S3-compatible object storage: boto3, with errors that say what to do.

Large objects travel in parts, several at once. No torch in here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from typing_extensions import Buffer

from lightning_llm.errors import ConfigurationError

PART_SIZE = 32 << 20  # bytes of an upload's part; storage takes 10,000 of them, so an object may have 312 GiB
RANGE_SIZE = 8 << 20  # bytes of a download's part
THREADS = 4  # parts on their way at once; these and one more are in memory
TRIES = 3  # for a part whose download breaks off; the client itself repeats everything else


class StorageError(OSError):
    """A refusal by the storage.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class StoredObject:
    """A small object.

    Attributes:
        body: Its content.
        etag: The storage's name for this content.
    """

    body: bytes
    etag: str


@dataclass(frozen=True)
class Listed:
    """An object or an unfinished upload in a listing.

    Attributes:
        key: Its whole name.
        size: Bytes; 0 of an upload.
        time: When it was stored or begun.
        upload: The upload's identifier; empty for an object.
    """

    key: str
    size: int
    time: datetime
    upload: str = ""


class Objects:
    """A bucket's objects. Credentials and address come from where all of AWS's tools take them.

    Args:
        bucket: Its name.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._opened: tuple[int, Any] | None = None

    @property
    def _client(self) -> Any:
        """A client of this very process: connections do not outlive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _connect()
        return self._opened[1]

    def put(self, key: str, body: Buffer, **condition: str) -> None:
        """Stores a small object; `IfMatch` or `IfNoneMatch` may be a condition."""
        with self._explained():
            self._client.put_object(Bucket=self.bucket, Key=key, Body=body, ChecksumAlgorithm=_checksum(), **condition)

    def get(self, key: str) -> StoredObject | None:
        """A small object; None if there is none."""
        try:
            with self._explained():
                answer = self._client.get_object(Bucket=self.bucket, Key=key)
                return StoredObject(answer["Body"].read(), answer["ETag"])
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            with self._explained():
                return self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
        except StorageError as error:
            if error.status == 404:
                return None
            raise

    def list(self, prefix: str) -> Sequence[Listed]:
        """All objects under a prefix."""
        pages = self._pages("list_objects_v2", Prefix=prefix)
        found = [each for page in pages for each in page.get("Contents", ())]
        return [Listed(each["Key"], each["Size"], each["LastModified"]) for each in found]

    def list_folder(self, prefix: str) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the objects right under a prefix that ends with a slash, and of the prefixes there."""
        files, folders = [], []
        for page in self._pages("list_objects_v2", Prefix=prefix, Delimiter="/"):
            files += [found["Key"].removeprefix(prefix) for found in page.get("Contents", ())]
            folders += [found["Prefix"].removeprefix(prefix)[:-1] for found in page.get("CommonPrefixes", ())]
        return [file for file in files if file], folders

    def uploads(self, prefix: str) -> Sequence[Listed]:
        """All unfinished uploads under a prefix."""
        pages = self._pages("list_multipart_uploads", Prefix=prefix)
        found = [each for page in pages for each in page.get("Uploads", ())]
        return [Listed(each["Key"], 0, each["Initiated"], each["UploadId"]) for each in found]

    def _pages(self, operation: str, **arguments: str) -> Iterator[dict[str, Any]]:
        with self._explained():
            yield from self._client.get_paginator(operation).paginate(Bucket=self.bucket, **arguments)

    def delete(self, *keys: str) -> None:
        """Deletes objects, in no particular order; such as are not there are no error."""
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            with self._explained():
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            for failure in answer.get("Errors", ()):
                raise OSError(f"s3://{self.bucket}/{failure['Key']} cannot be deleted: {failure.get('Message')}")

    def abort(self, key: str, upload: str) -> None:
        """Gives up an unfinished upload and frees its parts."""
        with self._explained():
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    def upload(self, key: str, parts: Iterator[Buffer]) -> None:
        """Stores a stream of parts as one object, each with a checksum that the storage compares.

        Args:
            key: Of the object.
            parts: Each of `PART_SIZE` bytes, but for the last, which is smaller and may be empty.
        """
        first = next(parts)
        if memoryview(first).nbytes < PART_SIZE:
            self.put(key, first)
            return
        checksum = _checksum()
        with self._explained():
            upload = self._client.create_multipart_upload(Bucket=self.bucket, Key=key, ChecksumAlgorithm=checksum)
        target = {"Bucket": self.bucket, "Key": key, "UploadId": upload["UploadId"]}

        def send(number: int, part: Buffer) -> dict[str, Any]:
            answer = self._client.upload_part(**target, PartNumber=number, Body=part, ChecksumAlgorithm=checksum)
            kept = ("ETag", f"Checksum{checksum}")
            return {"PartNumber": number} | {name: answer[name] for name in kept if name in answer}

        try:
            with self._explained():
                with _threads("upload") as threads:
                    sent = [threads.submit(send, 1, first)]
                    del first
                    for number, part in enumerate(parts, 2):
                        if len(sent) >= THREADS:
                            sent[-THREADS].result()  # memory stays bounded, and a failure is the last of it
                        sent.append(threads.submit(send, number, part))
                    stored = [part.result() for part in sent]
                self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": stored})
        except BaseException:
            with suppress(OSError, ConfigurationError):
                self.abort(key, upload["UploadId"])
            raise

    def download(self, key: str, ranges: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
        """Parts of an object, each of which is overwritten with the next.

        Args:
            key: Of the object.
            ranges: First byte and number of bytes of each part.

        Raises:
            FileNotFoundError: There is no such object.
        """
        buffer = bytearray()
        with _threads("download") as threads:
            for start, size in ranges:
                if size > len(buffer):
                    buffer = bytearray(size)
                part = memoryview(buffer)[:size]
                requests = [
                    threads.submit(self._fill, key, start + at, part[at : at + RANGE_SIZE])
                    for at in range(0, size, RANGE_SIZE)
                ]
                for request in requests:
                    request.result()
                yield part

    def _fill(self, key: str, start: int, target: memoryview) -> None:
        """Downloads one range to its place."""
        from botocore.exceptions import BotoCoreError

        wanted = f"bytes={start}-{start + len(target) - 1}"
        with self._explained():
            for tries_left in reversed(range(TRIES)):
                try:
                    body = self._client.get_object(Bucket=self.bucket, Key=key, Range=wanted)["Body"]
                    count = 0
                    while count < len(target) and (got := body.readinto(target[count:])):
                        count += got
                    if count == len(target):
                        return
                except BotoCoreError:
                    if not tries_left:
                        raise
        raise OSError(f"s3://{self.bucket}/{key} ends before byte {start + len(target)}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns botocore's errors into Python's."""
        boto = _boto()
        try:
            yield
        except boto.ClientError as error:
            raise self._refusal(error) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
            raise ConfigurationError(
                f"No credentials for s3://{self.bucket}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE."
            ) from error
        except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
            raise ConnectionError(
                f"The storage of s3://{self.bucket} cannot be reached: {error}. AWS_ENDPOINT_URL says where it is; "
                "without it, it is taken to be Amazon's."
            ) from error
        except boto.BotoCoreError as error:
            raise OSError(f"s3://{self.bucket}: {error}") from error

    def _refusal(self, error: Any) -> Exception:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        reason = f"s3://{self.bucket}: {error}".rstrip(".")
        if code == "NoSuchKey":
            return FileNotFoundError(reason)
        if code == "NoSuchBucket":
            endpoint = self._client.meta.endpoint_url
            return ConfigurationError(f"There is no bucket {self.bucket!r} at {endpoint}. Make it, or name another.")
        if code == "InvalidBucketName":
            return ConfigurationError(f"{self.bucket!r} cannot be the name of a bucket. Write s3://bucket/prefix.")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return ConfigurationError(f"{reason}. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL.")
        if status == 403:
            return ConfigurationError(f"{reason}. The credentials in use lack a permission for this bucket.")
        return StorageError(status, reason)


def _boto() -> Any:
    try:
        import boto3  # noqa: F401
        from botocore import exceptions
    except ImportError as error:
        raise ConfigurationError(
            f"Checkpoints in object storage need boto3, which is not installed ({error}): pip install lightning-llm[s3]"
        ) from error
    return exceptions


def _connect() -> Any:
    _boto()
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 6},
        connect_timeout=10,
        read_timeout=120,  # seconds; the last request of a large upload takes its time
        max_pool_connections=4 * THREADS,
        # Files are checked by their digests in the manifest, which also tell the damaged chunk.
        response_checksum_validation="when_required",
    )
    try:
        return boto3.Session().client("s3", config=config)
    except ValueError as error:
        raise ConfigurationError(f"{error}. AWS_ENDPOINT_URL is an address such as http://storage:9000.") from error


def _checksum() -> str:
    """The best checksum that botocore can compute here; its own C library does better than zlib's."""
    return "CRC64NVME" if importlib.util.find_spec("awscrt") else "CRC32"


@contextmanager
def _threads(purpose: str) -> Iterator[ThreadPoolExecutor]:
    """Some threads; after an error what has not begun is not begun."""
    threads = ThreadPoolExecutor(THREADS, purpose)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
