"""Files of tensors: safetensors, written as a stream and read where they lie.

https://github.com/huggingface/safetensors#format: eight bytes with the header's length, a JSON header with each
tensor's type, shape and place, then the tensors' bytes. Any reader of safetensors opens what is written here.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import Digester, FileRecord, flat

ALIGNMENT = 64  # bytes, of the place where tensors begin
WRITE_SIZE = 16 << 20  # bytes that are handed to the kernel at once, then digested while they are in the cache


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place in a file.

    Attributes:
        name: Unique within the file.
        dtype: In safetensors' words: "F32", "BF16", ...
        shape: Of what is stored.
        start: First byte, counted from the end of the header.
        size: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def make_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Header of a file with these tensors, which must follow each other without a gap."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        content[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.size],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(raw: Buffer) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
    """Places of the tensors by name, the metadata, and where the tensors begin, in a file's first bytes."""
    view = memoryview(raw).cast("B")
    length = int.from_bytes(view[:8], "little")
    content = json.loads(bytes(view[8 : 8 + length]))
    metadata = content.pop("__metadata__", {})
    entries = {
        name: TensorEntry(name, found["dtype"], tuple(found["shape"]), found["data_offsets"][0], _extent(found))
        for name, found in content.items()
    }
    return entries, metadata, 8 + length


def _extent(found: Mapping[str, Any]) -> int:
    start, end = found["data_offsets"]
    return end - start


def write_file(path: Path, buffers: Iterable[Buffer], algorithm: str) -> FileRecord:
    """Writes a file that must not exist yet, digests it on the way, and returns when it is on the disk."""
    digester = Digester(algorithm)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for buffer in buffers:
            view = flat(buffer)
            for start in range(0, len(view), WRITE_SIZE):
                part = view[start : start + WRITE_SIZE]
                digester.update(part)
                while len(part):
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digester.record()


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's content, mapped into memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
