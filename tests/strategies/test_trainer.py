"""What a Lightning user expects holds in three dimensions as in one process: logging, checkpoints, callbacks, loops."""

from __future__ import annotations

import csv
import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_llm import LLMModule, TokenDataModule
from lightning_llm.data.tokenize import tokenize
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.precision import PARAMETER_DTYPES
from tests.distributed import run_distributed
from tests.strategies.training import (
    BATCH_SIZE,
    SEQ_LEN,
    SMALL,
    VOCAB,
    Recorder,
    TokenRows,
    loader,
    make_module,
    make_strategy,
    make_trainer,
    on_deepspeed,
)

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Ranks, and how they share the work.
LAYOUTS = {
    "pp2 x tp2": (4, {**TP2, **PP2}),
    "DeepSpeed pp2 x tp2": (4, on_deepspeed(1, **TP2, **PP2)),
    "DeepSpeed ZeRO-3": (2, on_deepspeed(3)),
}
MARKS = {"DeepSpeed pp2 x tp2": pytest.mark.slow}
in_every_layout = pytest.mark.parametrize(
    ("world_size", "sizes"),
    [pytest.param(*layout, id=name, marks=MARKS.get(name, ())) for name, layout in LAYOUTS.items()],
)
TIED = SMALL.replace(tie_word_embeddings=True)
TOLERANCE = 1e-4


class Talkative(LLMModule):
    """Logs in the ways that users log."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        samples_differ = self.trainer.distributed_sampler_kwargs["num_replicas"] > 1  # tensor ranks all see the same
        self.log("twice", 2 * loss.detach(), on_step=True, on_epoch=True, sync_dist=samples_differ)
        self.log_dict({"index": float(batch_idx), "three": 3}, on_step=False, on_epoch=True, sync_dist=True)
        self.log("tokens", batch["labels"].numel(), reduce_fx="sum", sync_dist=True)
        if self.trainer.is_global_zero:
            self.log("of_rank_zero", float(batch_idx), rank_zero_only=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_squared", float(self.current_epoch**2))

    def on_validation_epoch_end(self) -> None:
        self.log("seen_at", float(self.global_step))


def user_run(world_size: int, sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two epochs of six batches, validated every three; then validate, test and predict from checkpoints."""
    strategy, recorder = make_strategy(sizes), Recorder()
    best = ModelCheckpoint(folder / "best", filename="{step}", monitor="val_loss", save_top_k=1)
    worst = ModelCheckpoint(folder / "worst", filename="{step}", monitor="val_loss", save_top_k=1, mode="max")
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[recorder, best, worst, LearningRateMonitor()],
        logger=CSVLogger(folder, name="logs", version=0),
        enable_checkpointing=True,
        max_steps=-1,
        max_epochs=2,
        limit_train_batches=6,
        limit_val_batches=2,
        limit_test_batches=2,
        val_check_interval=3,
        log_every_n_steps=2,
    )
    module = Talkative(TIED, learning_rate=5e-3, schedule="constant", warmup_steps=8)
    evaluated = loader(trainer, strategy, rows=24)
    trainer.fit(module, loader(trainer, strategy), evaluated)
    seen = {
        "losses": recorder.losses,
        "grad_norms": recorder.grad_norms,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "best": (best.best_model_path, float(best.best_model_score)),
        "worst": (worst.best_model_path, float(worst.best_model_score)),
    }
    seen["now"] = trainer.validate(module, evaluated, verbose=False)
    seen["best again"] = trainer.validate(module, evaluated, verbose=False, ckpt_path="best")
    seen["test"] = trainer.test(module, evaluated, verbose=False, ckpt_path="best")
    seen["worst again"] = trainer.validate(module, evaluated, verbose=False, ckpt_path=worst.best_model_path)
    seen["predicted"] = torch.cat(trainer.predict(module, evaluated))
    seen["samples"] = trainer.distributed_sampler_kwargs
    return seen


@dataclass
class Run:
    """What ranks saw, and where they wrote."""

    folder: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run by one process."""
    folder = tmp_path_factory.mktemp("one")
    return Run(folder, run_distributed(user_run, 1, 1, {}, folder))


@pytest.fixture(
    scope="module",
    params=[pytest.param(layout, id=name, marks=MARKS.get(name, ())) for name, layout in LAYOUTS.items()],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run by several."""
    world_size, sizes = request.param
    folder = tmp_path_factory.mktemp("several")
    return Run(folder, run_distributed(user_run, world_size, world_size, sizes, folder))


