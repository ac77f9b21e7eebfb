"""A snapshot that is taken while training goes on is the one that was due, or none."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_llm._torch import copy_all
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint import overlap
from lightning_llm.checkpoint.overlap import stepped_tensors
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, Outcome, RunState
from lightning_llm.errors import ConfigurationError
from tests.callbacks.checkpointing import fit as fit_rows
from tests.callbacks.checkpointing import names
from tests.checkpoint.runs import EXPERTS
from tests.checkpoint.stories import Story, fit
from tests.checkpoint.test_exact_resume import assert_continues
from tests.distributed import run_distributed

TP2 = {"tensor_parallel_size": 2}
EP4 = {"expert_parallel_size": 4}


class Late(Callback):
    """Copies begin when the next backward is done, or training waits for them otherwise; put it before what saves."""

    def __init__(self) -> None:
        self.may_begin = threading.Event()
        self.copied: list[int] = []
        overlap.copy_all = self._copy_late

    def _copy_late(self, places: list[Tensor], tensors: list[Tensor]) -> None:
        assert self.may_begin.wait(60)
        self.copied.append(len(tensors))
        copy_all(places, tensors)

    def on_train_batch_end(self, *_: Any) -> None:
        self.may_begin.clear()

    def on_after_backward(self, *_: Any) -> None:
        self.may_begin.set()

    def on_validation_start(self, *_: Any) -> None:
        self.may_begin.set()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.may_begin.set()


# -- the same as a copy --


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    found = Checkpoint.open(checkpoint, alone=True)
    return {name: found.read(name) for name in found.tensors}


def save_both_ways(
    folder: Path, corpus: Path, world_size: int, options: Story, step: int, last: int
) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """One run that saves in the foreground and overlapped at each step, and one that goes on from the latter's."""
    late = Late()
    every: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    overlapped = AsyncDistributedCheckpoint(folder / "overlapped", snapshot="overlapped", **every)
    whole = fit(corpus, world_size, options, last, [late, ModelCheckpoint(folder / "at once", **every), overlapped])
    assert overlapped.latest is not None and overlapped.latest.error is None
    whole["logged"] = [row for row in whole["logged"] if "checkpoint/bytes" not in row[1]]
    return whole, fit(corpus, world_size, options, last, [], folder / "overlapped" / f"step={step}.ckpt"), late.copied


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, Story(trainer={"accumulate_grad_batches": 2}), id="one process, accumulation"),
        pytest.param(4, Story(sizes=TP2), id="dp2 x tp2"),
        pytest.param(4, Story(sizes=TP2 | EP4, config=EXPERTS, module={"optimizer": "muon"}), marks=pytest.mark.slow),
        pytest.param(4, Story(sizes={"pipeline_parallel_size": 2}), marks=pytest.mark.slow),
    ],
)
def test_it_is_what_a_copy_is(tmp_path: Path, pages: Path, world_size: int, options: Story) -> None:
    ranks = run_distributed(save_both_ways, world_size, tmp_path, pages, world_size, options, 3, 5)
    for step in range(1, 6):
        at_once = tensors_of(tmp_path / "at once" / f"step={step}.ckpt")
        overlapped = tensors_of(tmp_path / "overlapped" / f"step={step}.ckpt")
        assert overlapped.keys() == at_once.keys()
        for name, tensor in at_once.items():
            assert torch.equal(overlapped[name], tensor), (step, name)
    for whole, resumed, copied in ranks:
        assert len(copied) == 5 and min(copied) > 20
        assert_continues(whole, resumed, 3)


# -- what may change meanwhile, and what may not --


