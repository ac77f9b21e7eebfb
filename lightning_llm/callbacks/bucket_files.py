"""What Lightning asks of a file system about a folder of checkpoints, answered for a bucket.

ModelCheckpoint and `ckpt_path="last"` ask fsspec, which needs s3fs for that; checkpoints themselves go through boto3.
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from lightning_llm.checkpoint.store import open_store


def register_bucket_files() -> None:
    """Lets fsspec know `s3://`, unless s3fs is there and knows it better."""
    if importlib.util.find_spec("s3fs") is None:
        fsspec.register_implementation("s3", BucketFiles, clobber=True)


class BucketFiles(AbstractFileSystem):
    """Whether there are checkpoints below a URL; nothing else."""

    protocol = "s3"

    def exists(self, path: str, **_: Any) -> bool:
        """Whether any checkpoint is committed there."""
        return bool(open_store(f"s3://{self._strip_protocol(path)}").names())

    def modified(self, path: str) -> datetime:
        """Now: of several folders that a run could go on from, the one in the bucket is the last."""
        return datetime.now(UTC)

    def isdir(self, path: str) -> bool:
        """A bucket has no folders."""
        return False
