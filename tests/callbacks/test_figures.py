"""What the monitor is told of a run: no more than it can show, seldom, and without waiting for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_llm.callbacks._lightning import metrics_of_last_batch
from lightning_llm.callbacks.figures import LOGGED, Figures
from lightning_llm.resilience.status import FIGURES
from tests.callbacks.tiny import Bigram, batches, trainer


class Reads(Callback):
    """Asks at the end of each batch."""

    def __init__(self, every: float) -> None:
        self.figures = Figures(every)
        self.found: list[dict[str, float]] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.found.append(self.figures.read(trainer))
        self.logged.append(outputs["loss"].detach())


def run(folder: Path, every: float, steps: int = 8, **arguments: Any) -> Reads:
    reads = Reads(every)
    trainer(folder, max_steps=steps, callbacks=[reads], **arguments).fit(Bigram(), batches(steps))
    return reads


def test_the_monitor_shows_all_that_is_read() -> None:
    assert set(LOGGED.values()) == set(FIGURES)


def test_a_step_tells_the_loss_of_the_step_before(tmp_path: Path) -> None:
    reads = run(tmp_path, every=0.0)
    assert reads.found[0] == {}
    told = [found["train_loss"] for found in reads.found[1:]]
    assert told == [float(loss) for loss in reads.logged[:-1]]


def test_it_is_read_seldom(tmp_path: Path) -> None:
    assert [found for found in run(tmp_path, every=60.0).found if found] == []


def test_what_lightning_keeps_of_the_last_batch_is_what_it_was_given(tmp_path: Path) -> None:
    """The contract: the attribute is there, and holds tensors by the names that were logged."""

    class Contract(Callback):
        kept: list[Any] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.kept.append(dict(metrics_of_last_batch(trainer)))

    contract, reads = Contract(), Reads(every=0.0)
    trainer(tmp_path, max_steps=3, callbacks=[contract, reads]).fit(Bigram(), batches(3))
    assert [sorted(kept) for kept in contract.kept] == [[], ["train_loss"], ["train_loss"]]
    assert torch.equal(contract.kept[2]["train_loss"], reads.logged[1])


@pytest.mark.gpu
def test_the_host_waits_for_no_device(tmp_path: Path) -> None:
    class Strict(Reads):
        def on_train_batch_end(self, *arguments: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().on_train_batch_end(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    reads = Strict(every=0.0)
    trainer(tmp_path, accelerator="gpu", max_steps=30, callbacks=[reads]).fit(Bigram(), batches(30))
    told = {found["train_loss"] for found in reads.found if found}
    losses = [float(loss) for loss in reads.logged]
    assert len(told) > 3 and all(any(value == pytest.approx(loss) for loss in losses) for value in told)
