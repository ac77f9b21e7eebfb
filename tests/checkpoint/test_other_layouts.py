"""Saved in one layout, loaded in another: every tensor is the same bit by bit, the loss goes on, and no sample is
repeated or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_llm import LLMModule, TokenDataModule
from lightning_llm.checkpoint.reading import Checkpoint
from tests.checkpoint.runs import CONFIG, EXPERTS, STEPS, TIED
from tests.checkpoint.stories import equal
from tests.distributed import run_distributed
from tests.strategies.training import make_strategy, make_trainer

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
ZERO0 = {"zero_stage": 0}
ONE: dict[str, Any] = {}
DEEPSPEED = {"engine": "deepspeed"}
CONFIGS = {"untied": CONFIG, "tied": TIED, "experts": EXPERTS}
OPTIMIZERS = {"muon": {"optimizer": "muon"}, "bfloat16 states": {"optimizer_state_dtype": "bfloat16"}}
LOADED = 3  # the step that is gone on from
slow = pytest.mark.slow


class Watch(Callback):
    """What the run does, of one process's view: losses and the samples' first tokens; saves where it is told to."""

    def __init__(self, saves: dict[int, Path], save_at_start: Path | None) -> None:
        self.saves, self.save_at_start = saves, save_at_start
        self.losses: list[float] = []
        self.samples: list[list[list[int]]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.save_at_start is not None:
            trainer.save_checkpoint(self.save_at_start)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.samples.append(batch["input_ids"].tolist())
        if trainer.global_step in self.saves:
            trainer.save_checkpoint(self.saves[trainer.global_step])


def go(
    corpus: Path,
    world_size: int,
    sizes: dict[str, Any],
    name: str,
    saves: dict[int, Path] | None = None,
    resume: Path | None = None,
    saved_again: Path | None = None,
) -> dict[str, Any]:
    """One run in one layout; `saved_again`: saves what it loaded before it trains."""
    watch = Watch(saves or {}, saved_again)
    trainer = make_trainer(
        make_strategy(sizes),
        world_size,
        callbacks=[watch],
        max_steps=STEPS,
        limit_val_batches=0,
    )
    module = LLMModule(CONFIGS.get(name, CONFIG), learning_rate=3e-3, warmup_steps=2, **OPTIMIZERS.get(name, {}))
    trainer.fit(module, datamodule=TokenDataModule(corpus, batch_size=8, seq_len=32), ckpt_path=resume)
    return {
        "losses": watch.losses,
        "samples": watch.samples,
        "data": tuple(trainer.strategy.distributed_sampler_kwargs.values()),
    }


def go_all(corpus: Path, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs in one group of processes."""
    return [go(corpus, world_size, **run) for run in runs]


def content(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, put together, and the optimizers' settings."""
    checkpoint = Checkpoint.open(folder, alone=True)
    return {name: checkpoint.read(name) for name in checkpoint.tensors} | {"values": checkpoint.values}


def samples_of_steps(ranks: list[dict[str, Any]]) -> list[list[list[int]]]:
    """The samples of each step over all data ranks, each once."""
    by_data_rank = {rank["data"][1]: rank["samples"] for rank in ranks}
    assert len(by_data_rank) == ranks[0]["data"][0]
    return [
        sum((by_data_rank[rank][step] for rank in sorted(by_data_rank)), []) for step in range(len(by_data_rank[0]))
    ]


@pytest.fixture(
    scope="module", params=["tied", pytest.param("untied", marks=slow), pytest.param("experts", marks=slow)]
)
def saved_in_3d(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pages: Path
) -> dict[str, Any]:
    """An uninterrupted run of 8 processes, pp2 x dp2 x tp2 and with experts ep2 as well, saved in the middle."""
    name = request.param
    folder = tmp_path_factory.mktemp("saved") / "step"
    sizes = TP2 | PP2 | (EP2 if name == "experts" else {})
    run = {"sizes": sizes, "name": name, "saves": {LOADED: folder}}
    ranks = [rank[0] for rank in run_distributed(go_all, 8, pages, 8, [run], timeout=250)]
    return {"folder": folder, "name": name, "content": content(folder), "ranks": ranks}


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        pytest.param(1, [ONE], id="1"),
        pytest.param(
            2, [TP2, PP2, CP2 | {"zero_stage": 0}, PP2 | {"pipeline_schedule": "DualPipeV"}], id="tp2, pp2, cp2"
        ),
        pytest.param(4, [ONE, TP2 | PP2], id="dp4, pp2 x tp2", marks=slow),
    ],
)
def test_saved_in_three_dimensions_and_loaded_in_others(
    saved_in_3d: dict[str, Any], pages: Path, tmp_path: Path, world_size: int, layouts: list[dict[str, Any]]
) -> None:
    name = saved_in_3d["name"]
    if name == "experts":  # their biases and context parallelism do not go with these schedules and layouts
        layouts = [EP2 if layout is TP2 else layout for layout in layouts if "pipeline_schedule" not in layout]
    runs = [
        {"sizes": layout, "name": name, "resume": saved_in_3d["folder"], "saved_again": tmp_path / str(number)}
        for number, layout in enumerate(layouts)
    ]
    ranks = run_distributed(go_all, world_size, pages, world_size, runs, timeout=250)
    for number in range(len(layouts)):
        assert_goes_on(saved_in_3d, [rank[number] for rank in ranks], tmp_path / str(number))


