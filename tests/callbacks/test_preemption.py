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

from lightning_llm import LLM3DStrategy, TokenDataModule
from lightning_llm.callbacks import AsyncDistributedCheckpoint, Preemption
from lightning_llm.callbacks.agreement import Reading
from lightning_llm.checkpoint.store import open_store
from lightning_llm.checkpoint.verify import verify
from lightning_llm.data.tokenize import tokenize
from lightning_llm.errors import ConfigurationError, PreemptedError
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
    weights = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    undisturbed, trainer = fit(pages, folder / "whole", world_size, strategy, 12, **arguments)
    same = trainer.strategy.lightning_module_state_dict()
    equal = all(torch.equal(_local(weights[name]), _local(same[name])) for name in same)
    return {"resumed": again, "undisturbed": undisturbed, "equal": equal, "steps": trainer.global_step}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(
    ("world_size", "strategy", "kill", "arguments", "stopped"),
    [
        pytest.param(2, "llm3d", Kill(1, 4, signal.SIGUSR1), {}, 5, id="one rank of two"),
        pytest.param(
            2, "llm3d", Kill(0, 4, signal.SIGTERM, True), {"accumulate_grad_batches": 2}, 4, id="while it validates"
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