class Model(nn.Module):
    """Large enough that a copy takes longer than the way from a save to the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4096, 2048)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.tensor(1.0))

    def backward(self) -> Tensor:
        loss = self.linear(torch.ones(1, 4096)).square().mean()
        loss.backward()
        return loss.detach()


def state_of(model: Model, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {}).items()
        tensors |= {f"{name}.{key}": value for key, value in states if isinstance(value, Tensor)}
    return tensors


def save_and(folder: Path, optimizer: Optimizer, model: Model, act: Callable[[], object]) -> tuple[Outcome, bool]:
    """Does something right after a save; what became of it, and whether it holds what was there at the save."""
    saver = CheckpointSaver(background=True, alone=True)
    tensors = state_of(model, optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saver.save(RunState(1, tensors), folder / "c", [optimizer])
    act()
    saver.close()
    outcome = saver.finished()
    assert outcome is not None and not optimizer._optimizer_step_pre_hooks
    found = tensors_of(folder / "c") if outcome.error is None else {}
    return outcome, found.keys() == before.keys() and all(torch.equal(found[n], t) for n, t in before.items())


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW, fused": lambda parameters: AdamW(parameters, fused=True),
    "AdamW": AdamW,
    "SGD": lambda parameters: SGD(parameters, momentum=0.9, foreach=False),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, max_iter=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_wait(tmp_path: Path, name: str) -> None:
    """Those that no Trainer makes, with a closure and without."""
    model = Model()
    optimizer = OPTIMIZERS[name](model.linear.parameters())
    model.backward()
    if name == "LBFGS":
        optimizer.step(model.backward)  # type: ignore[arg-type]
        outcome, same = save_and(tmp_path, optimizer, model, lambda: optimizer.step(model.backward))  # type: ignore
        assert outcome.error is None and same
        return
    optimizer.step()
    for act in (optimizer.step, lambda: optimizer.step(closure=model.backward)):
        outcome, same = save_and(tmp_path, optimizer, model, act)
        assert outcome.error is None and same


def test_what_optimizers_do_not_change_is_copied_at_once(tmp_path: Path) -> None:
    model = Model()
    optimizer = AdamW(model.linear.parameters())
    model.backward()
    optimizer.step()
    late = stepped_tensors(state_of(model, optimizer), [optimizer])
    kinds = ("", ".step", ".exp_avg", ".exp_avg_sq")
    assert sorted(late) == sorted(f"linear.{name}{kind}" for name in ("weight", "bias") for kind in kinds)

    def change() -> None:
        model.count += 1
        with torch.no_grad():
            model.teacher.weight.zero_()

    outcome, same = save_and(tmp_path, optimizer, model, change)
    assert outcome.error is None and same


def one_element(weight: Tensor) -> None:
    with torch.no_grad():
        weight[-1, -1] += 1


def past_autograd(weight: Tensor) -> None:
    weight.data.mul_(2)


@pytest.mark.parametrize("change", [one_element, past_autograd])
def test_a_weight_that_is_edited_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], None]
) -> None:
    begin = threading.Event()

    def copy_late(places: list[Tensor], tensors: list[Tensor]) -> None:
        begin.wait(60)
        copy_all(places, tensors)

    monkeypatch.setattr(overlap, "copy_all", copy_late)
    model = Model()
    optimizer = AdamW(model.linear.parameters())

    def edit() -> None:
        change(model.linear.weight)
        begin.set()

    outcome, _ = save_and(tmp_path, optimizer, model, edit)
    assert outcome.error is not None and "linear.weight was changed" in outcome.error
    assert "snapshot='copy'" in outcome.error and outcome.attempts == 1
    assert names(tmp_path) == [], "neither a checkpoint nor a draft"


class EditAfter(Callback):
    """A hook that edits a weight on one rank when a step was saved."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == trainer.world_size - 1:
            with torch.no_grad():
                module.get_parameter("model.model.norm.weight").mul_(2)


def edit_weights(folder: Path) -> tuple[list[str], int, int, str]:
    callback = AsyncDistributedCheckpoint(
        folder, snapshot="overlapped", every_n_train_steps=2, save_top_k=-1, filename="{step}", backoff=0.0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit_rows(
            Late(), EditAfter(), callback, world_size=2, max_steps=8, val_check_interval=None, rows=64
        )
    (said,) = [str(w.message) for w in caught if "could not be saved" in str(w.message)] or [""]
    return names(folder), trainer.global_step, callback.failures, said


def test_training_goes_on_without_a_save_that_was_mixed(tmp_path: Path) -> None:
    """All ranks learn of what one of them found; the saves before and after are as good as ever."""
    ranks = run_distributed(edit_weights, 2, tmp_path)
    for left, steps, failures, _ in ranks:
        assert left == ["step=2.ckpt", "step=6.ckpt", "step=8.ckpt"] and steps == 8 and failures == 0
    assert "model.model.model.norm.weight was changed" in ranks[0][3] and "(1 attempts)" in ranks[0][3]


def test_a_save_that_training_waits_for_has_nothing_to_overlap(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="background=False"):
        AsyncDistributedCheckpoint(tmp_path, snapshot="overlapped", background=False)
    with pytest.raises(ConfigurationError, match="snapshot='fast'"):
        AsyncDistributedCheckpoint(tmp_path, snapshot="fast")  # type: ignore[arg-type]
