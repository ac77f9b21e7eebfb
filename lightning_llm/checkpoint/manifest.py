"""`manifest.json`: what a committed checkpoint is made of. A folder without one is no checkpoint.

    {
     "format": "lightning_llm.checkpoint", "version": 1, "uuid": ..., "step": 1000, "created": ..., "world_size": 8,
     "mesh": {"tensor_parallel_size": 2, ...}, "versions": {"torch": ...}, "weights_only": false,
     "algorithm": "xxh3_128", "chunk_size": 67108864,
     "files": {"rank_00000.safetensors": {"size": ..., "digest": ..., "chunks": [...]}, ...},
     "digest": "..."
    }

The last entry is the digest of all bytes before it, so that the manifest vouches for itself; with a key there is an
HMAC beside it, and then nobody without the key can write a checkpoint that loads.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from lightning_llm.checkpoint.digest import ALGORITHMS, CHUNK_SIZE, FileRecord

MANIFEST = "manifest.json"
FORMAT = "lightning_llm.checkpoint"
VERSION = 1
KEY_VARIABLE = "LIGHTNING_LLM_CHECKPOINT_KEY"  # the secret of the HMAC
_END = re.compile(rb',\n "digest": "xxh3_128:([0-9a-f]{32})"(?:,\n "hmac": "sha256:([0-9a-f]{64})")?\n\}\n')
_LONGEST_END = 160


class ManifestError(Exception):
    """A manifest that cannot be believed; the message says why.

    Attributes:
        damaged: Whether it is wrong in itself; False where it may be right for another key or a later version.
    """

    def __init__(self, reason: str, *, damaged: bool = True) -> None:
        super().__init__(reason)
        self.damaged = damaged


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        uuid: Of this very save.
        step: Optimizer steps at the time of the save (`Trainer.global_step`).
        created: Time in UTC, ISO 8601.
        world_size: Processes that wrote it.
        files: Path within the checkpoint -> size and digests.
        mesh: Sizes of the parallel axes by their arguments' names.
        versions: Of lightning_llm, torch and lightning.
        weights_only: Whether there is nothing in it to resume a run from.
        algorithm: Of the files' digests.
        chunk_size: Bytes that each digest of a chunk covers.
        source: What it was made from, if not by a run: the uuid of another checkpoint, or the name of what was
            imported.
    """

    uuid: str
    step: int
    created: str
    world_size: int
    files: Mapping[str, FileRecord]
    mesh: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    weights_only: bool = False
    algorithm: str = "xxh3_128"
    chunk_size: int = CHUNK_SIZE
    source: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def to_bytes(self, key: bytes | None = None) -> bytes:
        """As it is stored; signed if there is a key."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body = json.dumps(content, indent=1)[: -len("\n}")].encode()
        end = f',\n "digest": "xxh3_128:{xxhash.xxh3_128(body).hexdigest()}"'
        if key is not None:
            end += f',\n "hmac": "sha256:{hmac.digest(key, body, hashlib.sha256).hex()}"'
        return body + end.encode() + b"\n}\n"

    @classmethod
    def from_bytes(cls, raw: bytes, key: bytes | None = None) -> Manifest:
        """Reads and checks what `to_bytes` wrote.

        Args:
            raw: The file's content.
            key: The secret it must have been signed with; None accepts any or no signature.

        Raises:
            ManifestError: empty, damaged, of a later version, or not signed with `key`.
        """
        if not raw:
            raise ManifestError("it is missing or empty")
        start = raw.rfind(b',\n "digest": ', max(0, len(raw) - _LONGEST_END))
        end = _END.fullmatch(raw, start) if start >= 0 else None
        if end is None:
            raise ManifestError("it does not end with its digest: it is cut off, or not a manifest")
        body = raw[:start]
        actual = xxhash.xxh3_128(body).hexdigest()
        if actual != end[1].decode():
            raise ManifestError(f"its digest is {actual}, not {end[1].decode()} as it says: it is damaged")
        if key is not None:
            if end[2] is None:
                raise ManifestError(f"it is not signed, and {KEY_VARIABLE} is set", damaged=False)
            if not hmac.compare_digest(hmac.digest(key, body, hashlib.sha256).hex(), end[2].decode()):
                raise ManifestError(f"its signature is not made with the key in {KEY_VARIABLE}", damaged=False)
        try:
            return cls._of(json.loads(raw))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ManifestError(f"it does not have the form of a manifest ({error!r})") from error

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Manifest:
        if content.pop("format", None) != FORMAT:
            raise ManifestError("it is not the manifest of a checkpoint")
        version = content.pop("version", None)
        if version != VERSION:
            reason = f"its format is version {version}; this lightning_llm reads version {VERSION}. Update it"
            raise ManifestError(reason, damaged=False)
        content = {name: value for name, value in content.items() if name not in ("digest", "hmac")}
        if content["algorithm"] not in ALGORITHMS:
            reason = f"its digests are {content['algorithm']!r}, which this lightning_llm does not know"
            raise ManifestError(reason, damaged=False)
        _inside(content["uuid"])  # it is the name of a folder where checkpoints are kept on a node
        content["files"] = {_inside(name): _record(record) for name, record in content["files"].items()}
        return cls(**content)


def uuid_of(raw: bytes) -> str | None:
    """Which save a stored manifest is of; None if there is none, or none that can be read."""
    try:
        return Manifest.from_bytes(raw).uuid
    except ManifestError:
        return None


def _record(stored: Mapping[str, Any]) -> FileRecord:
    return FileRecord(stored["size"], stored["digest"], tuple(stored["chunks"]))


def _inside(file: str) -> str:
    """A file's name, if it is a path within the checkpoint."""
    if not file or file.startswith("/") or "\\" in file or not {"", ".", ".."}.isdisjoint(file.split("/")):
        raise ManifestError(f"it lists {file!r}, which is no file of a checkpoint")
    return file


def secret() -> bytes | None:
    """The key that manifests are signed with, from the environment."""
    value = os.environ.get(KEY_VARIABLE)
    return value.encode() if value else None
