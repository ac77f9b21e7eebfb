"""Checkpoints in an S3-compatible object storage.

prefix/step=1000.ckpt/COMMIT.json                      which draft is the checkpoint, and its manifest
prefix/step=1000.ckpt/1f3a.../rank_00000.safetensors   a file of a draft, committed or not
prefix/step=1000.ckpt/1f3a.../DRAFT.json               who began the draft
prefix/last.ckpt/ALIAS.json                            another name of a checkpoint
prefix/step=1000.ckpt.corrupt                          a note that the checkpoint is damaged
prefix/.claim                                          which process saves here

There is no rename in object storage, so a draft is uploaded to where it stays, and a single conditional PUT of
`COMMIT.json` makes it the checkpoint. Nothing depends on the order of listings. Where a name has `COMMIT.json` and
`ALIAS.json`, the former counts: so each of them takes the other's place in one step.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import Buffer

from lightning_llm.checkpoint.cache import CheckpointCache
from lightning_llm.checkpoint.digest import Digester, FileRecord, flat
from lightning_llm.checkpoint.manifest import Manifest, uuid_of
from lightning_llm.checkpoint.objects import PART_SIZE, Objects, StorageError
from lightning_llm.checkpoint.owner import is_running, machine, this_process
from lightning_llm.errors import ConfigurationError

COMMIT, ALIAS, DRAFT, CLAIM = "COMMIT.json", "ALIAS.json", "DRAFT.json", ".claim"
STALE = timedelta(days=1)  # without a new object, after which a draft of another machine is taken for abandoned
_ENVELOPE = re.compile(rb'\{"attempt": "([^"]+)", "manifest":\n(.*)\}\n', re.DOTALL)


@dataclass(frozen=True)
class _Commit:
    """A `COMMIT.json`.

    Attributes:
        etag: The storage's name for this content.
        body: All of it.
        attempt: The draft that is the checkpoint; empty where the envelope is damaged.
        manifest: As it was given; the whole body where the envelope is damaged, which no manifest looks like.
    """

    etag: str
    body: bytes
    attempt: str
    manifest: bytes


class BucketStore:
    """See `CheckpointStore`. A commit is a conditional PUT.

    Credentials and the storage's address come from where all of AWS's tools take them: `AWS_ACCESS_KEY_ID`,
    `AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...

    Args:
        url: `s3://bucket/prefix`.
    """

    def __init__(self, url: str) -> None:
        bucket = urlsplit(url).netloc
        if not url.startswith("s3://") or not bucket:
            raise ConfigurationError(f"{url!r} names no bucket. Write s3://bucket/prefix.")
        self._objects = Objects(bucket)
        self._root = f"s3://{bucket}/"
        self.url = url.rstrip("/")
        prefix = self.url.removeprefix(self._root.rstrip("/")).strip("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def _key(self, name: str, *rest: str) -> str:
        return self._prefix + "/".join((name, *rest))

    def _within(self, location: str, file: str) -> str:
        return f"{location}/{file}".removeprefix(self._root)

    # Drafts

    def create(self, name: str, attempt: str) -> str:
        """Notes who begins the draft."""
        self._refuse_foreign(name)
        owner = {"machine": machine(), "pid": this_process()}
        self._objects.put(self._key(name, attempt, DRAFT), json.dumps(owner).encode())
        return f"{self.url}/{name}/{attempt}"

    def _refuse_foreign(self, name: str) -> None:
        if self._read_commit(name) is None and self._is_foreign(name):
            raise ConfigurationError(
                f"{self.url}/{name} is there already and is not a checkpoint of lightning_llm. Choose another name or "
                "prefix."
            )

    def write(self, location: str, file: str, buffers: Iterable[Buffer], algorithm: str) -> FileRecord:
        """Uploads a file while it is digested; what is large goes in parts."""
        digester = Digester(algorithm)
        self._objects.upload(self._within(location, file), _cut(buffers, digester, PART_SIZE))
        return digester.record()

    def commit(self, location: str, name: str, manifest: bytes) -> None:
        """Puts `COMMIT.json`, on the condition that it is as it was until now, and removes what it replaces."""
        attempt = location.rpartition("/")[2]
        before = self._read_commit(name)
        with suppress(OSError, ConfigurationError):
            self._objects.delete(self._key(f"{name}.corrupt"))  # the note is on the one before
        self._put_commit(name, b'{"attempt": "%s", "manifest":\n%s}\n' % (attempt.encode(), manifest), before)
        with suppress(OSError, ConfigurationError):  # the checkpoint is there; `sweep` finds what stays
            self._objects.delete(self._key(name, ALIAS))
            if before and before.attempt and before.attempt != attempt:
                self._delete_all(self._key(name, before.attempt, ""))

    def _put_commit(self, name: str, body: bytes, before: _Commit | None) -> None:
        condition = {"IfMatch": before.etag} if before else {"IfNoneMatch": "*"}
        for pause in (0.1, 0.2, 0.4, 0.8, 1.6, None):
            try:
                self._objects.put(self._key(name, COMMIT), body, **condition)
                return
            except StorageError as error:
                if error.status == 412:
                    now = self._read_commit(name)
                    if now and now.body == body:  # ours: an answer was lost, and the request repeated
                        return
                    raise FileExistsError(f"{self.url}/{name} was committed by another process meanwhile") from error
                if error.status == 501 and condition:  # conditions are not known here, yet it is one step for readers
                    condition = {}
                elif error.status == 409 and pause is not None:  # two such requests at the same moment
                    time.sleep(pause)
                else:
                    raise

    def discard(self, location: str) -> None:
        """Removes a draft; but not if it is the checkpoint, because only the answer to the commit was lost."""
        name, attempt = location.removeprefix(f"{self.url}/").rsplit("/", 1)
        commit = self._read_commit(name)
        if commit is None or commit.attempt != attempt:
            self._abandon(self._key(name, attempt, ""))

    def _abandon(self, prefix: str) -> None:
        for found in self._objects.uploads(prefix):
            self._objects.abort(found.key, found.upload)
        self._delete_all(prefix)

    def _delete_all(self, prefix: str) -> None:
        """Deletes all objects under a prefix, at last the one that tells whose they are."""
        self._objects.delete(*(found.key for found in self._objects.list(prefix) if found.key != prefix + DRAFT))
        self._objects.delete(prefix + DRAFT)

    def recover(self) -> None:
        """Nothing is ever out of sight: a commit is one step."""

    def sweep(self) -> None:
        """Removes drafts of processes that are gone, and what is left of half a removal."""
        for name in self._objects.list_folder(self._prefix)[1]:
            attempts = self._objects.list_folder(self._key(name, ""))[1]
            dead = [attempt for attempt in attempts if not self._lives(name, attempt)]
            commit = self._read_commit(name)  # later than the list: what was committed meanwhile stays
            if commit and commit.attempt not in attempts:
                continue  # it is damaged, and who knows which of them it meant
            for attempt in dead:
                if commit is None or commit.attempt != attempt:
                    self._abandon(self._key(name, attempt, ""))

    def _owner(self, name: str, attempt: str) -> dict[str, Any] | None:
        """Who began a draft; None if it does not say, and so is none of ours."""
        draft = self._objects.get(self._key(name, attempt, DRAFT))
        return json.loads(draft.body) if draft else None

    def _lives(self, name: str, attempt: str) -> bool:
        owner = self._owner(name, attempt)
        if owner is None:
            return True
        if owner["machine"] == machine():
            return is_running(str(owner["pid"]))
        prefix = self._key(name, attempt, "")
        times = (found.time for found in (*self._objects.list(prefix), *self._objects.uploads(prefix)))
        return max(times, default=datetime.now(UTC)) > datetime.now(UTC) - STALE

    def _is_foreign(self, name: str) -> bool:
        """Whether there is an object at a name that was not made here. Empty folders, which consoles make, are none."""
        prefix = self._key(name, "")
        found = [each.key.removeprefix(prefix) for each in self._objects.list(prefix) if not each.key.endswith("/")]
        ours = {file.removesuffix(DRAFT) for file in found if file.endswith(f"/{DRAFT}")}
        return any(file not in (COMMIT, ALIAS) and file.partition("/")[0] + "/" not in ours for file in found)

    # Checkpoints

    def names(self) -> list[str]:
        """Prefixes with a `COMMIT.json`."""
        found = self._objects.list_folder(self._prefix)[1]
        return [name for name in found if self._objects.size(self._key(name, COMMIT)) is not None]

    def aliases(self) -> dict[str, str]:
        """Prefixes with an `ALIAS.json` of which the target is committed."""
        found = {name: self._resolve(name) for name in self._objects.list_folder(self._prefix)[1]}
        return {name: target for name, (target, commit) in found.items() if commit and target != name}

    def drafts(self) -> dict[str, int]:
        """What `sweep` would look at."""
        drafts: dict[str, int] = {}
        for name in self._objects.list_folder(self._prefix)[1]:
            prefix, commit = self._key(name, ""), self._read_commit(name)
            found = self._objects.list(prefix)
            for attempt in (each.key.split("/")[-2] for each in found if each.key.endswith(f"/{DRAFT}")):
                if commit is None or commit.attempt != attempt:
                    files = (each.size for each in found if each.key.startswith(f"{prefix}{attempt}/"))
                    drafts[f"{name}/{attempt}"] = sum(files)
        return drafts

    def manifest(self, name: str) -> bytes:
        """Reads it from `COMMIT.json`."""
        _, commit = self._resolve(name)
        return commit.manifest if commit else b""

    def location(self, name: str) -> str:
        """The draft that was committed."""
        name, commit = self._resolve(name)
        return f"{self.url}/{name}/{commit.attempt}" if commit else f"{self.url}/{name}"

    def _resolve(self, name: str) -> tuple[str, _Commit | None]:
        """A checkpoint's own name and commit."""
        commit = self._read_commit(name)
        if commit is None and (alias := self._objects.get(self._key(name, ALIAS))):
            name = json.loads(alias.body)["target"]
            commit = self._read_commit(name)
        return name, commit

    def _read_commit(self, name: str) -> _Commit | None:
        stored = self._objects.get(self._key(name, COMMIT))
        if stored is None:
            return None
        found = _ENVELOPE.fullmatch(stored.body)
        attempt, manifest = (found[1].decode(errors="replace"), found[2]) if found else ("", stored.body)
        return _Commit(stored.etag, stored.body, attempt, manifest)

    def files(self, location: str) -> list[str]:
        """All objects of the draft that was committed."""
        prefix = self._within(location, "")
        return sorted({each.key.removeprefix(prefix) for each in self._objects.list(prefix)} - {DRAFT})

    def read(self, location: str, file: str, chunk_size: int) -> Iterator[Buffer]:
        """Downloads a file, several ranges of a part at once."""
        key = self._within(location, file)
        size = self._objects.size(key)
        if size is None:
            raise FileNotFoundError(f"{location}/{file} is not there")
        ranges = ((start, min(chunk_size, size - start)) for start in range(0, size, chunk_size))
        yield from self._objects.download(key, ranges)

    def read_back(self, location: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Buffer]:
        """Downloads the parts."""
        return self._objects.download(self._within(location, file), ranges)

    def fetch(self, name: str, manifest: Manifest, files: Iterable[str]) -> Path:
        """Downloads what is not in this node's cache yet, and verifies it once more."""
        return CheckpointCache(self.url).fetch(self, self.location(name), manifest, files)

    def remove(self, name: str, uuid: str | None = None) -> None:
        """Deletes `COMMIT.json`, with which the checkpoint is gone, and then the rest."""
        if uuid is not None and uuid_of(self.manifest(name)) != uuid:
            return
        commit = self._read_commit(name)
        if commit is None and self._is_foreign(name):
            raise ConfigurationError(f"{self.url}/{name} is not a checkpoint of lightning_llm, so it is not removed.")
        self._objects.delete(self._key(name, ALIAS))
        self._remove_commit(name, commit)

    def _remove_commit(self, name: str, commit: _Commit | None) -> None:
        if commit:
            self._objects.delete(self._key(name, COMMIT))
            if commit.attempt:
                self._delete_all(self._key(name, commit.attempt, ""))
            self._objects.delete(self._key(f"{name}.corrupt"))

    def alias(self, name: str, target: str) -> None:
        """Puts `ALIAS.json`, and deletes the `COMMIT.json` that would come before it."""
        self._refuse_foreign(name)
        self._objects.put(self._key(name, ALIAS), json.dumps({"target": target}).encode())
        self._remove_commit(name, self._read_commit(name))

    def claim(self, owner: str) -> None:
        """Puts `.claim`."""
        self._objects.put(self._key(CLAIM), owner.encode())

    def claimant(self) -> str:
        """Reads `.claim`."""
        stored = self._objects.get(self._key(CLAIM))
        return stored.body.decode(errors="replace") if stored else ""

    def mark(self, name: str, report: dict[str, Any] | None) -> None:
        """Puts or deletes `NAME.corrupt`; where nothing may be written, nothing happens."""
        with suppress(OSError, ConfigurationError):
            if report is None:
                self._objects.delete(self._note(name))
            else:
                self._objects.put(self._note(name), json.dumps(report, indent=1).encode() + b"\n")

    def _note(self, name: str) -> str:
        """Of an alias it is its checkpoint's."""
        return self._key(f"{self._resolve(name)[0]}.corrupt")

    def marked(self, name: str) -> dict[str, Any] | None:
        """Reads `NAME.corrupt`."""
        note = self._objects.get(self._note(name))
        try:
            return json.loads(note.body) if note else None
        except ValueError:
            return {}


def _cut(buffers: Iterable[Buffer], digester: Digester, size: int) -> Iterator[bytearray]:
    """The same bytes in parts of one size; the last is smaller and may be empty."""
    part, filled = bytearray(size), 0
    for buffer in buffers:
        digester.update(buffer)
        view = flat(buffer)
        while len(view):
            count = min(len(view), size - filled)
            part[filled : filled + count] = view[:count]
            view, filled = view[count:], filled + count
            if filled == size:
                yield part
                part, filled = bytearray(size), 0
    del part[filled:]
    yield part