def assert_goes_on(
    before: dict[str, Any], after: list[dict[str, Any]], saved_again: Path, tolerance: float = 1e-5
) -> None:
    loaded = content(saved_again)
    assert loaded.keys() == before["content"].keys()
    moments = [name for name in loaded if name.endswith((".exp_avg", ".momentum_buffer"))]
    biases = [loaded[name] for name in loaded if name.endswith("bias")]  # of routers: no parameters
    assert len(moments) == sum(name.startswith("model.") for name in loaded) - len(biases)
    assert all(bias.abs().max() > 1e-3 for bias in biases) and bool(biases) == (before.get("name") == "experts")
    for name, value in before["content"].items():
        assert equal(loaded[name], value), name
    assert after[0]["losses"] == pytest.approx(before["ranks"][0]["losses"][LOADED:], abs=tolerance)
    whole = samples_of_steps(before["ranks"])
    assert samples_of_steps(after) == whole[LOADED:]


@slow
@pytest.mark.parametrize(("world_size", "sizes"), [pytest.param(1, ONE, id="1"), pytest.param(2, TP2, id="tp2")])
def test_saved_in_few_processes_and_loaded_in_eight(
    pages: Path, tmp_path: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    run = {"sizes": sizes, "name": "tied", "saves": {LOADED: tmp_path / "step"}}
    ranks = [rank[0] for rank in run_distributed(go_all, world_size, pages, world_size, [run])]
    before = {"content": content(tmp_path / "step"), "ranks": ranks}
    again = {"sizes": TP2 | PP2, "name": "tied", "resume": tmp_path / "step", "saved_again": tmp_path / "again"}
    after = [rank[0] for rank in run_distributed(go_all, 8, pages, 8, [again], timeout=250)]
    assert_goes_on(before, after, tmp_path / "again")


@slow
def test_other_optimizers(pages: Path, tmp_path: Path) -> None:
    """Saved in pp2 x tp2, loaded in dp2 and tp2. They compute in bfloat16, so rounding grows faster."""
    names = list(OPTIMIZERS)
    runs = [{"sizes": TP2 | PP2, "name": name, "saves": {LOADED: tmp_path / name}} for name in names]
    before = run_distributed(go_all, 4, pages, 4, runs)
    again = [
        {"sizes": sizes, "name": name, "resume": tmp_path / name, "saved_again": tmp_path / f"{name}, {number}"}
        for name in names
        for number, sizes in enumerate((ONE, TP2))
    ]
    after = run_distributed(go_all, 2, pages, 2, again)
    for index, run in enumerate(again):
        number = names.index(run["name"])
        whole = {"content": content(tmp_path / run["name"]), "ranks": [rank[number] for rank in before]}
        assert_goes_on(whole, [rank[index] for rank in after], run["saved_again"], tolerance=1e-4)


def test_no_sample_is_repeated_or_left_out_over_two_changes(pages: Path, tmp_path: Path) -> None:
    """dp4 -> dp2 -> 1, within an epoch; the number of data workers does not matter either."""
    first, second = tmp_path / "2", tmp_path / "5"
    (whole,) = run_distributed(go_all, 1, pages, 1, [{"sizes": ONE, "name": "untied"}])[0]
    parts = [
        run_distributed(go_all, 4, pages, 4, [{"sizes": ONE, "name": "untied", "saves": {2: first}}]),
        run_distributed(go_all, 2, pages, 2, [{"sizes": ONE, "name": "untied", "resume": first, "saves": {5: second}}]),
        run_distributed(go_all, 1, pages, 1, [{"sizes": ONE, "name": "untied", "resume": second}]),
    ]
    seen = [samples_of_steps([rank[0] for rank in ranks]) for ranks in parts]
    assert seen[0][:2] + seen[1][:3] + seen[2] == samples_of_steps([whole])


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(
            TP2, [DEEPSPEED | {"zero_stage": stage} for stage in (3, 1)], id="llm3d tp2 to DeepSpeed", marks=slow
        ),
        pytest.param(DEEPSPEED | {"zero_stage": 3}, [TP2, DEEPSPEED | PP2], id="DeepSpeed ZeRO-3 to llm3d and pp2"),
        pytest.param(
            DEEPSPEED | PP2 | {"zero_stage": 1},
            [ONE, DEEPSPEED | TP2 | {"zero_stage": 0}, DEEPSPEED | {"zero_stage": 3, "offload_optimizer": "cpu"}],
            id="DeepSpeed pp2 to others",
            marks=slow,
        ),
    ],
)
@pytest.mark.parametrize("name", ["tied", pytest.param("untied", marks=slow)])
def test_one_engine_goes_on_with_what_the_other_saved(
    pages: Path, tmp_path: Path, saved: dict[str, Any], loaded: list[dict[str, Any]], name: str
) -> None:
    run = {"sizes": saved, "name": name, "saves": {LOADED: tmp_path / "step"}}
    ranks = [rank[0] for rank in run_distributed(go_all, 2, pages, 2, [run])]
    before = {"content": content(tmp_path / "step"), "ranks": ranks, "name": name}
    for number, sizes in enumerate(loaded):
        again = tmp_path / str(number)
        next_run = {"sizes": sizes, "name": name, "resume": tmp_path / "step", "saved_again": again}
        after = [rank[0] for rank in run_distributed(go_all, 2, pages, 2, [next_run])]
        assert_goes_on(before, after, again)
