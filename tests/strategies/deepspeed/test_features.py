"""Runs on DeepSpeed's engine in 16 bits, with what its JSON can ask for."""

from __future__ import annotations

import csv
import functools
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.module import LLMModule
from tests.distributed import run_distributed
from tests.strategies.test_parity import MODELS
from tests.strategies.training import SMALL, loader, make_strategy, make_trainer, train

SGD = {"type": "SGD", "params": {"lr": 0.1}}
# Eight bits of mantissa: a gradient is off by up to 2^-9 of itself where llm3d's bf16-mixed reduces it in float32, and
# so are weights that are computed with. Losses are near 4.5, and a step moves them by less than 0.5.
LOSS_TOLERANCE = 2**-8
NORM_TOLERANCE = 2**-5


def fit(module: LLMModule, callback: Callback, settings: dict[str, Any], **arguments: Any) -> Any:
    strategy = make_strategy({"engine": "deepspeed", **settings})
    resume = arguments.pop("resume", None)
    arguments = {"gradient_clip_val": None, "limit_val_batches": 0, **arguments}
    trainer = make_trainer(strategy, 1, callbacks=[callback], **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(trainer, strategy), ckpt_path=resume)
    return trainer


# -- 16 bits --


class Overflows(LLMModule):
    """Whose loss is infinite in one batch."""

    def __init__(self, at: int | None) -> None:
        super().__init__(SMALL, learning_rate=5e-3)
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == self.at else loss


class Watcher(Callback):
    def __init__(self) -> None:
        self.scales: list[float] = []
        self.skipped: list[int] = []
        self.norms: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.scales.append(trainer.precision_plugin.loss_scale)
        self.skipped.append(trainer.precision_plugin.skipped_steps)
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))
        state = trainer.strategy.lightning_module_state_dict()
        parts = [piece.tensor.flatten() for pieces in state.values() for piece in pieces.pieces]
        self.weights.append(torch.cat(parts))


