"""From a run's state in memory to a committed checkpoint, at once or in the background.

    main thread      plan (kept) -> snapshot of this rank's file
    then, anywhere   draft -> every rank writes its file and reports -> rank 0 checks that all is there, and commits

The second half is a thread's and a process's work in the background. An error anywhere discards the draft on all ranks,
and as many more attempts are made as allowed, from the same snapshot.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_llm._torch import own_store
from lightning_llm._version import __version__
from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.encoding import encode
from lightning_llm.checkpoint.manifest import Manifest, secret
from lightning_llm.checkpoint.planning import SavePlan, form_of, local_part, make_plan, rank_file, size_of
from lightning_llm.checkpoint.rendezvous import Rendezvous
from lightning_llm.checkpoint.staging import StagingBuffer, stream
from lightning_llm.checkpoint.store import CheckpointStore, open_store, split_url
from lightning_llm.checkpoint.worker import Verify, Worker, write_and_check
from lightning_llm.errors import CheckpointError, ConfigurationError

INDEX = "index.json"
TRAINER = "trainer.json"
TRAINER_TENSORS = "trainer.safetensors"

LATENESS = 30.0  # seconds that ranks may be apart, on top of the time that one has to write its file

log = logging.getLogger(__name__)


@dataclass
class RunState:
    """What a checkpoint holds, as one rank sees it.

    Attributes:
        step: Optimizer steps until now.
        tensors: Weights and optimizer states by global name; a DTensor is this rank's part of one.
        values: Plain values by global name that only some ranks have, such as a stage's learning rates.
        trainer: Plain state that is the same on all ranks: loops, schedulers, callbacks, hyperparameters.
        rank: Plain state of this rank alone, such as its random generators'.
        mesh: Sizes of the parallel axes.
        weights_only: Whether there are no optimizers in it.
        write_assets: Called with a folder, writes what makes the weights usable on their own.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    rank: Mapping[str, Any] = field(default_factory=dict)
    mesh: Mapping[str, int] = field(default_factory=dict)
    weights_only: bool = False
    write_assets: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a save.

    Attributes:
        path: Folder or URL of the checkpoint.
        step: Of its state.
        error: Why there is none; None if it is committed.
        attempts: That were made.
        size: Bytes of all files.
        blocked: Seconds that training stood still.
        written: Seconds from then to the commit, verification included.
    """

    path: str
    step: int
    error: str | None
    attempts: int
    size: int
    blocked: float
    written: float


class FileWriter(Protocol):
    """Writes this rank's file into a draft, as often as it is asked to."""

    def __call__(self, store: CheckpointStore, location: str, file: str) -> FileRecord:
        """See `write_and_check`."""
        ...


@dataclass
class _Job:
    """A save after its snapshot."""

    state_step: int
    path: str
    plan: SavePlan
    number: int
    write: FileWriter
    values: Any
    small_files: dict[str, bytes]
    manifest: Callable[[Mapping[str, FileRecord]], Manifest]
    blocked: float
    started: float


