"""SpikeGuard: a run with a planted fault is the run in which that batch never was, bit by bit."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_llm import LLMModule
from lightning_llm.callbacks import AsyncDistributedCheckpoint, Heartbeat, Preemption, SpikeGuard, Throughput
from lightning_llm.errors import ConfigurationError, DivergedError
from tests.callbacks.states import state_of
from tests.distributed import run_distributed, run_on_gpu
from tests.strategies.training import BATCH_SIZE, SMALL, TokenRows, loader, make_module, make_trainer

BATCHES = 12
slow = pytest.mark.slow
ON_GPU = {"accelerator": "cuda", "deterministic": True}


class Planted(LLMModule):
    """Multiplies the loss of some batches, on one rank."""

    def __init__(self, faults: dict[int, float], rank: int, **arguments: Any) -> None:
        super().__init__(SMALL, learning_rate=5e-3, warmup_steps=0, schedule="constant", **arguments)
        self.faults, self.rank = faults, rank

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        batch = self.trainer.fit_loop.epoch_loop.batch_idx
        mine = self.trainer.global_rank == self.rank
        return super().loss(logits, labels) * (self.faults.get(batch, 1.0) if mine else 1.0)


class Rows(TokenRows):
    """Rows that know their numbers."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "ids": torch.tensor(index)}


def sharp(**arguments: Any) -> SpikeGuard:
    """One that knows after four steps what is usual; in so few, deviations are small by chance."""
    return SpikeGuard(warmup=4, window=8, mads=50, **arguments)


