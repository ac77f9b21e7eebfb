"""Checksums of files, chunk by chunk, so that a damaged place is named and not only a damaged file.

Everything that is written goes through `Digester`, everything that is verified too. No torch in here: the process that
writes in the background starts in a moment because it does not import it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash
from typing_extensions import Buffer

CHUNK_SIZE = 64 << 20  # bytes
ALGORITHMS: dict[str, Callable[..., Any]] = {
    "xxh3_128": xxhash.xxh3_128,  # more than 10 GB/s; against accidents
    "sha256": hashlib.sha256,  # against people, together with a signed manifest
}


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes:
        size: Bytes.
        digest: Hexadecimal, over the chunks' digests one after the other.
        chunks: Hexadecimal digest of each chunk of `chunk_size` bytes; the last one may be shorter.
    """

    size: int
    digest: str
    chunks: tuple[str, ...]


class Digester:
    """Digests a stream of buffers of any sizes.

    Args:
        algorithm: One of `ALGORITHMS`.
        chunk_size: Bytes of a chunk.
    """

    def __init__(self, algorithm: str, chunk_size: int = CHUNK_SIZE) -> None:
        self._new = ALGORITHMS[algorithm]
        self._chunk_size = chunk_size
        self._chunk = self._new()
        self._room = chunk_size
        self._size = 0
        self._chunks: list[bytes] = []

    def update(self, buffer: Buffer) -> None:
        """Takes the next bytes of the file."""
        view = flat(buffer)
        while len(view):
            part = view[: self._room]
            self._chunk.update(part)
            self._size += len(part)
            self._room -= len(part)
            view = view[len(part) :]
            if not self._room:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks.append(self._chunk.digest())
        self._chunk = self._new()
        self._room = self._chunk_size

    def record(self) -> FileRecord:
        """Of everything that came until now; call it once, at the end."""
        if self._room < self._chunk_size or not self._chunks:
            self._close_chunk()
        whole = self._new()
        for chunk in self._chunks:
            whole.update(chunk)
        return FileRecord(self._size, whole.hexdigest(), tuple(chunk.hex() for chunk in self._chunks))


def flat(buffer: Buffer) -> memoryview:
    """A buffer's bytes in one dimension."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # `cast` refuses a shape with a zero