class CheckpointSaver:
    """Saves checkpoints, one at a time. Every rank has one and calls it as the others do.

    Args:
        device: That collectives take tensors of.
        alone: This process has all of the state and saves it by itself, whatever other processes there are.
        background: `save` returns after the snapshot; else after the commit.
        verify: What is read back before the commit: "full", "sample" or "none".
        retries: Attempts after the first one.
        backoff: Seconds before the second attempt; doubled for each further one.
        timeout: Seconds for writing one file, and for waiting for the other ranks.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        alone: bool = False,
        background: bool = False,
        verify: Verify = "sample",
        retries: int = 0,
        backoff: float = 1.0,
        timeout: float = 1800.0,
    ) -> None:
        several = dist.is_available() and dist.is_initialized() and not alone
        self.rank = dist.get_rank() if several else 0
        self.world_size = dist.get_world_size() if several else 1
        self._device = torch.device(device)
        self._verify: Verify = verify
        self._retries = retries
        self._backoff = backoff
        self._timeout = timeout
        self._store: dist.Store | None = own_store() if self.world_size > 1 else None
        self._number = 0
        self._form: int | None = None
        self._plan: SavePlan | None = None
        self._index = b""
        self._assets: dict[str, bytes] | None = None
        self._buffer = StagingBuffer() if background else None
        self._worker = Worker(self._buffer.descriptor, timeout) if self._buffer is not None else None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    # -- what training calls --

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def worker_pid(self) -> int | None:
        """Process that writes in the background, once there is one."""
        return self._worker.pid if self._worker is not None else None

    def save(self, state: RunState, path: str | Path) -> Outcome | None:
        """Saves a checkpoint. Collective.

        Args:
            state: Of this rank; in the background it may change as soon as this returns.
            path: The checkpoint's folder or URL.

        Returns:
            What became of it; None in the background, see `wait` and `finished`.

        Raises:
            CheckpointError: It could not be saved; not raised in the background.
            ConfigurationError: There is something in the state that no checkpoint can hold.
        """
        self.wait()
        started = time.monotonic()
        job = self._snapshot(state, str(path), started)
        if self._buffer is not None:
            job.blocked = time.monotonic() - started
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-saver", daemon=True)
            self._thread.start()
            return None
        self._run(job)
        outcome = self.finished()
        assert outcome is not None
        if outcome.error is not None:
            raise CheckpointError(f"The checkpoint {outcome.path} could not be saved: {outcome.error}")
        return outcome

    def wait(self, limit: float | None = None) -> None:
        """Returns when nothing is being written, or after `limit` seconds."""
        if self._thread is not None:
            self._thread.join(limit)

    def finished(self) -> Outcome | None:
        """What became of the last save, once; None while it is being written, or if it was told already."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """Waits, then ends the background process and gives its memory back."""
        self.wait()
        if self._worker is not None and self._buffer is not None:
            self._worker.stop()
            self._buffer.close()
            self._worker = self._buffer = None

    # -- the snapshot --

    def _snapshot(self, state: RunState, path: str, started: float) -> _Job:
        plan = self._plan_for(state)
        tensors = {block.key: local_part(state.tensors[block.tensor]) for block in plan.blocks}
        metadata = {"rank": json.dumps(encode(state.rank, tensors, "rank"))}
        values: dict[str, Tensor] = {}
        encoded = {name: encode(state.values[name], values, name) for name in plan.values}
        if values:
            raise ConfigurationError(f"The optimizer has tensors among its settings, for example {next(iter(values))}.")
        self._number += 1
        return _Job(
            state_step=state.step,
            path=path,
            plan=plan,
            number=self._number,
            write=self._file_writer(tensors, metadata),
            values=encoded,
            small_files=self._small_files(state) if self.rank == 0 else {},
            manifest=self._manifest_for(state),
            blocked=0.0,
            started=started,
        )

    def _plan_for(self, state: RunState) -> SavePlan:
        form = form_of(state.tensors, state.values)
        changed = torch.tensor(form != self._form, dtype=torch.int32, device=self._device)
        if self.world_size > 1:
            dist.all_reduce(changed, dist.ReduceOp.MAX)
        if changed or self._plan is None:
            self._plan = make_plan(state.tensors, state.values, alone=self.world_size == 1)
            self._form = form
            if self._plan.index is not None:
                self._index = json.dumps(self._plan.index, separators=(",", ":")).encode()
        return self._plan

    def _file_writer(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileWriter:
        algorithm, verify = digest_algorithm(), self._verify
        if self._buffer is None or self._worker is None:
            return lambda store, location, file: write_and_check(
                store, location, file, stream(tensors, metadata), algorithm, verify
            )
        self._buffer.stage(tensors, metadata)
        worker, size = self._worker, self._buffer.size
        return lambda store, location, file: worker.write(store, location, file, size, algorithm, verify)

    def _small_files(self, state: RunState) -> dict[str, bytes]:
        """What rank 0 writes beside the ranks' files."""
        tensors: dict[str, Tensor] = {}
        trainer = encode(state.trainer, tensors, "trainer")
        if self._assets is None:
            self._assets = _assets(state.write_assets)
        files = {**self._assets, INDEX: self._index, TRAINER: json.dumps(trainer).encode()}
        if tensors:
            files[TRAINER_TENSORS] = b"".join(stream(tensors, {}))
        return files

    def _manifest_for(self, state: RunState) -> Callable[[Mapping[str, FileRecord]], Manifest]:
        step, mesh, weights_only, world_size = state.step, dict(state.mesh), state.weights_only, self.world_size
        return lambda files: Manifest(
            uuid=uuid.uuid4().hex,
            step=step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=world_size,
            files=files,
            mesh=mesh,
            versions=versions(),
            weights_only=weights_only,
            algorithm=digest_algorithm(),
        )

    # -- the rest, on any thread --

    def _run(self, job: _Job) -> None:
        error: str | None = None
        size = attempt = 0
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                size = self._attempt(job, attempt)
                error = None
                break
            except (CheckpointError, OSError) as caught:
                error = str(caught)
                log.warning("Attempt %d to save %s failed: %s", attempt + 1, job.path, error)
            except Exception as caught:  # of the thread's own making: told, not swallowed with the thread
                error = f"{type(caught).__name__}: {caught}"
                log.exception("Saving %s failed", job.path)
                break
        written = time.monotonic() - job.started - job.blocked
        self._outcome = Outcome(job.path, job.state_step, error, attempt + 1, size, job.blocked, written)

    def _attempt(self, job: _Job, attempt: int) -> int:
        """From draft to commit; returns the checkpoint's bytes."""
        topic = f"lightning_llm/checkpoint/{job.plan.uuid}/{job.number}/{attempt}"
        talk = Rendezvous(topic, self.rank, self.world_size, self._timeout + LATENESS, self._store)
        url, name = split_url(job.path)
        store = open_store(url)
        begun = _told(lambda: store.create(name, uuid.uuid4().hex[:12])) if self.rank == 0 else None
        location = _checked(talk.announce("draft", begun))
        report = _told(lambda: self._write(job, store, location))
        if self.rank != 0:
            talk.report("written", report)
            return _checked(talk.announce("outcome"))
        outcome = _told(lambda: self._commit(job, store, location, name, talk.report("written", report)))
        if "error" in outcome:
            store.discard(location)
        return _checked(talk.announce("outcome", outcome))

    def _write(self, job: _Job, store: CheckpointStore, location: str) -> dict[str, Any]:
        file = rank_file(self.rank)
        try:
            record = job.write(store, location, file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"rank {self.rank} could not write {file}: {error}") from error
        return {"plan": job.plan.uuid, "values": job.values, "file": [record.size, record.digest, record.chunks]}

    def _commit(
        self, job: _Job, store: CheckpointStore, location: str, name: str, reports: list[dict[str, Any]]
    ) -> int:
        """Rank 0's end of a save."""
        written = [_checked(report) for report in reports]
        files = {rank_file(rank): FileRecord(*_record(report["file"])) for rank, report in enumerate(written)}
        _check_complete(job.plan, written, files)
        values = {name: value for report in written for name, value in report["values"].items()}
        small = dict(job.small_files)
        small[TRAINER] = json.dumps({"state": json.loads(small[TRAINER]), "values": values}).encode()
        for file, content in small.items():
            files[file] = write_and_check(store, location, file, [content], digest_algorithm(), self._verify)
        manifest = job.manifest(files)
        store.commit(location, name, manifest.to_bytes(secret()))
        return manifest.size


def versions() -> dict[str, str]:
    """Of what a checkpoint was made with."""
    return {
        "lightning_llm": __version__,
        "lightning": lightning.__version__,
        "torch": torch.__version__,
    }


def digest_algorithm() -> str:
    """Against accidents; with a key for manifests one that also stands against people."""
    return "sha256" if secret() else "xxh3_128"


def _assets(write_assets: Callable[[Path], None] | None) -> dict[str, bytes]:
    if write_assets is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def _told(act: Callable[[], Any]) -> dict[str, Any]:
    """A result or an error as a message to other ranks."""
    try:
        return {"result": act()}
    except (CheckpointError, ConfigurationError, OSError) as error:
        return {"error": str(error)}
    except Exception as error:
        log.exception("A checkpoint could not be saved")
        return {"error": f"{type(error).__name__}: {error}"}


def _checked(message: Mapping[str, Any]) -> Any:
    """The result in a message; raises its error."""
    if "error" in message:
        raise CheckpointError(message["error"])
    return message["result"]


def _record(stored: list[Any]) -> tuple[int, str, tuple[str, ...]]:
    size, digest, chunks = stored
    return size, digest, tuple(chunks)


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