def fit(
    strategy: str,
    world_size: int,
    faults: dict[int, float],
    without: set[int],
    guard: SpikeGuard,
    folder: Path | None = None,
    module: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Trainer, dict[str, Tensor]]:
    """A run over all batches but those of `without`; what it leaves of weights and optimizer states on this rank."""
    savers = [AsyncDistributedCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)] if folder else []
    trainer = make_trainer(
        strategy,
        world_size,
        max_steps=-1,
        max_epochs=1,
        enable_checkpointing=bool(savers),
        callbacks=[guard, *savers],
        limit_val_batches=0,
        use_distributed_sampler=False,
        **arguments,
    )
    data_ranks = 1 if strategy in ("auto", "llm3d_tp2", "llm3d_pp2") else world_size
    mine = int(os.environ.get("RANK", 0)) % data_ranks
    rows = torch.arange(BATCHES * BATCH_SIZE).view(BATCHES, data_ranks, -1)[:, mine]
    kept = [row for batch in range(BATCHES) if batch not in without for row in rows[batch].tolist()]
    data = DataLoader(Subset(Rows(BATCHES * BATCH_SIZE), kept), batch_size=BATCH_SIZE // data_ranks)
    trainer.fit(Planted(faults, world_size - 1, **(module or {})), data)
    return trainer, state_of(trainer)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 30
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
    assert all(bool(value.isfinite().all()) for value in one.values())


def skips(world_size: int, strategy: str, fault: float, arguments: dict[str, Any]) -> None:
    guard = sharp()
    trainer, state = fit(strategy, world_size, {7: fault}, set(), guard, **arguments)
    _, wanted = fit(strategy, world_size, {}, {7}, sharp(), **arguments)
    assert trainer.global_step == BATCHES and trainer.callback_metrics["spike_guard/skipped"] == 1
    assert trainer.callback_metrics["spike_guard/rewinds"] == 0
    (found,) = guard.faults
    assert (found.step, found.epoch, found.batches) == (8, 0, [7])
    assert sorted(row for ids in found.ids.values() for row in ids) == list(range(7 * BATCH_SIZE, 8 * BATCH_SIZE))
    assert math.isfinite(fault) == math.isfinite(found.loss)
    assert_equal(state, wanted)
    assert not hasattr(trainer.optimizers[0], "found_inf")


@pytest.mark.parametrize(
    ("world_size", "strategy", "fault", "arguments"),
    [
        pytest.param(2, "llm3d", math.nan, {}, id="NaN on one rank"),
        pytest.param(1, "llm3d", 1e3, {"module": {"optimizer": "muon"}}, id="a spike, Muon"),
        pytest.param(2, "llm3d", 1e3, {}, id="a spike on one rank", marks=slow),
        pytest.param(2, "ddp", math.nan, {}, id="ddp", marks=slow),
        pytest.param(2, "llm3d_tp2", math.inf, {}, id="tp2", marks=slow),
        pytest.param(2, "llm3d_pp2", math.nan, {}, id="pp2", marks=slow),
        pytest.param(2, "llm3d_ddp", math.nan, {}, id="ZeRO-0", marks=slow),
        pytest.param(
            2, "llm3d", math.nan, {"module": {"optimizer_state_dtype": "bfloat16"}}, id="AdamW in bfloat16", marks=slow
        ),
        pytest.param(2, "llm3d", math.nan, {"precision": "bf16-mixed"}, id="bfloat16", marks=slow),
        pytest.param(2, "llm3d", math.nan, {"precision": "16-mixed"}, id="float16", marks=slow),
        pytest.param(2, "llm3d_deepspeed_zero1", math.nan, {}, id="DeepSpeed ZeRO-1", marks=slow),
        pytest.param(2, "llm3d_deepspeed_zero2", 1e3, {}, id="DeepSpeed ZeRO-2", marks=slow),
        pytest.param(2, "llm3d_deepspeed_zero3", math.nan, {}, id="DeepSpeed ZeRO-3", marks=slow),
    ],
)
def test_a_skipped_batch_never_was(world_size: int, strategy: str, fault: float, arguments: dict[str, Any]) -> None:
    run_distributed(skips, world_size, world_size, strategy, fault, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("strategy", "fault", "arguments"),
    [
        pytest.param("llm3d", math.nan, {}, id="NaN"),
        pytest.param("llm3d", 1e3, {"precision": "bf16-mixed"}, id="a spike, bfloat16"),
        pytest.param("llm3d", math.nan, {"precision": "16-mixed"}, id="float16"),
        pytest.param("llm3d", math.inf, {"module": {"optimizer": "muon"}}, id="Muon"),
        pytest.param("llm3d_deepspeed_zero1", math.nan, {}, id="DeepSpeed ZeRO-1"),
    ],
)
def test_a_skipped_batch_never_was_on_a_gpu(strategy: str, fault: float, arguments: dict[str, Any]) -> None:
    run_on_gpu(skips, 1, strategy, fault, {**ON_GPU, **arguments})


class RefusesToWait(Callback):
    """Has torch raise whenever the host is made to wait for the device, from step 4 on."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def trains_without_waiting(folder: Path, precision: str) -> int:
    watchers = [sharp(), Preemption(), Heartbeat(), Throughput(every_n_steps=100)]
    trainer = make_trainer(
        "llm3d",
        1,
        accelerator="cuda",
        precision=precision,
        max_steps=8,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[*watchers, RefusesToWait()],
    )
    trainer.fit(make_module(), loader(trainer, None))
    return trainer.global_step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_host_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    assert run_on_gpu(trains_without_waiting, tmp_path, precision) == 8


def rewinds(folder: Path, world_size: int, strategy: str, lost: Sequence[int] = (4, 5), **arguments: Any) -> None:
    """Step 6 is a fault, and step 4 was saved: what steps 5 and 6 had is lost."""
    guard = sharp(max_skips=0)
    trainer, state = fit(strategy, world_size, {5: math.nan}, set(), guard, folder, **arguments)
    _, wanted = fit(strategy, world_size, {}, set(lost), sharp(), **arguments)
    assert (guard.rewinds, guard.skipped, trainer.global_step) == (1, 1, BATCHES)
    assert_equal(state, wanted)


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        pytest.param(2, "llm3d", id="llm3d"),
        pytest.param(2, "ddp", id="ddp", marks=slow),
        pytest.param(2, "llm3d_tp2", id="tp2", marks=slow),
        pytest.param(2, "llm3d_pp2", id="pp2", marks=slow),
        pytest.param(2, "llm3d_deepspeed_zero2", id="DeepSpeed ZeRO-2", marks=slow),
        pytest.param(2, "llm3d_deepspeed_zero3", id="DeepSpeed ZeRO-3", marks=slow),
    ],
)
def test_a_rewound_run_is_one_without_the_window(tmp_path: Path, world_size: int, strategy: str) -> None:
    run_distributed(rewinds, world_size, tmp_path, world_size, strategy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_goes_back_a_step_later(tmp_path: Path) -> None:
    run_on_gpu(functools.partial(rewinds, lost=(4, 5, 6), **ON_GPU), tmp_path, 1, "llm3d")


@pytest.mark.parametrize("saves", [True, False])
def test_it_stops_when_nothing_helps(tmp_path: Path, saves: bool) -> None:
    """Batches 4, 5 and then 8, 9: two skips are too many, and the run may go back once, if there is where to."""
    guard = sharp(max_skips=1, max_rewinds=1)
    faults = dict.fromkeys((4, 5, 8, 9), math.nan)
    with pytest.raises(DivergedError, match="Training has diverged") as caught:
        fit("auto", 1, faults, set(), guard, tmp_path if saves else None)
    assert caught.value.code == 76
    assert [fault.step for fault in guard.faults] == ([5, 6, 9, 10] if saves else [5, 6])
    assert guard.rewinds == int(saves)
    assert ("after 1 rewinds" if saves else "no good checkpoint") in str(caught.value)


def test_what_it_knows_is_saved_and_an_undisturbed_run_is_left_alone() -> None:
    guard = sharp()
    fit("auto", 1, {7: math.nan}, set(), guard)
    again = sharp()
    again.load_state_dict(guard.state_dict())
    torch.testing.assert_close(again.state_dict(), guard.state_dict(), equal_nan=True)
    quiet = sharp()
    _, state = fit("auto", 1, {}, set(), quiet)
    _, wanted = fit("auto", 1, {}, set(), SpikeGuard(mads=None))
    assert quiet.skipped == 0
    assert_equal(state, wanted)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="warmup from 1 to window"):
        SpikeGuard(warmup=10, window=5)
    with pytest.raises(ConfigurationError, match="mads above 0"):
        SpikeGuard(mads=0)
