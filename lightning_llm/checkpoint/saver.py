"""From a run's state in memory to a committed checkpoint, at once or in the background.

    main thread      plan (kept) -> snapshot of this rank's file
    then, anywhere   draft -> every rank writes its file and reports -> rank 0 checks that all is there, and commits

The second half is a thread's and a process's work in the background; what overlap.py tells of comes before it. An error
anywhere discards the draft on all ranks, and as many more attempts are made as allowed, from the same snapshot.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_llm._torch import own_store
from lightning_llm.checkpoint.committing import (
    INDEX,
    TRAINER_TENSORS,
    FileWriter,
    FinalError,
    SaveJob,
    commit_together,
)
from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.encoding import encode
from lightning_llm.checkpoint.overlap import OverlappedCopy, stepped_tensors
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.planning import SavePlan, form_of, local_box, make_plan
from lightning_llm.checkpoint.rendezvous import Rendezvous
from lightning_llm.checkpoint.staging import StagingBuffer, stream
from lightning_llm.checkpoint.store import CheckpointStore
from lightning_llm.checkpoint.worker import Verify, Worker, write_and_check
from lightning_llm.errors import CheckpointError, ConfigurationError

log = logging.getLogger(__name__)


@dataclass
class RunState:
    """What a checkpoint holds, as one rank sees it.

    Attributes:
        step: Optimizer steps until now.
        tensors: Weights and optimizer states by global name; a DTensor, or Pieces, is this rank's part of one.
        values: Plain values by global name that only some ranks have, such as a stage's learning rates.
        trainer: Plain state that is the same on all ranks: loops, schedulers, callbacks, hyperparameters.
        rank: Plain state of this rank alone, such as its random generators'.
        mesh: Sizes of the parallel axes.
        weights_only: Whether there are no optimizers in it.
        write_assets: Called with a folder, writes what makes the weights usable on their own.
    """

    step: int
    tensors: Mapping[str, Tensor | Pieces]
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
        blocked: Seconds that training stood still in `save`.
        written: Seconds from then to the commit, verification included.
        waited: Seconds that an optimizer's step waited for the rest of the snapshot.
    """

    path: str
    step: int
    error: str | None
    attempts: int
    size: int
    blocked: float
    written: float
    waited: float = 0.0


