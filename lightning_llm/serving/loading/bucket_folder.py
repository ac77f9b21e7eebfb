"""Model folders and `.gguf` files in object storage, brought to this node. `sources.py` calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_llm._disk import sync
from lightning_llm.checkpoint.objects import Listed, Objects
from lightning_llm.serving.loading.hub import WANTED

_PART = 64 << 20  # bytes of a file that are in memory at once


class BucketFolder:
    """What lies right under a prefix of a bucket, or the one object of that name.

    Args:
        url: `s3://bucket/prefix` or `s3://bucket/model.gguf`.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self._objects = Objects(parts.netloc)
        self._prefix = parts.path.strip("/")
        under = f"{self._prefix}/" if self._prefix else ""
        listed = self._objects.list(self._prefix)
        self._files = {
            each.key.removeprefix(under): each
            for each in listed
            if each.key.startswith(under) and "/" not in each.key.removeprefix(under)
        }
        self._object = next((each for each in listed if each.key == self._prefix), None)

    @property
    def names(self) -> Sequence[str]:
        """Of the files."""
        return sorted(self._files)

    @property
    def is_file(self) -> bool:
        """Whether the address is an object's own."""
        return self._object is not None

    def identity(self) -> dict[str, Any]:
        """What changes when any of the wanted files does."""
        found = [self._object] if self._object else self._wanted()
        return {"url": self.url, "files": [[each.key, each.size, each.time.isoformat()] for each in found]}

    def _wanted(self) -> list[Listed]:
        return [self._files[name] for name in self.names if any(fnmatch(name, pattern) for pattern in WANTED)]

    def fetch(self, folder: Path) -> None:
        """Downloads the object, or all files that a model needs.

        Raises:
            OSError: One cannot be read, or is not whole.
        """
        for each in [self._object] if self._object else self._wanted():
            path = folder / each.key.rpartition("/")[2]
            with path.open("wb") as file:
                for part in self._objects.download(each.key, _ranges(each.size)):
                    file.write(part)
            sync(path)


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_PART, size - start)) for start in range(0, size, _PART))