def in_float16(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    from lightning_llm.strategies.deepspeed.ops import import_deepspeed

    get_accelerator = import_deepspeed("cpu").accelerator.get_accelerator
    get_accelerator().is_fp16_supported = lambda: True  # this processor computes it, slowly
    scaled = {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    first, resumed, growing, fixed = (Watcher() for _ in range(4))
    trainer = fit(Overflows(at=2), first, {**settings, "config": {"fp16": scaled}}, precision="16-true", max_steps=6)
    trainer.save_checkpoint(folder)
    fit(
        Overflows(at=None),
        resumed,
        {**settings, "config": {"fp16": {**scaled, "initial_scale_power": 3}}},
        precision="16-true",
        max_steps=7,
        resume=folder,
    )
    for watcher, fp16 in ((growing, {**scaled, "loss_scale_window": 1}), (fixed, {"loss_scale": 256})):
        fit(
            Overflows(at=None),
            watcher,
            {**settings, "config": {"fp16": fp16, "optimizer": SGD}},
            precision="16-true",
            max_steps=5,
        )
    return {
        "scales": first.scales,
        "skipped": first.skipped,
        "global_step": trainer.global_step,
        "changes": [float((b - a).abs().max()) for a, b in zip(first.weights, first.weights[1:], strict=False)],
        "saved": Checkpoint.open(folder, alone=True).trainer_state()["DeepSpeedPrecision"],
        "resumed": resumed.scales,
        "growing": growing.scales,
        "norms": [(a, b) for a, b in zip(growing.norms, fixed.norms, strict=True)],
        "path": float((growing.weights[-1] - fixed.weights[-1]).norm()),
        "length": float((fixed.weights[-1] - fixed.weights[0]).norm()),
    }


def check_float16(settings: dict[str, Any], folder: Path) -> None:
    seen = run_distributed(in_float16, 1, settings, folder)[0]
    # Finite, finite, overflow, finite, finite, finite: halved once, doubled after two more.
    assert seen["scales"] == [256, 256, 128, 128, 128, 256]
    assert seen["skipped"] == [0, 0, 1, 1, 1, 1]
    assert seen["global_step"] == 6  # of batches that led to a step, done or left out, as with Lightning's own scaler
    assert seen["changes"][1] == 0.0
    assert all(change > 0 for index, change in enumerate(seen["changes"]) if index != 1)
    assert seen["saved"]["scale"] == 256
    assert seen["resumed"] == [256]  # and not the 8 that this run's configuration begins with
    # Steps at which the scale doubles are as long as others, with an optimizer that would show it.
    assert seen["growing"][-1] > 256
    assert all(abs(a / b - 1) < 0.01 for a, b in seen["norms"])
    assert seen["path"] < 0.02 * seen["length"]


def test_float16_leaves_out_steps_that_overflow(tmp_path: Path) -> None:
    check_float16({"zero_stage": 2}, tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": "cpu"}], ids=str
)
def test_float16_with_every_stage(settings: dict[str, Any], tmp_path: Path) -> None:
    check_float16(settings, tmp_path / "saved")


def in_sixteen_bits(settings: dict[str, Any], accumulate: int, precision: str) -> dict[str, Any]:
    from lightning_llm.strategies.deepspeed.ops import import_deepspeed, prepare_ops

    sent = set()
    run = functools.partial(train, 2, {"engine": "deepspeed", **settings}, accumulate=accumulate, max_steps=6)
    deepspeed = import_deepspeed("cpu")
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    prepare_ops([])  # or DeepSpeed compiles what it does not need
    comm = deepspeed.comm.comm
    deepspeed.init_distributed("gloo", dist_init_required=False)
    for name in ("all_reduce", "reduce_scatter_tensor", "all_to_all_single", "reduce"):
        original = getattr(comm.cdb, name)

        def recorded(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sent.update(str(tensor.dtype) for tensor in tensors if tensor.numel() > 100)
            return original(*args, **kwargs)

        setattr(comm.cdb, name, recorded)
    return {**run(precision=precision), "sent": sent}


def check_sixteen_bits(settings: dict[str, Any], accumulate: int = 1, precision: str = "bf16-mixed") -> set[str]:
    reference = run_distributed(functools.partial(train, max_steps=6, precision="bf16-mixed"), 1, 1, {})[0]
    ranks = run_distributed(in_sixteen_bits, 2, settings, accumulate, precision)
    for rank in ranks:
        losses = zip(rank["step_losses"], reference["step_losses"], strict=True)
        assert max(abs(a - b) for a, b in losses) < LOSS_TOLERANCE
        norms = zip(rank["step_norms"], reference["step_norms"], strict=True)
        assert max(abs(a / b - 1) for a, b in norms) < NORM_TOLERANCE
    return ranks[0]["sent"]


@pytest.mark.slow
def test_bfloat16_trains_like_the_other_engine() -> None:
    sent = check_sixteen_bits({"zero_stage": 3, "config": {"communication_data_type": "fp32"}}, accumulate=2)
    assert sent == {"torch.float32"}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 1, "pipeline_parallel_size": 2},
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
        # DeepSpeed takes another optimizer here, with gradients in a buffer of their own.
        {"zero_stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
        {"zero_stage": 1, "pipeline_parallel_size": 2, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    ],
    ids=str,
)
def test_bfloat16_in_every_layout(settings: dict[str, Any], accumulate: int) -> None:
    sent = check_sixteen_bits(settings, accumulate, "bf16-true")
    if "config" not in settings and "pipeline_parallel_size" not in settings:
        assert sent == {"torch.bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"zero_stage": 3}, {"zero_stage": 1, "pipeline_parallel_size": 2}], ids=str)
def test_float16_over_ranks(layout: dict[str, Any]) -> None:
    check_sixteen_bits({**layout, "config": {"fp16": {"initial_scale_power": 8}}}, 2, "16-true")


@pytest.mark.slow
def test_experts_are_offloaded() -> None:
    run = functools.partial(train, max_steps=6, config=MODELS["moe"])
    reference = run_distributed(run, 1, 1, {})[0]
    settings = {"engine": "deepspeed", "zero_stage": 2, "expert_parallel_size": 2, "offload_optimizer": "cpu"}
    for rank in run_distributed(run, 2, 2, settings):
        assert rank["step_losses"] == pytest.approx(reference["step_losses"], abs=1e-5)
        assert rank["step_norms"] == pytest.approx(reference["step_norms"], rel=1e-5)


# -- the JSON --


class Forwards(Callback):
    """Counts how often the blocks' MLPs run, and what they meet in the optimizer."""

    def __init__(self) -> None:
        self.forwards = 0
        self.rates: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]

        def count(*_: Any) -> None:
            self.forwards += 1

        for block in module.model.model.layers.values():
            block.mlp.register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        changes = [new - old for new, old in zip(module.parameters(), self.weights, strict=True)]
        self.change = float(torch.nn.utils.get_total_norm(changes))


class WithMomentum(LLMModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=7.0, momentum=0.5)


def with_everything(folder: Path) -> dict[str, Any]:
    config = {
        "zero_optimization": {"reduce_bucket_size": 12345, "overlap_comm": False},
        "gradient_clipping": 1e-6,
        "steps_per_print": None,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5, "momentum": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": 2,
                "warmup_type": "linear",
                "total_num_steps": "auto",
                "warmup_max_lr": "auto",
                "warmup_min_lr": "auto",
            },
        },
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(folder / "profile.txt")},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "sink"), "job_name": "run"},
    }
    forwards = Forwards()
    out = StringIO()
    with redirect_stdout(out):
        trainer = fit(
            WithMomentum(SMALL),
            forwards,
            {"zero_stage": 2, "recompute": "full", "config": config},
            max_steps=4,
            logger=CSVLogger(folder, name="logs"),
            log_every_n_steps=1,
        )
        engine = trainer.strategy.engine
    with pytest.raises(ConfigurationError, match="gradient_predivide_factor"):  # it says so, and that is passed on
        fit(LLMModule(SMALL), Forwards(), {"zero_stage": 2, "config": {"gradient_predivide_factor": 2.0}})
    return {
        "out": out.getvalue(),
        "forwards": forwards.forwards,
        "rates": forwards.rates,
        "momentum": engine.optimizer.param_groups[0]["momentum"],
        "change": forwards.change,
        "bucket": engine.optimizer.reduce_bucket_size,
    }


