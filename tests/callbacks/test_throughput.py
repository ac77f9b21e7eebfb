"""Throughput counts every token once, times training only, and survives a checkpoint."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_llm import LLM3DStrategy
from lightning_llm.callbacks import Throughput
from lightning_llm.callbacks.throughput import _Stopwatch, dense_bf16_peak, model_flops_utilization
from lightning_llm.errors import ConfigurationError
from tests.callbacks.tiny import Bigram, batches, trainer
from tests.distributed import run_distributed
from tests.strategies.training import BATCH_SIZE, SEQ_LEN, loader, make_module, make_trainer

TOKENS_PER_BATCH = 2 * 8


class StepSeconds(Callback):
    """Measures each optimizer step from outside: from batch to batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


class Busy(Callback):
    """Keeps the processor busy for a while in a hook, so that its time can be told from training time."""

    def __init__(self, hook: str, seconds: float) -> None:
        self.seconds = seconds
        setattr(self, hook, self.work)

    def work(self, *_: Any) -> None:
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_logs_tokens_and_times_that_agree_with_a_clock_outside(tmp_path: Path) -> None:
    throughput, outside = Throughput(every_n_steps=4), StepSeconds()
    busy = Busy("on_before_backward", 0.02)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, max_steps=10, callbacks=[busy, throughput, outside], logger=logger)
    run.fit(Bigram(), batches(10))

    table = rows(tmp_path)
    assert [float(row["tokens_seen"]) for row in table] == [TOKENS_PER_BATCH * (i + 1) for i in range(10)]
    assert table[0]["tokens_per_second"] == "", "the first step allocates and compiles: it is not timed"
    step_time = (outside.ends[9] - outside.ends[5]) / 4
    logged = float(table[9]["step_time"])
    assert logged >= 0.02
    assert logged == pytest.approx(step_time, rel=0.5)  # wide: the two clocks are read at slightly different moments
    assert float(table[9]["tokens_per_second"]) == pytest.approx(TOKENS_PER_BATCH / logged)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    throughput = Throughput(every_n_steps=2)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, max_steps=4, accumulate_grad_batches=3, callbacks=[throughput], logger=logger)
    run.fit(Bigram(), batches(12))
    table = rows(tmp_path)
    assert [float(row["tokens_seen"]) for row in table] == [3 * TOKENS_PER_BATCH * (i + 1) for i in range(4)]
    last = table[-1]
    assert float(last["tokens_per_second"]) * float(last["step_time"]) == pytest.approx(3 * TOKENS_PER_BATCH)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_save_checkpoint"])
def test_validation_and_checkpoints_are_not_timed(tmp_path: Path, hook: str) -> None:
    throughput = Throughput(every_n_steps=100)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    run = trainer(
        tmp_path,
        max_steps=8,
        val_check_interval=2,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=[throughput, Busy(hook, 0.5), checkpoint],
    )
    run.fit(Bigram(), batches(8), batches(1))
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    # Three pauses of 0.5 s lie between the first step and the last: counted, a step would take 0.2 s or more.
    assert run.callback_metrics["step_time"] < 0.1


def tokens_seen_in(world_size: int, sizes: dict[str, int]) -> int:
    throughput = Throughput()
    strategy = LLM3DStrategy(**sizes)
    run = make_trainer(strategy, world_size, max_steps=3, callbacks=[throughput])
    run.fit(make_module(), loader(run, strategy))
    return throughput.tokens_seen


def test_tokens_are_those_of_all_data_ranks_not_of_all_processes() -> None:
    seen = run_distributed(tokens_seen_in, 4, 4, {"tensor_parallel_size": 2})
    assert seen == [3 * BATCH_SIZE * SEQ_LEN] * 4


def test_tokens_seen_continue_after_a_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=3, callbacks=[Throughput()])
    first.fit(Bigram(), batches(6))
    first.save_checkpoint(tmp_path / "at3.ckpt")

    resumed = Throughput()
    second = trainer(tmp_path, max_steps=5, callbacks=[resumed])
    second.fit(Bigram(), batches(6), ckpt_path=tmp_path / "at3.ckpt")
    assert resumed.tokens_seen == 5 * TOKENS_PER_BATCH
    assert second.callback_metrics["tokens_seen"] == 5 * TOKENS_PER_BATCH


def test_tokens_seen_are_exact_where_float32_is_not(tmp_path: Path) -> None:
    throughput = Throughput()
    throughput.load_state_dict({"tokens_seen": 2**40 + 1})
    run = trainer(tmp_path, max_steps=1, callbacks=[throughput])
    run.fit(Bigram(), batches(1))
    assert run.callback_metrics["tokens_seen"].item() == 2**40 + 1 + TOKENS_PER_BATCH


def test_a_cpu_has_no_mfu(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, callbacks=[Throughput()])
    run.fit(Bigram(), batches(3))
    assert "tokens_per_second" in run.callback_metrics
    assert "mfu" not in run.callback_metrics


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_figures_on_cuda_come_once_a_window(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, accelerator="cuda", max_steps=7, callbacks=[Throughput(every_n_steps=3)], logger=logger)
    run.fit(Bigram(), batches(7))
    times = [row["step_time"] for row in rows(tmp_path)]
    assert times[:3] == ["", "", ""] and times[3] == times[5] != times[6]
    known = dense_bf16_peak(torch.cuda.get_device_name()) is not None
    assert ("mfu" in run.callback_metrics) == known


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_go_by_the_name_that_torch_gives(name: str, peak: float | None) -> None:
    assert dense_bf16_peak(name) == peak


def test_mfu_is_the_share_of_all_devices() -> None:
    assert model_flops_utilization(1e4, 5e9, 1e14, devices=2) == pytest.approx(0.25)


def test_stopwatch_stands_still_while_paused() -> None:
    watch = _Stopwatch()
    watch.resume()
    Busy("unused", 0.02).work()
    watch.pause()
    stood = watch.seconds
    Busy("unused", 0.02).work()
    watch.pause()
    assert watch.seconds == stood >= 0.02
    watch.resume()
    watch.resume()
    Busy("unused", 0.02).work()
    assert watch.seconds >= stood + 0.02


def test_batches_without_input_ids_are_named(tmp_path: Path) -> None:
    class Pairs(Bigram):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step({"input_ids": batch[0], "labels": batch[1]}, batch_idx)

    tokens = torch.zeros(4, 8, dtype=torch.long)
    pairs = DataLoader(TensorDataset(tokens, tokens), batch_size=2)
    run: Trainer = trainer(tmp_path, max_steps=1, callbacks=[Throughput()])
    module: LightningModule = Pairs()
    with pytest.raises(ConfigurationError, match="input_ids.*but a batch is a list"):
        run.fit(module, pairs)


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="every_n_steps=0"):
        Throughput(every_n_steps=0)
