"""Where random generators go on after a resume: of every rank, in the same layout and in others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_llm import LLM3DStrategy
from lightning_llm.checkpoint.random_state import derived_state, random_state, set_random_state
from lightning_llm.checkpoint.reshard import reshard
from tests.checkpoint.stories import equal
from tests.distributed import run_distributed
from tests.strategies.training import TokenRows, loader, make_module, make_trainer

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}


def seed_by_rank(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


class First(Callback):
    """Takes down where the generators are when the first batch begins, and saves."""

    def __init__(self, save: Path | None = None) -> None:
        self.save = save
        self.state: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if self.state is None:
            self.state = random_state()
            if self.save is not None:
                trainer.save_checkpoint(self.save)


def first_state(
    world_size: int, sizes: dict[str, Any], folder: Path, resume: bool = True, reseed: int = 99
) -> dict[str, Any] | None:
    """The generators of this rank at the first batch of a run: of one that saves there, or that goes on from there."""
    seed_by_rank(reseed if resume else torch.distributed.get_rank())
    first = First(None if resume else folder)
    strategy = LLM3DStrategy(**sizes)
    trainer = make_trainer(strategy, world_size, callbacks=[first], max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(), loader(trainer, strategy), ckpt_path=folder if resume else None)
    return first.state


def test_other_layouts_take_the_state_of_the_same_data_rank(tmp_path: Path) -> None:
    """Saved in dp2 x tp2, with generators that differ on all ranks."""
    saved = run_distributed(first_state, 4, 4, TP2, tmp_path / "saved", False)
    assert not equal(saved[0], saved[1])

    same = run_distributed(first_state, 4, 4, TP2, tmp_path / "saved")
    assert equal(same, saved)
    one, two = (run_distributed(first_state, n, n, {}, tmp_path / "saved") for n in (1, 2))
    assert equal(one, [saved[0]])
    assert equal(two, [saved[0], saved[2]])
    assert equal(run_distributed(first_state, 2, 2, PP2, tmp_path / "saved"), [saved[0], saved[0]])
    assert equal(run_distributed(first_state, 2, 2, TP2, tmp_path / "saved"), [saved[0], saved[0]])

    four, again = (run_distributed(first_state, 4, 4, {}, tmp_path / "saved", True, seed) for seed in (99, 100))
    assert equal(four[:2], [saved[0], saved[2]])
    assert equal(four, again), "new data ranks start where the checkpoint says, not where this process was"
    assert not any(equal(four[rank], other) for rank in (2, 3) for other in [*saved, four[5 - rank]])


@pytest.mark.slow
def test_fewer_files_than_ranks_saved(tmp_path: Path) -> None:
    """Resharded, and resumed in the layout that was saved: a rank without a file draws as those that it shares with."""
    saved = run_distributed(first_state, 4, 4, TP2, tmp_path / "saved", False)
    for ranks, known in ((1, [0, 0, None, None]), (3, [0, 1, 2, 2])):
        reshard(tmp_path / "saved", tmp_path / f"new-{ranks}", ranks=ranks)
        found = run_distributed(first_state, 4, 4, TP2, tmp_path / f"new-{ranks}")
        for state, source in zip(found, known, strict=True):
            assert equal(state, saved[source]) if source is not None else not any(equal(state, s) for s in saved)
        assert equal(found[2], found[3])
    reshard(tmp_path / "saved", tmp_path / "more", ranks=5)
    assert equal(run_distributed(first_state, 4, 4, TP2, tmp_path / "more"), saved)


def test_derived_states_are_states() -> None:
    seed_by_rank(1)
    state = random_state()
    for number in (2, 3):
        derived = derived_state(state, number)
        assert equal(derived, derived_state(state, number)) and derived.keys() == state.keys()
        set_random_state(derived)
        assert equal(random_state(), derived)
    assert not equal(derived_state(state, 2), derived_state(state, 3))


class Drawn:
    """Batches with noise drawn in the training process, and a place to go on from, as torchdata's loaders have one."""

    def __init__(self, batches: int) -> None:
        self.rows = TokenRows(2 * batches, ignore=False)
        self.done = self.start = 0

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self.start = self.start, 0
        for number in range(start, len(self)):
            self.done = number + 1
            rows = [self.rows[2 * number], self.rows[2 * number + 1]]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            batch["labels"][:, random.randrange(8)] = -100
            batch["labels"][:, np.random.randint(8)] = -100
            batch["labels"][:, torch.randint(8, ())] = -100
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["done"]


class SeeAll(Callback):
    def __init__(self, save_at: dict[int, Path]) -> None:
        self.save_at = save_at
        self.labels: list[list[list[int]]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.labels.append(batch["labels"].tolist())
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(self.save_at[trainer.global_step])


def train_on_drawn(resume: Path | None, save_at: dict[int, Path]) -> tuple[list[list[list[int]]], list[float]]:
    seed_by_rank(5)
    see = SeeAll(save_at)
    trainer = make_trainer(LLM3DStrategy(), 1, callbacks=[see], max_steps=10, val_check_interval=3, limit_val_batches=1)
    trainer.fit(make_module(), Drawn(6), loader(trainer, None, rows=8), ckpt_path=resume)
    return see.labels, see.losses


def test_data_that_is_drawn_in_the_training_process_goes_on(tmp_path: Path) -> None:
    """With a validation between, whose own DataLoader draws too."""
    steps = (2, 3, 6, 8)
    ((labels, losses),) = run_distributed(train_on_drawn, 1, None, {step: tmp_path / str(step) for step in steps})
    assert len(labels) == 10
    for step in steps:
        ((labels_after, losses_after),) = run_distributed(train_on_drawn, 1, tmp_path / str(step), {})
        assert labels_after == labels[step:] and losses_after == losses[step:]


def look_at(folder: Path, how: str, path: Path | None) -> dict[str, Any]:
    seed_by_rank(7)
    strategy = LLM3DStrategy()
    trainer = make_trainer(strategy, 1)
    arguments = {"verbose": False} if how != "predict" else {}
    getattr(trainer, how)(make_module(), loader(trainer, strategy, rows=8), ckpt_path=path, **arguments)
    return random_state()


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_looking_at_a_checkpoint_leaves_generators_alone(tmp_path: Path, how: str) -> None:
    run_distributed(first_state, 1, 1, {}, tmp_path / "saved", False)
    without = run_distributed(look_at, 1, tmp_path, how, None)
    assert equal(run_distributed(look_at, 1, tmp_path, how, tmp_path / "saved"), without)


def fit_after_nothing_was_left(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A fit that finds the run at its end, then one that does not resume: the state of the first must not come back."""
    strategy, first = LLM3DStrategy(), First()
    trainer = make_trainer(strategy, 1, callbacks=[first], max_steps=1, limit_val_batches=0)
    module = make_module()
    trainer.fit(module, loader(trainer, strategy))
    trainer.save_checkpoint(folder)
    trainer.fit(module, loader(trainer, strategy), ckpt_path=folder)
    first.state = None
    trainer.fit_loop.epoch_loop.max_steps = 2
    seed_by_rank(8)
    before = random_state()
    trainer.fit(module, loader(trainer, strategy))
    return before, first.state


def test_a_state_is_taken_up_once(tmp_path: Path) -> None:
    ((before, at_first),) = run_distributed(fit_after_nothing_was_left, 1, tmp_path / "saved")
    assert at_first is not None
    assert equal([at_first["python"], at_first["numpy"]], [before["python"], before["numpy"]])
