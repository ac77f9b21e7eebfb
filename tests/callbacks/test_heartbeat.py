"""A run that is watched: one that gets on, one in which a rank stands still, and what is no hang."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_llm.callbacks import AsyncDistributedCheckpoint, Heartbeat, Stragglers, Throughput
from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.monitor import VERDICTS, process_state
from lightning_llm.resilience.status import CHECKPOINT_AGE, CHECKPOINT_STEP, FIGURES, STRAGGLER_SCORE
from tests.distributed import run_distributed
from tests.ports import free_port
from tests.resilience.exposition import names_of, samples_of
from tests.strategies.training import BATCH_SIZE, SEQ_LEN, loader, make_module, make_strategy, make_trainer


class StandStill(Callback):
    """One rank sleeps in one step; so does saving, on all ranks."""

    def __init__(self, rank: int | None, seconds: float, while_saving: bool = False) -> None:
        self.rank, self.seconds, self.while_saving = rank, seconds, while_saving

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            time.sleep(self.seconds)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 3 and self.while_saving:
            trainer._checkpoint_connector.dump_checkpoint()
            time.sleep(self.seconds)


def watched(
    world_size: int, folder: Path, pause: tuple[int | None, float, bool], sizes: dict[str, Any], rank: int | None = None
) -> dict[str, Any]:
    heartbeat = Heartbeat(progress_timeout=2.0, alive_timeout=10.0, dirpath=folder)
    strategy = make_strategy(sizes)
    trainer = make_trainer(
        strategy, world_size, callbacks=[heartbeat, StandStill(*pause)], max_steps=6, val_check_interval=2
    )
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            seen["monitor"] = heartbeat.monitor_pid

    trainer.callbacks.append(Look())
    trainer.fit(make_module(), loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return {**seen, "pid": os.getpid(), "steps": trainer.global_step}


def verdicts(folder: Path) -> list[dict[str, Any]]:
    path = folder / VERDICTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_rank_that_stands_still_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    ranks = run_distributed(watched, 3, 3, tmp_path, (1, 4.0, False), {"zero_stage": 2})
    assert [rank["steps"] for rank in ranks] == [6, 6, 6]
    (verdict,) = verdicts(tmp_path)
    assert verdict["blamed"] == [1] and verdict["step"] == 3 and verdict["limit"] == 2.0
    assert "on_train_batch_start" in (tmp_path / "stacks-rank1.txt").read_text()
    monitors = [rank["monitor"] for rank in ranks]
    assert monitors[0] is not None and monitors[1:] == [None, None], "one for a node"
    assert process_state(monitors[0]) is None, "it has ended with the run"


@pytest.mark.parametrize(
    ("pause", "sizes"),
    [
        pytest.param((0, 1.0, False), {"pipeline_parallel_size": 2}, id="a pause below the limit"),
        pytest.param((None, 4.0, True), {}, id="a slow checkpoint"),
    ],
)
def test_what_is_no_hang(tmp_path: Path, pause: tuple[int | None, float, bool], sizes: dict[str, Any]) -> None:
    ranks = run_distributed(watched, 2, 2, tmp_path, pause, sizes)
    assert all(rank["steps"] == 6 for rank in ranks)
    assert verdicts(tmp_path) == []


class UntilShown(Callback):
    """Stops the run, on all ranks at once, when the monitor shows as many metrics as are asked for."""

    def __init__(self, port: int, names: set[str]) -> None:
        self.port, self.names = port, names
        self.metrics = ""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        complete = False
        if trainer.is_global_zero and trainer.global_step % 20 == 0:
            with suppress(OSError):  # it has not begun to listen
                self.metrics = (
                    urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5).read().decode()
                )
            complete = self.names <= names_of(self.metrics)
        if trainer.strategy.reduce_boolean_decision(complete, all=False):
            trainer.should_stop = True


def shown(folder: Path, port: int, names: set[str]) -> str:
    strategy = make_strategy({"zero_stage": 2})
    saver = AsyncDistributedCheckpoint(folder, every_n_train_steps=10, save_top_k=1)
    stragglers = Stragglers(every_n_steps=10)
    look = UntilShown(port, names)
    trainer = make_trainer(
        strategy,
        2,
        callbacks=[Heartbeat(dirpath=folder, port=port), Throughput(), stragglers, saver, look],
        max_steps=3000,
        max_epochs=-1,
        enable_checkpointing=True,
        val_check_interval=2,
    )
    trainer.fit(make_module(), loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return look.metrics


def test_figures_of_the_run_reach_prometheus(tmp_path: Path) -> None:
    names = {
        f"lightning_llm_{name}"
        for name in (*FIGURES, CHECKPOINT_STEP, CHECKPOINT_AGE, STRAGGLER_SCORE)
        if name != "mfu_ratio"  # which a CPU has none of
    }
    metrics, _ = run_distributed(shown, 2, tmp_path, free_port(), names)
    found = samples_of(metrics)
    assert names <= names_of(metrics)
    assert 0 < found["lightning_llm_train_loss"] < 5 and 0 < found["lightning_llm_grad_norm"] < 100
    assert found["lightning_llm_checkpoint_step"] % 10 == 0
    assert 0 <= found["lightning_llm_checkpoint_age_seconds"] < 60
    assert found["lightning_llm_tokens_per_second"] * found["lightning_llm_step_time_seconds"] == pytest.approx(
        BATCH_SIZE * SEQ_LEN
    )
    [score] = [value for name, value in found.items() if name.startswith("lightning_llm_straggler_worst_score{rank=")]
    assert 0 < score <= 1


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong, message in (
        ({"on_hang": "restart"}, "on_hang='restart' must be"),
        ({"every": 6.0}, "a single late beat is no alarm"),
        ({"progress_timeout": 0}, "progress_timeout=0 must be seconds above 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Heartbeat(**wrong)