def test_all_ranks_see_the_metrics_of_one_process(reference: Run, run: Run) -> None:
    one = reference.ranks[0]
    assert one["global_step"] == 12 and one["epoch"] == 2 and len(one["losses"]) == 12
    names = {
        "train_loss",
        "val_loss",
        "twice",
        "twice_step",
        "twice_epoch",
        "three",
        "index",
        "seen_at",
        "epoch_squared",
    }
    assert names <= one["metrics"].keys()
    assert one["metrics"]["tokens"] == BATCH_SIZE * SEQ_LEN, "a sum is over samples, whoever shares the work on them"
    assert one["metrics"]["three"] == 3 and one["metrics"]["index"] == 2.5 and one["metrics"]["epoch_squared"] == 1
    for rank, seen in enumerate(run.ranks):
        assert (seen["global_step"], seen["epoch"]) == (12, 2)
        assert seen["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
        assert seen["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
        for kind in ("metrics", "logged"):
            expected = {name: value for name, value in one[kind].items() if rank == 0 or name != "of_rank_zero"}
            assert seen[kind] == pytest.approx(expected, abs=2 * TOLERANCE)
        assert seen["losses"] == run.ranks[0]["losses"], "not a bit of difference between ranks"


def test_checkpoints_are_of_the_same_steps_and_load_again(reference: Run, run: Run) -> None:
    one = reference.ranks[0]
    for name, step in (("best", 12), ("worst", 3)):
        assert Path(one[name][0]).name == f"step={step}.ckpt"
        for seen in run.ranks:
            path, score = seen[name]
            assert Path(path) == run.folder / name / f"step={step}.ckpt"
            assert score == pytest.approx(one[name][1], abs=TOLERANCE)
            assert seen[f"{name} again"][0]["val_loss"] == pytest.approx(score, abs=1e-6)
        assert [path.name for path in (run.folder / name).iterdir()] == [f"step={step}.ckpt"]
    for seen in (one, *run.ranks):
        assert seen["now"] == seen["best again"], "the last weights were the best ones"
        assert seen["worst again"][0]["val_loss"] > seen["now"][0]["val_loss"] + 0.1
        assert seen["test"][0]["test_loss"] == pytest.approx(one["now"][0]["val_loss"], abs=TOLERANCE)


def test_predictions_are_whole_and_those_of_one_process(reference: Run, run: Run) -> None:
    expected = reference.ranks[0]["predicted"]
    assert expected.shape == (3 * BATCH_SIZE, 16, VOCAB)
    for seen in run.ranks:
        assert type(seen["predicted"]) is Tensor
        own = expected[seen["samples"]["rank"] :: seen["samples"]["num_replicas"]]
        torch.testing.assert_close(seen["predicted"], own, atol=1e-3, rtol=0)


def predict(world_size: int, sizes: dict[str, Any]) -> list[Tensor]:
    strategy = make_strategy(sizes)
    trainer = make_trainer(strategy, world_size)
    return trainer.predict(make_module(), loader(trainer, strategy, rows=8))


@pytest.mark.parametrize("sizes", [TP2, slow(on_deepspeed(0, **TP2))], ids=["tp2", "DeepSpeed tp2"])
def test_predictions_are_whole_without_a_pipeline_too(sizes: dict[str, Any]) -> None:
    (expected,) = run_distributed(predict, 1, 1, {})[0]
    for (logits,) in run_distributed(predict, 2, 2, sizes):
        assert type(logits) is Tensor
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Of a run's log, without those that DeepSpeed's engine adds."""
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [
            {name: float(value) for name, value in row.items() if value and not name.startswith("deepspeed/")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() != {"step"}]


def test_the_log_is_that_of_one_process(reference: Run, run: Run) -> None:
    one, several = rows_of(reference.folder), rows_of(run.folder)
    fitting = [row["step"] for row in one if "val_loss" in row and row["step"] < 12]
    assert fitting == [2, 5, 8, 11], "the later ones are of trainer.validate()"
    assert [row["lr-AdamW/pg1"] for row in one if "lr-AdamW/pg1" in row] == pytest.approx(
        [5e-3 * min(1, step / 8) for step in (2, 4, 6, 8, 10, 12)]
    )
    assert sum("train_loss" in row for row in one) == 6
    assert len(several) == len(one)
    for row, expected in zip(several, one, strict=True):
        assert row == pytest.approx(expected, abs=2 * TOLERANCE, rel=1e-3)


class Steps(Callback):
    """Counts the batches that this rank trained on."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def decide(world_size: int, sizes: dict[str, Any]) -> list[bool]:
    """Decisions on which ranks differ, and sums of whole numbers."""
    strategy = make_strategy(sizes)
    trainer = make_trainer(strategy, world_size, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(), loader(trainer, strategy))
    last = strategy.global_rank == world_size - 1
    rank = trainer.distributed_sampler_kwargs["rank"]
    return [
        strategy.reduce_boolean_decision(last, all=False),
        strategy.reduce_boolean_decision(not last, all=True),
        strategy.reduce_boolean_decision(True, all=True),
        strategy.reduce_boolean_decision(False, all=False),
        int(strategy.reduce(torch.tensor(3 + rank), reduce_op="sum")),
        float(strategy.reduce(torch.tensor(3.0 + rank), reduce_op="mean")),
        int(strategy.reduce(torch.tensor(3 + rank), reduce_op="max")),
    ]


def test_ranks_agree_on_decisions_and_sums() -> None:
    assert run_distributed(decide, 4, 4, TP2) == [[True, False, True, False, 3 + 4, 3.5, 4]] * 4


def stop_early(world_size: int, sizes: dict[str, Any]) -> tuple[int, int, int]:
    strategy, steps = make_strategy(sizes), Steps()
    stopping = EarlyStopping("val_loss", mode="max", patience=2)  # the loss falls, so the third check is the last
    trainer = make_trainer(strategy, world_size, callbacks=[stopping, steps], val_check_interval=2)
    trainer.fit(make_module(), loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return trainer.global_step, steps.batches, stopping.wait_count


@in_every_layout
def test_early_stopping_stops_all_ranks_at_once(world_size: int, sizes: dict[str, Any]) -> None:
    assert run_distributed(stop_early, world_size, world_size, sizes) == [(6, 6, 2)] * world_size


class FastClock(Callback):
    """Has the clock of the first rank run ahead of the others' by a day, in the third step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.is_global_zero:
            (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
            timer.load_state_dict({"time_elapsed": {"train": 86400.0}})


def run_out_of_time(world_size: int, sizes: dict[str, Any]) -> int:
    strategy = make_strategy(sizes)
    trainer = make_trainer(
        strategy, world_size, callbacks=[FastClock()], max_steps=-1, max_time={"days": 1}, limit_val_batches=0
    )
    trainer.fit(make_module(schedule="constant"), loader(trainer, strategy))
    return trainer.global_step


@pytest.mark.parametrize("sizes", [PP2, on_deepspeed(3)], ids=["pp2", "DeepSpeed ZeRO-3"])
def test_the_time_is_up_for_all_ranks_at_once(sizes: dict[str, Any]) -> None:
    assert run_distributed(run_out_of_time, 2, 2, sizes) == [3, 3]


def in_precisions(world_size: int, sizes: dict[str, Any], names: list[str]) -> dict[str, Any]:
    seen = {}
    for name in names:
        strategy, recorder = make_strategy(sizes), Recorder()
        trainer = make_trainer(
            strategy, world_size, callbacks=[recorder], max_steps=4, val_check_interval=4, precision=name
        )
        module = make_module()
        trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
        with trainer.precision_plugin.forward_context():
            count = module.loss_denominator(torch.zeros(7, 143, dtype=torch.long))
        seen[name] = {
            "count": float(count),
            "losses": recorder.losses,
            "norms": recorder.grad_norms,
            "val_loss": float(trainer.callback_metrics["val_loss"]),
            "dtypes": {parameter.dtype for parameter in module.parameters()},
        }
    return seen


@pytest.mark.parametrize(
    ("world_size", "sizes", "limits"),
    [
        pytest.param(4, {**TP2, **PP2}, {"64-true": 1e-4, "bf16-mixed": 0.02, "bf16-true": 0.05}, id="pp2 x tp2"),
        pytest.param(2, on_deepspeed(1, **PP2), {"bf16-true": 0.02}, id="DeepSpeed pp2"),
    ],
)
def test_every_precision_trains_close_to_float32(
    world_size: int, sizes: dict[str, Any], limits: dict[str, float]
) -> None:
    expected = run_distributed(in_precisions, 1, 1, {}, ["32-true"])[0]["32-true"]
    for seen in run_distributed(in_precisions, world_size, world_size, sizes, list(limits)):
        for name, limit in limits.items():
            assert seen[name]["dtypes"] == {PARAMETER_DTYPES[name]}
            assert seen[name]["losses"] == pytest.approx(expected["losses"], abs=limit), name
            assert seen[name]["losses"] != expected["losses"]
            assert seen[name]["count"] == 7 * 143, "tokens are counted exactly"
            assert seen[name]["val_loss"] == pytest.approx(expected["val_loss"], abs=limit), name
            assert seen[name]["norms"] == pytest.approx(expected["norms"], rel=2 * limit), name


@pytest.mark.parametrize(
    ("sizes", "precision", "message"),
    [
        ({}, "16-true", r"precision='16-true' is not available here\. Use one of 64-true, 32-true"),
        (
            on_deepspeed(1),
            "64-true",
            r"precision='64-true' is not available on DeepSpeed's engine\. Use one of 32-true",
        ),
    ],
)
def test_a_precision_that_is_not_there_is_refused_at_once(sizes: dict[str, Any], precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_strategy(sizes), 1, precision=precision)


def fit_again(world_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Fit, validate, fit on, with one trainer and one module."""
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=4)
    module = make_module(schedule="constant")
    trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
    between = trainer.validate(module, loader(trainer, strategy, rows=16), verbose=False)[0]["val_loss"]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return {"losses": recorder.losses, "between": between, "global_step": trainer.global_step}


@functools.cache
def fitted_again() -> dict[str, Any]:
    return run_distributed(fit_again, 1, 1, {})[0]


@in_every_layout
def test_a_second_fit_goes_on(world_size: int, sizes: dict[str, Any]) -> None:
    one = fitted_again()
    assert one["global_step"] == 8 and len(one["losses"]) == 8 and one["losses"][4] < one["losses"][0] - 0.05
    for seen in run_distributed(fit_again, world_size, world_size, sizes):
        assert seen["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
        assert seen["between"] == pytest.approx(one["between"], abs=TOLERANCE)
        assert seen["global_step"] == 8


def use_twice(sizes: dict[str, Any]) -> None:
    module = make_module()
    for _ in range(2):
        strategy = make_strategy(sizes)
        trainer = make_trainer(strategy, 2, max_steps=1, limit_val_batches=0)
        trainer.fit(module, loader(trainer, strategy))


@pytest.mark.parametrize("sizes", [PP2, {}, on_deepspeed(3)], ids=["pp2", "dp2", "DeepSpeed ZeRO-3"])
def test_a_module_that_was_cut_is_not_cut_again(sizes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=r"This Decoder was cut into its parallel parts by an earlier Trainer"):
        run_distributed(use_twice, 2, sizes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    text = Path(sysconfig.get_path("stdlib")) / "json"
    tokenize([text], output, vocab_size=300, val_fraction=0.2, num_workers=1, progress=False)
    return output


def by_epochs(
    world_size: int, sizes: dict[str, Any], corpus: Path, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    recorder = Recorder()
    trainer = make_trainer(
        make_strategy(sizes), world_size, callbacks=[recorder], max_steps=-1, max_epochs=2, **(options or {})
    )
    module = make_module(SMALL.replace(vocab_size=300, max_position_embeddings=512))
    data = TokenDataModule(corpus, batch_size=8, seq_len=512)
    trainer.fit(module, datamodule=data)
    return {
        "losses": recorder.losses,
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "steps": (trainer.global_step, 2 * data.steps_per_epoch),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
    }


@functools.cache
def by_epochs_of_one_process(corpus: Path) -> dict[str, Any]:
    return run_distributed(by_epochs, 1, 1, {}, corpus)[0]


@pytest.mark.parametrize("sizes", [PP2, slow(on_deepspeed(0, **PP2))], ids=["pp2", "DeepSpeed pp2"])
def test_epochs_of_a_token_data_module_set_the_length_of_the_run(corpus: Path, sizes: dict[str, Any]) -> None:
    one = by_epochs_of_one_process(corpus)
    assert one["rate"] == pytest.approx(5e-4), "the schedule has reached its minimum"
    for seen in run_distributed(by_epochs, 2, 2, sizes, corpus):
        assert seen["steps"][0] == seen["steps"][1] == len(seen["losses"]) > 4
        assert seen["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
        assert seen["val_loss"] == pytest.approx(one["val_loss"], abs=TOLERANCE)
        assert seen["rate"] == one["rate"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
        ({"limit_train_batches": 0.5, "accumulate_grad_batches": 2}, None),
    ],
)
def test_limited_epochs_set_it_too(corpus: Path, options: dict[str, Any], steps: int | None) -> None:
    seen = run_distributed(by_epochs, 1, 1, {}, corpus, options)[0]
    assert seen["steps"][0] == steps or (steps is None and 2 < seen["steps"][0] < seen["steps"][1])
    assert seen["rate"] == pytest.approx(5e-4), "the schedule has reached its minimum"


def by_name(name: str) -> tuple[ParallelDims, list[float]]:
    recorder = Recorder()
    trainer = make_trainer(name, 2, callbacks=[recorder], max_steps=3, limit_val_batches=0)
    trainer.fit(make_module(), DataLoader(TokenRows(), batch_size=BATCH_SIZE // 2))
    return trainer.strategy.dims, recorder.losses


@pytest.mark.parametrize("name", ["llm3d", "llm3d_deepspeed"])
def test_the_strategy_by_name_chooses_sizes_that_fit(name: str) -> None:
    (dims, losses), (same, _) = run_distributed(by_name, 2, name)
    assert dims == same == ParallelDims(world_size=2, data_parallel_size=2), "a small model needs data ranks alone"
    one = fitted_again()["losses"]
    assert losses[0] == pytest.approx(one[0], abs=TOLERANCE)


def sharded_by_world_rank(sizes: dict[str, Any], loop: str) -> None:
    trainer = make_trainer(make_strategy(sizes), 2, max_steps=2, use_distributed_sampler=False, num_sanity_val_steps=0)
    rows = TokenRows(rows=16)
    wrong = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, 2, torch.distributed.get_rank()))
    if loop == "fit":
        trainer.fit(make_module(), wrong)
    else:
        getattr(trainer, loop)(make_module(), wrong, verbose=False)


@pytest.mark.parametrize(
    ("sizes", "loop"), [(TP2, "fit"), (TP2, "validate"), (PP2, "fit"), (PP2, "test"), (on_deepspeed(0, **PP2), "fit")]
)
def test_a_loader_that_shards_by_world_rank_is_refused(sizes: dict[str, Any], loop: str) -> None:
    message = r"Ranks 0 and 1 work on the same samples \(data coordinate 0\) but were handed different batches\..*"
    with pytest.raises(AssertionError, match=message + r"trainer\.distributed_sampler_kwargs"):
        run_distributed(sharded_by_world_rank, 2, sizes, loop)


class OddRows(TokenRows):
    """Sequences of 15 tokens."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[:15] for name, values in super().__getitem__(index).items()}


def with_odd_sequences(sizes: dict[str, Any]) -> list[float]:
    recorder = Recorder()
    trainer = make_trainer(make_strategy(sizes), 2, callbacks=[recorder], max_steps=1)
    trainer.fit(make_module(), DataLoader(OddRows(), batch_size=8), DataLoader(OddRows(rows=16), batch_size=8))
    return recorder.losses


def test_sequences_that_do_not_divide_are_refused_before_the_sanity_check() -> None:
    with pytest.raises(AssertionError, match=r"sequence length\(15\) is not divisible by tensor_parallel_size\(2\)"):
        run_distributed(with_odd_sequences, 2, TP2)
    for sizes in ({**TP2, "sequence_parallel": False}, on_deepspeed(0, **TP2)):
        assert len(run_distributed(with_odd_sequences, 2, sizes)[0]) == 1, "as the message says"


def with_ragged_loaders(world_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=4)
    trainer.fit(make_module(), loader(trainer, strategy, rows=17), loader(trainer, strategy, rows=9))
    return {"losses": recorder.losses, "val_loss": float(trainer.callback_metrics["val_loss"])}


@pytest.mark.parametrize("sizes", [PP2, slow(on_deepspeed(1, **PP2))], ids=["pp2", "DeepSpeed pp2"])
def test_a_smaller_last_batch_does_not_end_a_pipelines_run(sizes: dict[str, Any]) -> None:
    one = run_distributed(with_ragged_loaders, 1, 1, {})[0]
    for seen in run_distributed(with_ragged_loaders, 2, 2, sizes):
        assert seen["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
        assert seen["val_loss"] == pytest.approx(one["val_loss"], abs=TOLERANCE)