def check_numbers(retries: int, backoff: float, timeout: float) -> None:
    """Refuses settings of a `CheckpointSaver` that are out of range.

    Raises:
        ConfigurationError: One is; it is named.
    """
    for name, number, least in (("retries", retries, 0), ("backoff", backoff, 0), ("timeout", timeout, 0.1)):
        if number < least:
            raise ConfigurationError(f"{name}={number} must be at least {least}.")


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

    Raises:
        ConfigurationError: A number is out of its range.
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
        check_numbers(retries, backoff, timeout)
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
        self._talks: list[Rendezvous] = []
        self._form: int | None = None
        self._plan: SavePlan | None = None
        self._index = b""
        self._assets: dict[str, bytes] | None = None
        self._buffer = StagingBuffer() if background else None
        self._worker = Worker(self._buffer.descriptor, timeout) if self._buffer is not None else None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._copy: OverlappedCopy | None = None

    # -- what training calls --

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def worker_pid(self) -> int | None:
        """Process that writes in the background, once there is one."""
        return self._worker.pid if self._worker is not None else None

    def save(self, state: RunState, path: str | Path, optimizers: Iterable[Optimizer] = ()) -> Outcome | None:
        """Saves a checkpoint. Collective.

        Args:
            state: Of this rank; in the background it may change as soon as this returns.
            path: The checkpoint's folder or URL.
            optimizers: Whose parameters and states may not: in the background they are copied after this has returned,
                and the next step of one of these optimizers waits for that. So must whoever else changes them, by
                `wait_for_snapshot`; otherwise the save fails.

        Returns:
            What became of it; None in the background, see `wait` and `finished`.

        Raises:
            CheckpointError: It could not be saved; not raised in the background. `finished` tells it too.
            ConfigurationError: There is something in the state that no checkpoint can hold.
        """
        self.wait()
        started = time.monotonic()
        if self._buffer is None:
            return self._save_now(state, str(path), started)
        # Started before all ranks agree on the plan: after it, cores may be busy with copies of ranks that were faster.
        jobs: SimpleQueue[tuple[SaveJob, float] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run_next, args=(jobs,), name="checkpoint-saver", daemon=True)
        self._thread.start()
        try:
            job = self._snapshot(state, str(path), tuple(optimizers))
        except BaseException:
            jobs.put(None)
            raise
        jobs.put((job, time.monotonic() - started))
        return None

    def _save_now(self, state: RunState, path: str, started: float) -> Outcome:
        job = self._snapshot(state, path, ())
        self._run(job, time.monotonic() - started)
        outcome = self._outcome
        assert outcome is not None
        if outcome.error is not None:
            raise CheckpointError(f"The checkpoint {outcome.path} could not be saved: {outcome.error}")
        return outcome

    def wait_for_snapshot(self) -> None:
        """Returns when all of the last save's state may be changed."""
        if self._copy is not None:
            self._copy.wait()

    def wait(self, limit: float | None = None) -> None:
        """Returns when nothing is being written, or after `limit` seconds."""
        if self._thread is not None:
            self._thread.join(limit)
        if self._copy is not None and not self.busy:
            self._copy.release()

    def finished(self) -> Outcome | None:
        """What became of the last save, once; None while it is being written, or if it was told already."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        waited = self._copy.waited if self._copy is not None else 0.0
        return replace(outcome, waited=waited) if outcome is not None else None

    def close(self) -> None:
        """Waits, then ends the background process and gives its memory back."""
        self.wait()
        if self._worker is not None and self._buffer is not None:
            self._worker.stop()
            self._buffer.close()
            self._worker = self._buffer = None

    # -- the snapshot --

    @torch.no_grad()  # without which each look at a DTensor's part is a step of autograd
    def _snapshot(self, state: RunState, path: str, optimizers: tuple[Optimizer, ...]) -> SaveJob:
        plan = self._plan_for(state)
        self._number += 1
        for talk in self._talks:  # all ranks have ended theirs, since all have come here
            talk.forget()
        self._talks.clear()
        tensors = {block.key: local_box(state.tensors[block.tensor], block.offsets) for block in plan.blocks}
        metadata = {"rank": json.dumps(encode(state.rank, tensors, "rank"))}
        in_values: dict[str, Tensor] = {}
        values = {name: encode(state.values[name], in_values, name) for name in plan.values}
        if in_values:
            raise ConfigurationError(f"The optimizer has tensors among its settings: {next(iter(in_values))}.")
        trainer: Any = None
        files: dict[str, bytes] = {}
        if self.rank == 0:
            of_trainer: dict[str, Tensor] = {}
            trainer = encode(state.trainer, of_trainer, "trainer")
            files = {**self._read_assets(state), INDEX: self._index}
            if of_trainer:
                files[TRAINER_TENSORS] = b"".join(stream(of_trainer, {}))
        return SaveJob(
            path=path,
            step=state.step,
            plan=plan,
            write=self._file_writer(tensors, metadata, self._owners(state, plan, optimizers), optimizers),
            values=values,
            trainer=trainer,
            small_files=files,
            mesh=dict(state.mesh),
            weights_only=state.weights_only,
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

    def _owners(self, state: RunState, plan: SavePlan, optimizers: tuple[Optimizer, ...]) -> dict[str, Tensor]:
        """What of this rank's file is copied later, by key: the optimizers' own objects."""
        owners = stepped_tensors(state.tensors, optimizers) if self._buffer is not None else {}
        return {block.key: owners[block.tensor] for block in plan.blocks if block.tensor in owners}

    def _file_writer(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        owners: Mapping[str, Tensor],
        optimizers: tuple[Optimizer, ...],
    ) -> FileWriter:
        verify = self._verify
        if self._buffer is None or self._worker is None:
            return lambda store, location, file, algorithm: write_and_check(
                store, location, file, stream(tensors, metadata), algorithm, verify
            )
        places = self._buffer.stage(tensors, metadata, left_out=owners)
        copy = self._copy = OverlappedCopy(places, tensors, owners, optimizers) if places else None
        worker, size = self._worker, self._buffer.size

        def write(store: CheckpointStore, location: str, file: str, algorithm: str) -> FileRecord:
            if copy is not None:
                copy.check()
            return worker.write(store, location, file, size, algorithm, verify)

        return write

    def _read_assets(self, state: RunState) -> dict[str, bytes]:
        """What makes the weights usable; it does not change while a run goes on."""
        if self._assets is None:
            self._assets = {}
            if state.write_assets is not None:
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    state.write_assets(folder)
                    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                    self._assets = {str(path.relative_to(folder)): path.read_bytes() for path in found}
        return self._assets

    # -- the rest, on any thread --

    def _run_next(self, jobs: SimpleQueue[tuple[SaveJob, float] | None]) -> None:
        order = jobs.get()
        if order is not None:
            self._run(*order)

    def _run(self, job: SaveJob, blocked: float) -> None:
        began = time.monotonic()
        if self._copy is not None:
            self._copy.run()
        error: str | None = "no attempt was made"
        size = attempt = 0
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            topic = f"lightning_llm/checkpoint/{job.plan.uuid}/{self._number}/{attempt}"
            talk = Rendezvous(topic, self.rank, self.world_size, self._timeout, self._store)
            self._talks.append(talk)
            try:
                size = commit_together(job, talk, self._verify)
                error = None
                break
            except (CheckpointError, OSError) as caught:
                error = str(caught)
                log.warning("Attempt %d to save %s failed: %s", attempt + 1, job.path, error)
                if isinstance(caught, FinalError):
                    break
            except Exception as caught:  # it must not vanish with the thread
                error = f"{type(caught).__name__}: {caught}"
                log.exception("Saving %s failed", job.path)
                break
        written = time.monotonic() - began
        self._outcome = Outcome(job.path, job.step, error, attempt + 1, size, blocked, written)
