"""What DeepSpeed's engine holds, saved in the background, from a disk, and in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_llm import Decoder
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.export import export
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.strategies.deepspeed.ops import op_states
from tests.checkpoint.stories import equal
from tests.distributed import run_distributed
from tests.strategies.training import BATCH_SIZE, SMALL, Recorder, loader, make_module, make_strategy, make_trainer

STEPS = 6
CAN_USE_DISKS = any(state.op.name == "async_io" and state.state in ("built", "installed") for state in op_states())
needs_disks = pytest.mark.skipif(not CAN_USE_DISKS, reason="async_io is not built")


class SaveInForeground(Callback):
    """Saves at a step what a checkpoint in the background should be."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(
    world_size: int, settings: dict[str, Any], callbacks: list[Callback], resume: Path | None = None, **arguments: Any
) -> list[float]:
    recorder = Recorder()
    strategy = make_strategy({"engine": "deepspeed", **settings})
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[recorder, *callbacks],
        max_steps=STEPS,
        limit_val_batches=0,
        enable_checkpointing=True,
        **arguments,
    )
    # A batch is all there is, so that a resumed run sees what an uninterrupted one does.
    trainer.fit(make_module(), loader(trainer, strategy, rows=BATCH_SIZE), ckpt_path=resume)
    return recorder.losses


def content(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder, alone=True)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def in_background(world: int, settings: dict[str, Any], folder: Path, snapshot: str, precision: str) -> list[float]:
    background = AsyncDistributedCheckpoint(
        folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, snapshot=snapshot
    )
    callbacks = [SaveInForeground(3, folder / "now"), background]
    return train(world, settings, callbacks, precision=precision)


@pytest.mark.parametrize(
    ("settings", "snapshot", "precision"),
    [
        pytest.param({"zero_stage": 2}, "overlapped", "bf16-mixed", id="ZeRO-2"),
        pytest.param({"zero_stage": 3}, "overlapped", "32-true", id="ZeRO-3", marks=pytest.mark.slow),
        pytest.param(
            {"zero_stage": 1, "offload_optimizer": "cpu"}, "copy", "bf16-mixed", id="offloaded", marks=pytest.mark.slow
        ),
    ],
)
def test_saved_in_the_background_it_is_the_state_of_its_step(
    tmp_path: Path, settings: dict[str, Any], snapshot: str, precision: str
) -> None:
    losses = run_distributed(in_background, 2, 2, settings, tmp_path, snapshot, precision)[0]
    expected, found = content(tmp_path / "now"), content(tmp_path / "step=3.ckpt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert equal(found[name], value), name
    assert all(value.dtype == torch.float32 for name, value in found.items() if name.startswith("model."))
    resumed = run_distributed(resume_from, 2, 2, settings, tmp_path / "step=3.ckpt", precision)[0]
    assert resumed == losses[3:]


def resume_from(world_size: int, settings: dict[str, Any], path: Path, precision: str) -> list[float]:
    return train(world_size, settings, [], resume=path, precision=precision)


@needs_disks
@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["nvme", "cpu"])
def test_what_lies_on_a_disk_is_saved_and_comes_back(tmp_path: Path, parameters: str) -> None:
    disk = {"offload_optimizer": "nvme", "offload_parameters": parameters, "nvme_path": tmp_path / "disk"}
    plain, path = {"zero_stage": 3}, tmp_path / "step-3"
    whole = run_distributed(train_and_save, 2, 2, {**plain, **disk}, path)[0]
    for settings in ({**plain, **disk}, plain):
        resumed = run_distributed(resume_from, 2, 2, settings, path, "32-true")[0]
        assert resumed == pytest.approx(whole[3:], abs=1e-5)


def train_and_save(world_size: int, settings: dict[str, Any], path: Path) -> list[float]:
    return train(world_size, settings, [SaveInForeground(3, path)])


@pytest.mark.slow
def test_what_was_trained_is_exported_like_any_other(tmp_path: Path) -> None:
    run_distributed(train_and_save, 2, 2, {"zero_stage": 3}, tmp_path / "step")
    export(tmp_path / "step", tmp_path / "model")
    decoder = Decoder.from_pretrained(tmp_path / "model")
    assert decoder.config.hidden_size == SMALL.hidden_size
    stored = content(tmp_path / "step")
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, stored[f"model.model.{name}"]), name
