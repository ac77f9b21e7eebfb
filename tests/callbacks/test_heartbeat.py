"""A run that is watched: one that gets on, one in which a rank stands still, and what is no hang."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_llm.callbacks import Heartbeat
from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.monitor import VERDICTS, process_state
from tests.distributed import run_distributed
from tests.strategies.training import loader, make_module, make_strategy, make_trainer


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


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong, message in (
        ({"on_hang": "restart"}, "on_hang='restart' must be"),
        ({"every": 6.0}, "a single late beat is no alarm"),
        ({"progress_timeout": 0}, "progress_timeout=0 must be seconds above 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Heartbeat(**wrong)
