"""Tells a process beside the training whether it lives and gets on; resilience/ has that process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_llm._torch import recorded_collectives
from lightning_llm.callbacks.figures import Figures
from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience import collectives, stacks
from lightning_llm.resilience.beats import Phase, Sender, sender_of_process
from lightning_llm.resilience.environment import MONITOR_VARIABLE
from lightning_llm.resilience.limits import Limits
from lightning_llm.resilience.monitor import Settings
from lightning_llm.resilience.terms import Terms
from lightning_llm.resilience.watch import ALIVE_TIMEOUT


class Heartbeat(Callback):
    """Finds ranks that hang, are suspended, or die, and says which, why, and where each stands.

    A process on every node, outside the training, hears two kinds of beats: that a rank lives (from a thread, each
    second) and that it gets on (from the training: step and phase). Liveness is not progress: a collective that a rank
    has not come to stops the second alone. Phases have limits of their own, so that a slow checkpoint or a first step
    that compiles is no hang. What is found goes to stderr and to `verdicts.jsonl`, with the Python stacks of all ranks
    of the node; the ranks that do not stand where the others do are named. Costs a datagram a step.

    Args:
        progress_timeout: Seconds without progress in training or validation; "auto": five times the 99th percentile of
            what was seen, 60 at least.
        alive_timeout: Seconds without any sign, after which a process is held to be suspended or its interpreter held.
        on_hang: "report"; "kill" ends the ranks that are to blame too, so that the run ends instead of waiting for its
            collectives' timeout; "auto" does where `lightning-llm launch` starts them again, and else reports.
        dirpath: For verdicts and stacks; a folder `heartbeat` in the Trainer's `default_root_dir` by default.
        port: Of this node's `/healthz` (503 while something is wrong) and `/metrics` (Prometheus); None for none. With
            the beats of the node's first rank, once a second at most, go loss, speed, the newest checkpoint and the
            slowest rank; the host waits for no device for them.
        every: Seconds between signs of life.

    Raises:
        ConfigurationError: A number out of range, or a choice that there is not.
    """

    def __init__(
        self,
        progress_timeout: float | Literal["auto"] = "auto",
        alive_timeout: float = ALIVE_TIMEOUT,
        on_hang: Literal["auto", "report", "kill"] = "auto",
        dirpath: str | Path | None = None,
        port: int | None = None,
        every: float = 1.0,
    ) -> None:
        Limits(progress_timeout)  # refuses what is no limit
        if on_hang not in ("auto", "report", "kill"):
            raise ConfigurationError(f"on_hang={on_hang!r} must be 'report', 'kill' or 'auto'.")
        if not 0 < every < alive_timeout / 2:
            raise ConfigurationError(
                f"every={every} must be above 0 and below half of alive_timeout={alive_timeout}: a single late beat is "
                "no alarm."
            )
        self._settings: dict[str, Any] = {
            "progress_timeout": progress_timeout,
            "alive_timeout": alive_timeout,
            "port": port,
        }
        self._on_hang = on_hang
        self._dirpath = dirpath
        self._every = every
        self._sender: Sender | None = None
        self._monitor: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._stacks: IO[str] | None = None
        self._figures: Figures | None = None

    @property
    def monitor_pid(self) -> int | None:
        """Of the process that this rank has started; one rank a node does."""
        return self._monitor.pid if self._monitor is not None else None

    # -- from the first hook to the last --

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._sender is not None:
            return
        launched = os.environ.get(MONITOR_VARIABLE)
        on_hang = ("kill" if launched else "report") if self._on_hang == "auto" else self._on_hang
        reports = Path(self._dirpath or Path(trainer.default_root_dir) / "heartbeat").absolute()
        if trainer.local_rank == 0:
            reports.mkdir(parents=True, exist_ok=True)
            self._figures = Figures()
        wishes = {**self._settings, "on_hang": on_hang, "reports": str(reports)}
        if launched is not None:
            folder = Path(launched)
        else:
            name = trainer.strategy.broadcast(f"heartbeat-{os.getpid()}-{os.urandom(4).hex()}")
            # The same on all nodes; sockets need short paths.
            folder = self._folder = Path(tempfile.gettempdir()) / name
            folder.mkdir(mode=0o700, exist_ok=True)
            if trainer.local_rank == 0:
                self._monitor = _start_monitor(folder, max(1, trainer.num_devices), wishes)
        self._stacks = stacks.register(folder, trainer.global_rank)
        self._sender = sender_of_process(folder, trainer.global_rank, self._every)
        self._sender.on_asked = [lambda: collectives.write(folder, trainer.global_rank, recorded_collectives())]
        if launched is not None and trainer.local_rank == 0:
            self._sender.agree(Terms(**wishes))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._sender is None:
            return
        self._sender.end()
        self._sender = None
        if self._stacks is not None:
            stacks.unregister(self._stacks)
            self._stacks = None
        if self._monitor is not None and self._folder is not None:
            try:
                self._monitor.wait(5.0)  # it ends when the last rank of the node has
            except subprocess.TimeoutExpired:
                self._monitor.kill()
                self._monitor.wait()
            self._monitor = None
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- progress --

    def _tell(self, trainer: Trainer, phase: Phase) -> None:
        if self._sender is not None:
            figures = self._figures.read(trainer) if self._figures is not None else None
            self._sender.progress(phase, trainer.global_step, figures)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, "first step")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tell(trainer, "train")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._tell(trainer, "checkpoint")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer, "shutdown")

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._tell(trainer, "validate")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.sanity_checking:
            self._tell(trainer, "train" if trainer.global_step else "first step")


def _start_monitor(folder: Path, ranks: int, wishes: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    settings = Settings(folder=str(folder), ranks=ranks, parent=os.getpid(), **wishes)
    command = [sys.executable, "-m", "lightning_llm.resilience.monitor", json.dumps(asdict(settings))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
