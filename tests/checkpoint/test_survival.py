"""Runs that are killed anywhere, again and again, come to the same end as one that is not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_llm import LLM3DStrategy
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.folder import FolderStore
from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.checkpoint.verify import verify
from tests.checkpoint.damage import flip_bit
from tests.distributed import run_distributed, start_ranks
from tests.strategies.training import loader, make_module, make_trainer

INTERVAL = 5
WORLD_SIZE = 2


class Diary(Callback):
    """Writes down each step as it happens, so that nothing is forgotten when the process is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._note(trainer, f"start {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._note(trainer, f"step {trainer.global_step} {float(trainer.callback_metrics['train_loss']).hex()}")

    def _note(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(line + "\n")


def train(folder: Path, steps: int) -> None:
    """Goes on from where the run is, one batch an epoch."""
    strategy = LLM3DStrategy(tensor_parallel_size=WORLD_SIZE)
    checkpoints = AsyncDistributedCheckpoint(
        folder / "checkpoints", every_n_train_steps=INTERVAL, save_top_k=2, monitor="step", mode="max", timeout=30
    )
    trainer = make_trainer(
        strategy,
        WORLD_SIZE,
        callbacks=[Diary(folder / "diary"), checkpoints],
        enable_checkpointing=True,
        max_steps=steps,
        limit_val_batches=0,
    )
    trainer.fit(make_module(schedule="constant"), loader(trainer, strategy, rows=8), ckpt_path="last")


def committed(folder: Path) -> int:
    """The newest step that verifies; 0 if there is no checkpoint."""
    store = FolderStore(folder)
    good = [name for name in store.names() if not verify(store, name)]
    return max((Manifest.from_bytes(store.manifest(name)).step for name in good), default=0)


def diary(folder: Path) -> list[tuple[str, ...]]:
    path = folder / "diary"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    choose = random.Random(seed)
    reference, run = folder / "reference", folder / "run"
    for place in (reference, run):
        place.mkdir()
    steps = 40 * kills
    for _ in range(kills):
        before, already = committed(run / "checkpoints"), len(diary(run))
        ranks = start_ranks(train, WORLD_SIZE, run, steps)
        began = time.monotonic()
        limit = choose.uniform(0.0, 2.5)
        while time.monotonic() - began < limit:
            time.sleep(0.005)
        os.kill(ranks.pids[choose.randrange(WORLD_SIZE)], signal.SIGKILL)
        ranks.end()
        after = committed(run / "checkpoints")
        assert after >= before, "a committed checkpoint was lost"
        written = diary(run)[already:]
        if written:
            assert written[0] == ("start", str(before)), "a run went on from another one than the newest"
            # The save that was being written when the kill came is lost at most: the next begins after its commit.
            step = int(written[-1][1])
            assert step - after <= 2 * INTERVAL, f"from step {step} back to {after}"
    start_ranks(train, WORLD_SIZE, run, committed(run / "checkpoints") + 5).end(wait=60)
    seen = [entry[1:] for entry in diary(run) if entry[0] == "step"]
    run_distributed(train, WORLD_SIZE, reference, max(int(step) for step, _ in seen), timeout=300)
    expected = dict(entry[1:] for entry in diary(reference) if entry[0] == "step")
    assert all(expected[step] == loss for step, loss in seen), "weights of two steps were mixed"


def test_killed_at_random_it_resumes_from_what_was_committed(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_200_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=200, seed=2)


def flip(folder: Path, flips: int, seed: int) -> None:
    """Single bits in all files, each of which must be noticed."""
    run_distributed(train, WORLD_SIZE, folder, INTERVAL)
    store = FolderStore(folder / "checkpoints")
    (name,) = store.names()
    files = sorted((folder / "checkpoints" / name).iterdir())
    assert {"manifest.json", "index.json", "trainer.json", "rank_00001.safetensors"} <= {file.name for file in files}
    assert verify(store, name) == []
    choose = random.Random(seed)
    for count in range(flips):
        file = files[count % len(files)]
        position, bit = choose.randrange(file.stat().st_size), choose.randrange(8)
        flip_bit(file, position, bit)
        problems = verify(store, name)
        assert [problem.file for problem in problems] == [file.name], (file.name, position, bit)
        flip_bit(file, position, bit)
    assert verify(store, name) == []


def test_single_bits_are_noticed(tmp_path: Path) -> None:
    flip(tmp_path, flips=1000, seed=3)
