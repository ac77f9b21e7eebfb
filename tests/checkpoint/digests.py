"""The record that a file must get, computed beside the way that files go."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import CHUNK_SIZE, Digester, FileRecord


def digest_of(buffers: Iterable[Buffer], algorithm: str, chunk_size: int = CHUNK_SIZE) -> FileRecord:
    """The record of a file with this content."""
    digester = Digester(algorithm, chunk_size)
    for buffer in buffers:
        digester.update(buffer)
    return digester.record()
