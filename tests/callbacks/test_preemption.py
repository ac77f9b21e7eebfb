"""A run that is told to stop: real ranks, real signals, and the exit code as a shell sees it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_llm import TokenDataModule
from lightning_llm.callbacks import AsyncDistributedCheckpoint, Preemption
from lightning_llm.checkpoint.store import open_store
from lightning_llm.checkpoint.verify import verify
from lightning_llm.data.tokenize import tokenize
from lightning_llm.errors import ConfigurationError, PreemptedError
from tests.callbacks.states import state_of
from tests.data.corpora import prose
from tests.distributed import run_distributed, start_ranks
from tests.strategies.training import SMALL, Recorder, make_module, make_trainer

COMMAND = Path(sysconfig.get_path("scripts")) / "lightning-llm"
STOPPED = 75


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose epoch has six steps of 8 sequences of 16 tokens, or a few more."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(2):
        (folder / f"{number}.txt").write_text(prose(number, 1200))
    tokenize([folder], folder / "tokens", vocab_size=512, val_fraction=0.4, num_workers=1, progress=False)
    return folder / "tokens"


# -- within this process --


def test_a_signal_that_cannot_be_caught_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no signal 'SIGFOO'"):
        Preemption(signals=["SIGFOO"])
    with pytest.raises(ConfigurationError, match="SIGKILL cannot be caught"):
        Preemption(signals=["SIGKILL"])
    with pytest.raises(ConfigurationError, match="every_n_steps=0"):
        Preemption(every_n_steps=0)


class Kill(Callback):
    """Signals this process within a step, or within a validation, if it is the one of these ranks."""

    def __init__(self, rank: int, step: int, signum: int, validating: bool = False) -> None:
        self.rank, self.step, self.signum, self.validating = rank, step, signum, validating

    def _now(self, trainer: Trainer, validating: bool) -> None:
        if (trainer.global_rank, trainer.global_step, validating) == (self.rank, self.step, self.validating):
            os.kill(os.getpid(), self.signum)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        self._now(trainer, validating=False)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._now(trainer, validating=True)


def fit(
    pages: Path, folder: Path, world_size: int, strategy: Any, last: int, *others: Callback, **arguments: Any
) -> tuple[list[float], Trainer]:
    ckpt_path = arguments.pop("ckpt_path", None)
    recorder = Recorder()
    saver = AsyncDistributedCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(
        strategy,
        world_size,
        max_steps=last,
        enable_checkpointing=True,
        callbacks=[saver, *others, recorder],
        num_sanity_val_steps=0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        **arguments,
    )
    data = TokenDataModule(pages, batch_size=8, seq_len=16)
    trainer.fit(make_module(SMALL.replace(vocab_size=512)), datamodule=data, ckpt_path=ckpt_path)
    return recorder.losses, trainer


def preempted(pages: Path, folder: Path, world_size: int, strategy: str, kill: Kill, arguments: dict[str, Any]) -> None:
    """A rank of a run that ends early; its exit code is what the test asks for."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        fit(pages, folder, world_size, strategy, 12, Preemption(), kill, **arguments)
    except PreemptedError as end:
        assert end.code == STOPPED and signal.getsignal(signal.SIGTERM) is before
        os._exit(STOPPED)


def resumed(pages: Path, folder: Path, world_size: int, strategy: str, arguments: dict[str, Any]) -> dict[str, Any]:
    again, trainer = fit(pages, folder, world_size, strategy, 12, Preemption(), ckpt_path="last", **arguments)
    state = state_of(trainer)
    undisturbed, trainer = fit(pages, folder / "whole", world_size, strategy, 12, **arguments)
    whole = state_of(trainer)
    equal = state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    return {"resumed": again, "undisturbed": undisturbed, "equal": equal, "steps": trainer.global_step}