def test_what_the_json_asks_for(tmp_path: Path) -> None:
    seen = run_distributed(with_everything, 1, tmp_path)[0]
    assert seen["out"] == ""  # what DeepSpeed prints goes to logs
    assert seen["forwards"] == 4 * SMALL.num_hidden_layers * 2  # each block forward, and again in the backward
    assert seen["bucket"] == 12345
    assert seen["momentum"] == 0.5  # "auto": that of configure_optimizers()
    assert 0 < seen["change"] < 4 * 0.5 * 2 * 1e-6  # steps * rate * momentum * gradient_clipping
    assert seen["rates"] == pytest.approx([0.0, 0.25, 0.5, 0.25])  # after each step: the next one's
    with (tmp_path / "logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [row["deepspeed/Train/Samples/lr"] for row in rows if row["deepspeed/Train/Samples/lr"]]
    assert len(logged) == 4
    assert [row["deepspeed/Train/Samples/elapsed_time_ms_step"] != "" for row in rows].count(True) == 4
    (flops,) = (float(value) for row in rows if (value := row["deepspeed/flops_profiler/forward_flops"]))
    assert flops > 2 * 8 * 16 * 32 * 96  # the output layer alone: batch, sequence, width, words
    assert "fwd flops per GPU" in (tmp_path / "profile.txt").read_text()
    assert list((tmp_path / "sink/run").glob("*lr*.csv"))  # DeepSpeed's own sinks go on
