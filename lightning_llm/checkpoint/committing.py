"""The second half of a save, on any thread: all ranks write their files into a draft, and rank 0 commits it.

    draft    rank 0 makes it and says where it is
    written  every rank has written its file and says what it is, or why not
    outcome  rank 0 has checked that all is there, written what is beside the files, and committed; or discarded it

An error anywhere is everyone's: all ranks leave `commit_together` the same way.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from lightning_llm._version import __version__, lightning_version
from lightning_llm.checkpoint.claim import check_claim
from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.manifest import Manifest, secret
from lightning_llm.checkpoint.planning import SavePlan, rank_file, size_of
from lightning_llm.checkpoint.rendezvous import Rendezvous
from lightning_llm.checkpoint.store import CheckpointStore, open_store, split_url
from lightning_llm.checkpoint.worker import Verify, write_and_check
from lightning_llm.errors import CheckpointError, ConfigurationError

INDEX = "index.json"
TRAINER = "trainer.json"
TRAINER_TENSORS = "trainer.safetensors"

log = logging.getLogger(__name__)


class FileWriter(Protocol):
    """Writes this rank's file into a draft, as often as it is asked to."""

    def __call__(self, store: CheckpointStore, location: str, file: str, algorithm: str) -> FileRecord:
        """See `write_and_check`."""
        ...


@dataclass(frozen=True)
class SaveJob:
    """A save after its snapshot; training has nothing to do with it any more.

    Attributes:
        path: Folder or URL of the checkpoint.
        step: Of its state.
        plan: This rank's part.
        write: Writes this rank's file.
        values: Plain values that this rank reports, encoded.
        trainer: The trainer's state, encoded; used on rank 0, as the rest.
        small_files: What else is written beside the ranks' files.
        mesh: Sizes of the parallel axes.
        weights_only: Whether there are no optimizers in it.
    """

    path: str
    step: int
    plan: SavePlan
    write: FileWriter
    values: Mapping[str, Any]
    trainer: Any
    small_files: Mapping[str, bytes]
    mesh: Mapping[str, int]
    weights_only: bool


class FinalError(CheckpointError):
    """An error that another attempt would only repeat."""


def commit_together(job: SaveJob, talk: Rendezvous, verify: Verify) -> int:
    """From draft to commit. Every rank calls it.

    Args:
        job: This rank's.
        talk: To the other ranks, on a topic of its own.
        verify: What is read back of the files that rank 0 writes itself.

    Returns:
        Bytes of the checkpoint.

    Raises:
        CheckpointError: Some rank could not do its part; nothing is left of the draft.
        RendezvousError: Some rank did not come in time.
    """
    url, name = split_url(job.path)
    store = open_store(url)

    def begin() -> dict[str, str]:
        return {"location": store.create(name, uuid.uuid4().hex[:12]), "algorithm": digest_algorithm()}

    draft = _result(talk.announce("draft", _message(begin) if talk.rank == 0 else None))
    location, algorithm = draft["location"], draft["algorithm"]
    written = _message(lambda: _write(job, store, location, algorithm, talk.rank))
    if talk.rank != 0:
        talk.report("written", written)
        return _result(talk.announce("outcome"))
    committer = _Committer(job, store, location, algorithm, verify)
    outcome = _message(lambda: committer.commit(name, talk.report("written", written)))
    if "error" in outcome:
        with suppress(OSError, ConfigurationError):  # the storage may be what failed; a later run sweeps
            store.discard(location)
    return _result(talk.announce("outcome", outcome))


def _write(job: SaveJob, store: CheckpointStore, location: str, algorithm: str, rank: int) -> dict[str, Any]:
    file = rank_file(rank)
    try:
        record = job.write(store, location, file, algorithm)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"rank {rank} could not write {file}: {error}") from error
    return {"plan": job.plan.uuid, "values": job.values, "file": [record.size, record.digest, record.chunks]}


@dataclass(frozen=True)
class _Committer:
    """Rank 0's end of a save."""

    job: SaveJob
    store: CheckpointStore
    location: str
    algorithm: str
    verify: Verify

    def commit(self, name: str, reports: list[Mapping[str, Any]]) -> int:
        """Checks that all is there, adds what is beside the ranks' files, and commits; returns the bytes."""
        written = [_result(report) for report in reports]
        files = {rank_file(rank): _record(*report["file"]) for rank, report in enumerate(written)}
        _check_complete(self.job.plan, written, files)
        values = {name: value for report in written for name, value in report["values"].items()}
        trainer = json.dumps({"state": self.job.trainer, "values": values}).encode()
        for file, content in {**self.job.small_files, TRAINER: trainer}.items():
            files[file] = write_and_check(self.store, self.location, file, [content], self.algorithm, self.verify)
        manifest = Manifest(
            uuid=uuid.uuid4().hex,
            step=self.job.step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=len(reports),
            files=files,
            mesh=self.job.mesh,
            versions=versions(),
            weights_only=self.job.weights_only,
            algorithm=self.algorithm,
        )
        check_claim(self.store)
        self.store.commit(self.location, name, manifest.to_bytes(secret()))
        return manifest.size


def versions() -> dict[str, str]:
    """Of what a checkpoint was made with."""
    return {"lightning_llm": __version__, "lightning": lightning_version(), "torch": torch.__version__}


def digest_algorithm() -> str:
    """Against accidents; with a key for manifests one that also stands against people."""
    return "sha256" if secret() else "xxh3_128"


def _message(act: Callable[[], Any]) -> dict[str, Any]:
    """A result, or an error, as something to tell the other ranks."""
    try:
        return {"result": act()}
    except (CheckpointError, ConfigurationError, OSError) as error:
        return {"error": str(error), "final": isinstance(error, (ConfigurationError, FinalError))}
    except Exception as error:
        log.exception("A checkpoint could not be saved")
        return {"error": f"{type(error).__name__}: {error}", "final": True}


def _result(message: Mapping[str, Any]) -> Any:
    """The result in a message; raises its error."""
    if "error" in message:
        raise (FinalError if message["final"] else CheckpointError)(message["error"])
    return message["result"]


def _record(size: int, digest: str, chunks: list[str]) -> FileRecord:
    return FileRecord(size, digest, tuple(chunks))


def _check_complete(plan: SavePlan, reports: list[Mapping[str, Any]], files: Mapping[str, FileRecord]) -> None:
    """Refuses a draft in which something of the plan is missing."""
    strangers = [rank for rank, report in enumerate(reports) if report["plan"] != plan.uuid]
    if strangers:
        raise CheckpointError(f"ranks {strangers} saved by another plan than rank 0")
    assert plan.index is not None
    needed = [0] * len(reports)
    for entry in plan.index.values():
        for rank, _, shape in entry["blocks"]:
            needed[rank] += size_of(shape, entry["dtype"])
    for rank, size in enumerate(needed):
        file = rank_file(rank)
        if files[file].size < size:
            raise CheckpointError(f"{file} has {files[file].size} bytes, less than the {size} of its tensors")