@pytest.mark.parametrize(
    ("world_size", "strategy", "kill", "arguments", "stopped"),
    [
        pytest.param(2, "llm3d", Kill(1, 4, signal.SIGUSR1), {}, 5, id="one rank of two"),
        pytest.param(
            *(2, "llm3d", Kill(0, 4, signal.SIGTERM, True), {"accumulate_grad_batches": 2}, 4),
            id="while it validates",
            marks=pytest.mark.slow,
        ),
        pytest.param(1, "auto", Kill(0, 2, signal.SIGTERM), {}, 3, id="one device", marks=pytest.mark.slow),
        pytest.param(2, "ddp", Kill(1, 1, signal.SIGTERM), {}, 2, id="ddp", marks=pytest.mark.slow),
        pytest.param(2, "llm3d_tp2", Kill(1, 7, signal.SIGTERM), {}, 8, id="tp2", marks=pytest.mark.slow),
        pytest.param(2, "llm3d_pp2", Kill(1, 7, signal.SIGTERM), {}, 8, id="pp2", marks=pytest.mark.slow),
        pytest.param(2, "llm3d_deepspeed", Kill(1, 4, signal.SIGTERM), {}, 5, id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_stop_at_one_step_and_the_run_goes_on_as_if_nothing_was(
    tmp_path: Path, pages: Path, world_size: int, strategy: str, kill: Kill, arguments: dict[str, Any], stopped: int
) -> None:
    """The signal reaches one rank within step `kill.step` + 1; a save may be under way in the background."""
    folder = tmp_path / "run"
    ranks = start_ranks(preempted, world_size, pages, folder, world_size, strategy, kill, arguments)
    ended = ranks.end(100)
    errors = "".join(file.read_text() for file in ranks.folder.glob("error-*"))
    assert ended == dict.fromkeys(range(world_size), f"exit code {STOPPED}"), errors
    (saved,) = folder.glob(f"epoch=*-step={stopped}.ckpt")
    assert not verify(open_store(str(folder)), saved.name)
    for rank in run_distributed(resumed, world_size, pages, folder, world_size, strategy, arguments, timeout=100):
        done = stopped * arguments.get("accumulate_grad_batches", 1)
        assert rank["resumed"] == rank["undisturbed"][done:] and rank["equal"] and rank["steps"] == 12


# -- processes of their own --

SCRIPT = """
import os, sys, time
from lightning.pytorch import Callback, Trainer
import lightning_llm
from lightning_llm.callbacks import AsyncDistributedCheckpoint, Preemption

class Tell(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        print(f"rank {trainer.global_rank} pid {os.getpid()} step {trainer.global_step}", flush=True)
        time.sleep(0.05)

class Hold(Callback):  # a save that takes its time: the second signal finds it there
    def on_save_checkpoint(self, trainer, module, checkpoint):
        print("saving", flush=True)
        time.sleep(float(sys.argv[4]))

trainer = Trainer(strategy=sys.argv[1], accelerator="cpu", devices=2, max_steps=100000, logger=False,
                  enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
                  callbacks=[Preemption(debounce=0.2), Tell(), Hold(), AsyncDistributedCheckpoint(sys.argv[3])])
trainer.fit(lightning_llm.LLMModule("tiny", vocab_size=512, schedule="constant"),
            datamodule=lightning_llm.TokenDataModule(sys.argv[2], batch_size=8, seq_len=16))
"""


class Process:
    """A run in processes of its own, which tells ranks and steps on its output."""

    def __init__(self, command: list[Any], folder: Path) -> None:
        self.log = folder / "stderr"
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.output: Iterator[str] = iter(self.process.stdout)

    def pids(self, ranks: int) -> dict[int, int]:
        """Rank -> pid, once all of them train."""
        found: dict[int, int] = {}
        for line in self.output:
            match = re.match(r"rank (\d) pid (\d+) step", line)
            if match:
                found[int(match[1])] = int(match[2])
            if len(found) == ranks:
                return found
        raise AssertionError(f"the run ended before all ranks trained: {self.log.read_text()}")

    def until(self, text: str) -> None:
        """Reads on until it says this."""
        assert any(text in line for line in self.output), self.log.read_text()

    def end(self) -> int:
        """Its exit code, soon."""
        assert self.process.stdout is not None
        self.process.stdout.read()
        return self.process.wait(timeout=60)

    def steps(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def run(command: list[Any]) -> Process:
        started.append(Process(command, tmp_path))
        return started[-1]

    yield run
    for run_ in started:
        if run_.process.poll() is None:
            os.killpg(run_.process.pid, signal.SIGKILL)
            run_.process.wait()


def script(tmp_path: Path, strategy: str, pages: Path, hold: float = 0.0) -> list[Any]:
    path = tmp_path / "run.py"
    path.write_text(SCRIPT)
    return [path, strategy, pages, tmp_path / "run", hold]


@pytest.mark.parametrize(
    ("strategy", "rank", "signum"),
    [
        pytest.param("llm3d", 0, signal.SIGTERM, id="llm3d, to the main process"),
        pytest.param("llm3d", 1, signal.SIGUSR1, id="llm3d, to the other one", marks=pytest.mark.slow),
        pytest.param("ddp", 0, signal.SIGTERM, id="ddp, to the main process", marks=pytest.mark.slow),
        pytest.param("ddp", 1, signal.SIGTERM, id="ddp, to the other one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_shell_gets_75(
    tmp_path: Path, pages: Path, start: Any, strategy: str, rank: int, signum: signal.Signals
) -> None:
    run = start([sys.executable, *script(tmp_path, strategy, pages)])
    os.kill(run.pids(2)[rank], signum)
    assert run.end() == STOPPED, run.log.read_text()
    assert "stopped after step" in run.log.read_text() and "Traceback" not in run.log.read_text()
    assert len(run.steps(tmp_path / "run")) >= 1


@pytest.mark.slow
def test_a_signal_to_all_processes_of_torchrun(tmp_path: Path, pages: Path, start: Any) -> None:
    """As a scheduler does: torchrun passes it on once more. Its own exit code is its own, but the run is saved."""
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    run = start([torchrun, "--standalone", "--nproc-per-node=2", *script(tmp_path, "llm3d", pages)])
    run.pids(2)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.end() not in (0, None)
    (saved,) = run.steps(tmp_path / "run")[-1:]
    assert not verify(open_store(str(tmp_path / "run")), saved)


@pytest.mark.slow
def test_one_worker_of_torchrun_is_told(tmp_path: Path, pages: Path, start: Any) -> None:
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    run = start([torchrun, "--standalone", "--nproc-per-node=2", *script(tmp_path, "llm3d", pages)])
    os.kill(run.pids(2)[1], signal.SIGTERM)
    assert run.end() not in (0, None)
    assert re.search(r"exitcode\s*: 75", run.log.read_text()), run.log.read_text()
    assert run.steps(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["llm3d", "ddp"])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, pages: Path, start: Any, strategy: str) -> None:
    run = start([sys.executable, *script(tmp_path, strategy, pages, hold=30)])
    pids = run.pids(2)
    os.kill(pids[0], signal.SIGTERM)
    run.until("saving")
    time.sleep(0.3)  # what comes sooner counts as the first one
    began = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    assert run.end() == -signal.SIGTERM
    assert time.monotonic() - began < 10
    assert not run.steps(tmp_path / "run")


@pytest.mark.slow
def test_the_command_ends_with_75(tmp_path: Path, pages: Path, start: Any) -> None:
    run = start(
        [
            *(COMMAND, "fit", "--model.model=tiny", "--model.vocab_size=512", "--model.schedule=constant"),
            *(f"--data.path={pages}", "--data.seq_len=16", "--trainer.accelerator=cpu", "--trainer.devices=1"),
            *("--trainer.max_steps=1000000", "--trainer.logger=false", "--trainer.limit_val_batches=0"),
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=lightning_llm.callbacks.StepProgressBar",
            "--trainer.callbacks+=lightning_llm.callbacks.Preemption",
        ]
    )
    run.until("step ")
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.end() == STOPPED, run.log.read_text()
    assert "lightning-llm: SIGUSR1: stopped after step" in run.log.read_text()
    assert list(tmp_path.rglob("*.ckpt"))
