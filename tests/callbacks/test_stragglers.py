"""Stragglers are found by what each rank does alone, on real gloo ranks that wait for each other in every step."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_llm import LLM3DStrategy
from lightning_llm.callbacks import Stragglers
from lightning_llm.callbacks.stragglers import EVICT_AFTER, Medians, Probe, judge
from lightning_llm.errors import ConfigurationError, StragglerError
from tests.callbacks.tiny import Bigram, TokenBatches, batches, trainer
from tests.distributed import run_distributed
from tests.strategies.training import TokenRows, loader, make_module, make_trainer

WINDOW = 4
SLOW_RANK = 1


class MoreWork(Callback):
    """Makes one rank compute so much longer in each step, by the clock of its own processor time."""

    def __init__(self, seconds: float, until: float = math.inf) -> None:
        self.seconds, self.until = seconds, until

    def on_before_backward(self, run: Any, *_: Any) -> None:
        if run.global_rank == SLOW_RANK and run.global_step < self.until:
            end = time.thread_time() + self.seconds
            while time.thread_time() < end:
                pass


class Metrics(Logger):
    """Keeps what it is given last, on every rank."""

    name, version = "metrics", 0

    def __init__(self) -> None:
        super().__init__()
        self.of_stragglers: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "stragglers/rank" in metrics:
            self.of_stragglers = metrics

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class SlowRows(TokenRows):
    """Rows that take long to come, on one rank. It waits for them as for a slow disk."""

    def __getitem__(self, index: int) -> Any:
        if torch.distributed.get_rank() == SLOW_RANK:
            time.sleep(0.03)
        return super().__getitem__(index)


def run_with(extra: list[Callback], sizes: dict[str, Any], steps: int, rows: type = TokenRows, **settings: Any) -> Any:
    torch.set_num_threads(1)
    watch = Stragglers(every_n_steps=WINDOW, **settings)
    strategy = LLM3DStrategy(**sizes)
    world_size, metrics = torch.distributed.get_world_size(), Metrics()
    run = make_trainer(strategy, world_size, max_steps=steps, callbacks=[*extra, watch], logger=metrics)
    data = loader(run, strategy)
    if rows is not TokenRows:
        data = DataLoader(rows(), batch_size=data.batch_size, shuffle=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(make_module(), data)
    told = [str(one.message) for one in caught if str(one.message).startswith(("Straggler", "Late"))]
    return watch.found, told, metrics.of_stragglers


def evicted() -> tuple[str, int]:
    """Under DDP, with a rank that ends; the others would be ended by whoever started them."""
    torch.set_num_threads(1)
    watch = Stragglers(every_n_steps=2, evict=True)
    slow = MoreWork(0.03)
    steps = EVICT_AFTER * 2 + 1
    run = trainer(
        None, strategy=DDPStrategy(), devices=2, max_steps=steps, callbacks=[slow, watch], use_distributed_sampler=False
    )
    try:
        run.fit(Bigram(), DataLoader(TokenBatches(2 * steps, 8), batch_size=2))
    except StragglerError as error:
        return str(error), error.code
    return "", 0


class Same(MoreWork):
    """As much work on all ranks as outweighs what the machine does beside."""

    def on_before_backward(self, run: Any, *_: Any) -> None:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass


def two_data_ranks() -> dict[str, Any]:
    """One run after the other, in the same processes."""
    return {
        "slow": run_with([MoreWork(0.06)], {}, 3 * WINDOW + 1),
        "late": run_with([], {}, 2 * WINDOW + 1, SlowRows),
        "same": run_with([Same(0.04)], {}, 2 * WINDOW + 1),
        "slow at first": run_with([MoreWork(0.06, until=WINDOW), Same(0.02)], {}, 3 * WINDOW + 1),
        "evicted": evicted(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(two_data_ranks, 2)


def check_slow(outcomes: list[Any]) -> None:
    for rank, (found, told, metrics) in enumerate(outcomes):
        assert list(found.slow) == [SLOW_RANK] and found.late == {}
        assert found.scores == outcomes[0][0].scores, "all agree"
        assert metrics["stragglers/rank"] == SLOW_RANK
        assert metrics["stragglers/worst_score"] == pytest.approx(1 / found.slow[SLOW_RANK], rel=1e-5)
        assert len(told) == (rank == 0), "rank zero tells it, and once"
    assert "Straggler: rank 1 on " in outcomes[0][1][0]


@pytest.mark.slow
def test_a_rank_that_computes_more_is_found_and_told_once(ranks: list[dict[str, Any]]) -> None:
    check_slow([rank["slow"] for rank in ranks])


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (4, {"pipeline_parallel_size": 2, "data_parallel_size": 2}),
        pytest.param(2, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"context_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 0}, marks=pytest.mark.slow),
    ],
)
def test_so_it_is_in_other_layouts(world_size: int, sizes: dict[str, Any]) -> None:
    check_slow(run_distributed(run_with, world_size, [MoreWork(0.1)], sizes, WINDOW + 1))


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_is_late_not_slow(ranks: list[dict[str, Any]]) -> None:
    found, told, _ = ranks[0]["late"]
    assert SLOW_RANK in found.late and 0 not in found.late
    assert found.late[SLOW_RANK] > 4 * 0.03 * 0.5, "four rows a batch"
    [late] = [text for text in told if text.startswith("Late")]
    assert "rank 1 on" in late and "does not compute slowly" in late


@pytest.mark.slow
def test_nobody_is_accused_where_all_do_the_same(ranks: list[dict[str, Any]]) -> None:
    found, told, _ = ranks[0]["same"]
    assert found.slow == {} and found.late == {} and told == []
    assert min(found.scores) > 1 / 1.3


@pytest.mark.slow
def test_who_was_slow_and_is_not_any_more_is_taken_back(ranks: list[dict[str, Any]]) -> None:
    found, told, _ = ranks[0]["slow at first"]
    assert found.slow == {} and len(told) == 1


@pytest.mark.slow
def test_a_straggler_is_evicted_with_the_code_for_a_restart(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["evicted"] == ("", 0), "it was the run's last step, which needs no peer any more"
    message, code = ranks[1]["evicted"]
    assert code == 75 and "rank 1 on" in message and "Restart without this host" in message


def test_one_process_has_no_peers(tmp_path: Any) -> None:
    watch = Stragglers(every_n_steps=2)
    run = trainer(tmp_path, max_steps=5, callbacks=[watch])
    run.fit(Bigram(), batches(5))
    assert watch.found is None


def test_stages_of_a_pipeline_are_compared_with_their_own_kind() -> None:
    light, heavy = Medians(0.1, 0, 1, stage=0), Medians(0.3, 0, 1, stage=1)
    assert judge([light, light, heavy, heavy], 1.3).slow == {}
    slower = heavy._replace(computes=0.45)
    found = judge([light, light, heavy, slower], 1.3)
    assert found.slow == {3: pytest.approx(1.5)} and found.scores == [1, 1, 1, pytest.approx(2 / 3)]


@pytest.mark.parametrize("settings", [{"every_n_steps": 1}, {"threshold": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Stragglers"):
        Stragglers(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_probe_on_cuda_times_a_product() -> None:
    probe = Probe(torch.device("cuda", torch.cuda.current_device()))
    probe.begin()
    torch.cuda.synchronize()
    [seconds] = probe.finished()
    assert 2 * Probe.SIZE**3 / seconds < 5e15 and seconds < 0.1
