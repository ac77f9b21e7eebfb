"""Jobs of `lightning-llm launch`: a run file with a fault in it, the launcher as a process, and what came of it."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

COMMAND = Path(sys.executable).with_name("lightning-llm")
ROOT = Path(__file__).parents[2]
STEPS = 12


@dataclass
class Job:
    """A folder with a run file in it, and everything that running it leaves there."""

    folder: Path
    data: Path
    ranks: int = 2
    options: list[str] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)
    fault: dict[str, Any] = field(default_factory=dict)
    heartbeat: dict[str, Any] = field(default_factory=dict)
    saving: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    max_steps: int = STEPS
    save_every: int = 4
    port: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_file.write_text(yaml.safe_dump(self._run()))

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"

    def _run(self) -> dict[str, Any]:
        callbacks = [
            ("lightning_llm.callbacks.Heartbeat", {"every": 0.2, "alive_timeout": 2.0, **self.heartbeat}),
            ("tests.launch.faults.Fault", {"events": str(self.folder / "events"), **self.fault}),
            (
                "lightning_llm.callbacks.AsyncDistributedCheckpoint",
                {
                    "dirpath": str(self.folder / "checkpoints"),
                    "every_n_train_steps": self.save_every,
                    "save_top_k": 2,
                    "monitor": "step",
                    "mode": "max",
                    **self.saving,
                },
            ),
        ]
        return {
            "seed_everything": 0,
            "model": {"model": "tiny", "learning_rate": 1e-3, "warmup_steps": 2},
            "data": {"path": str(self.data), "batch_size": 8, "seq_len": 32},
            "trainer": {
                "accelerator": "cpu",
                "devices": self.ranks,
                "strategy": {"class_path": "lightning_llm.LLM3DStrategy", "init_args": self.sizes},
                "max_steps": self.max_steps,
                "val_check_interval": 6,
                "limit_val_batches": 1,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(self.folder),
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(self.folder), "name": "logs", "flush_logs_every_n_steps": 1},
                },
                "callbacks": [{"class_path": path, "init_args": arguments} for path, arguments in callbacks],
            },
        }

    @contextmanager
    def started(self, *options: str, name: str = "launcher") -> Iterator[subprocess.Popen[bytes]]:
        """The launcher, ended at the end if it has not ended of itself."""
        command = [COMMAND, "launch", f"--nproc-per-node={self.ranks}", *self.options, *options, "--", "fit"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*map(str, command), "-c", str(self.run_file)],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    def run(self, *options: str, timeout: float = 120.0) -> int:
        with self.started(*options) as process:
            return process.wait(timeout)

    def log(self, name: str = "launcher") -> Path:
        return self.folder / f"{name}.log"

    @property
    def listening(self) -> bool:
        """Whether the launchers' store is there."""
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", self.port)) == 0

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def events(self, what: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if what in (None, (event := json.loads(line))["what"])]

    def committed(self) -> dict[Path, int]:
        """All files of checkpoints, each with when it was written; drafts are left out."""
        found = (path for path in self.folder.glob("checkpoints/*/*") if not path.parent.name.startswith("."))
        return {path: path.stat().st_mtime_ns for path in found}

    def curve(self) -> dict[int, float]:
        """Training loss by step; a step that was done again counts as it was done last."""
        losses: dict[int, float] = {}
        for path in sorted(self.folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
            with path.open() as file:
                losses |= {
                    int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]
                }
        return losses


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
