"""What DeepSpeed's configuration is made of, and which of its sections are refused; without an engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_llm import LLM3DDeepSpeedStrategy
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.adamw import CastingAdamW
from lightning_llm.models.muon import Muon
from lightning_llm.strategies.deepspeed import sections
from lightning_llm.strategies.deepspeed.ops import import_deepspeed
from lightning_llm.strategies.deepspeed.optimizers import check_optimizer, optimizer_of_config, scheduler_of_config
from lightning_llm.strategies.deepspeed.precision import DeepSpeedPrecision
from lightning_llm.strategies.deepspeed.sections import read_config
from lightning_llm.strategies.deepspeed.settings import check_by_deepspeed, engine_config
from lightning_llm.strategies.precision import LLMPrecision
from tests.commands import call_forked

# As `accelerate config` and Hugging Face's documentation write it.
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 3, "total_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": float("inf"),
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def forked(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where DeepSpeed may be imported: a process that has done so stays on CPUs."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        def within() -> int:
            import_deepspeed("cpu")
            test(*args, **kwargs)
            return 0

        done = call_forked(run=within, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def configuration(
    config: dict[str, Any] | None, clips: bool = False, precision: str = "bf16-mixed", **arguments: Any
) -> tuple[dict[str, Any], list[str]]:
    settings = LLM3DDeepSpeedStrategy(config=config, **arguments).settings
    return engine_config(settings, precision=precision, batch_size=4, secondary_shards=1, clips=clips, trains=True)


def test_a_configuration_of_hugging_face_is_taken_as_it_is() -> None:
    made, told = configuration(HUGGING_FACE)
    assert '"auto"' not in json.dumps(made)
    assert made["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_bucket_size": 2e8,
    }
    assert made["fp16"] == {
        "enabled": False,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert made["bf16"] == {"enabled": True}
    assert "optimizer" not in made and "scheduler" not in made
    assert made["gradient_clipping"] == 0.0  # not DeepSpeed's own default, which clips
    assert told == []  # nothing was said that another decides


def test_what_others_decide_is_told() -> None:
    config = {
        "train_batch_size": 512,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000},
        "tensor_parallel": {"autotp_size": 2},
        "pipeline": {"activation_checkpoint_interval": 1},
        "zero_optimisation": {},
    }
    made, told = configuration(config, clips=True, zero_stage=1)
    assert made["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert made["fp16"] == {"enabled": False, "initial_scale_power": 8}
    assert made["gradient_clipping"] == 0.0
    text = "\n".join(told)
    for said in (
        "train_batch_size is left out",
        "gradient_accumulation_steps=4 becomes 1",
        "gradient_clipping=1.0 becomes 0.0",
        "fp16.enabled=True becomes False",
        "zero_optimization.stage=3 becomes 1",
        "tensor_parallel is left out: that comes from tensor_parallel_size",
        "pipeline is left out",
        "zero_optimisation is no key of DeepSpeed's: did you mean zero_optimization?",
    ):
        assert said in text
    assert len(told) == 8
    made, told = configuration({"gradient_clipping": 1.0})
    assert made["gradient_clipping"] == 1.0 and told == []  # the Trainer says nothing


def test_old_names() -> None:
    config = {"bfloat16": {"enabled": True}, "zero_optimization": {"cpu_offload": True, "stage": 2}}
    assert read_config(config) == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    assert LLM3DDeepSpeedStrategy(config=config).settings.offload_optimizer == "cpu"


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert LLM3DDeepSpeedStrategy(config=path).settings.zero_stage == 1
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="no JSON"):
        LLM3DDeepSpeedStrategy(config=path)
    with pytest.raises(ConfigurationError, match="no such file"):
        LLM3DDeepSpeedStrategy(config=tmp_path / "other.json")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"data_efficiency": {"enabled": True}}, "DeepSpeed's own data loader"),
        ({"torch_autocast": {"enabled": True}}, "Trainer\\(precision"),
        ({"autotuning": {"enabled": True}}, "ends this process"),
        ({"hybrid_engine": {"enabled": True}}, "RLHF"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel_size"),
        ({"curriculum_learning": {"enabled": True}}, "removed"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size has been removed"),
        ({"managed_gradient_accumulation": False}, "accumulate_grad_batches"),
        ({"compile": {"deepcompile": True}}, "deepcompile"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "before the Trainer clips"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_offload"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "Set it to 1.0"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "8 bits"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "needs zero_stage=3"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "needs zero_stage=3"),
        ({"zero_optimization": 3}, "must be an object"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_at_once(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        LLM3DDeepSpeedStrategy(config=config)


@pytest.mark.parametrize("config", [{"wall_clock_breakdown": True}, {"flops_profiler": {"enabled": True}}], ids=str)
def test_what_a_pipeline_cannot_measure(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(config))):
        LLM3DDeepSpeedStrategy(pipeline_parallel_size=2, config=config)
    LLM3DDeepSpeedStrategy(config=config)


def test_what_is_switched_off_is_not_refused() -> None:
    config = {"data_efficiency": {"enabled": False}, "zero_optimization": {"zero_quantized_weights": False, "stage": 1}}
    assert LLM3DDeepSpeedStrategy(config=config).settings.zero_stage == 1


@forked
def test_deepspeed_reads_what_we_say_it_does() -> None:
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == sections.REMOVED
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) == sections.REMOVED_OF_ZERO
    # Each key that we take for known stands in quotes somewhere in what reads a configuration.
    sources = [path.read_text() for path in Path(config.__file__).parents[1].glob("**/*.py") if path.stat().st_size]
    for key in sections.KNOWN - {"data_types.param_dtype"}:
        assert any(f'"{key}"' in source or f"'{key}'" in source for source in sources), key

    # It reads what it is given before anything is built.
    check_by_deepspeed(configuration(HUGGING_FACE)[0], None)
    for given, reason in (
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, "reduce_bucket_sise"),
        ({"communication_data_type": "fp8"}, "communication_data_type"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            check_by_deepspeed(configuration(given)[0], None)


def test_sixteen_bits_need_zero() -> None:
    with pytest.raises(ConfigurationError, match="zero_stage=1"):
        Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, strategy=LLM3DDeepSpeedStrategy(zero_stage=0))
    Trainer(accelerator="cpu", precision="32-true", logger=False, strategy=LLM3DDeepSpeedStrategy(zero_stage=0))


# -- optimizers and schedules --


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(2), requires_grad=False)]


def test_the_optimizer_of_the_json(parameters: list[nn.Parameter]) -> None:
    configured = torch.optim.AdamW(parameters, lr=0.25, betas=(0.5, 0.75), weight_decay=0.125)
    made = optimizer_of_config(HUGGING_FACE["optimizer"], configured, parameters)
    assert type(made) is torch.optim.AdamW
    assert made.param_groups[0] | {"params": 0} == configured.param_groups[0] | {"params": 0}
    assert made.param_groups[0]["params"] == parameters[:1]
    adam = optimizer_of_config({"type": "Adam", "params": {"adam_w_mode": False, "lr": 1e-4}}, None, parameters)
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["lr"] == 1e-4
    assert type(optimizer_of_config({"type": "Adam"}, None, parameters)) is torch.optim.AdamW  # as in DeepSpeed
    with pytest.raises(ConfigurationError, match=r"params\.lr is 'auto'"):
        optimizer_of_config(HUGGING_FACE["optimizer"], None, parameters)
    with pytest.raises(ConfigurationError, match="OneBitAdam"):
        optimizer_of_config({"type": "OneBitAdam"}, None, parameters)
    with pytest.raises(ConfigurationError, match="freeze_step"):
        optimizer_of_config({"type": "AdamW", "params": {"freeze_step": 3}}, None, parameters)


@forked
def test_the_schedule_of_the_json(parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=10)
    made = scheduler_of_config(HUGGING_FACE["scheduler"], optimizer, trainer)
    assert made.interval == "step"
    scheduler: Any = made.scheduler
    assert (scheduler.total_num_steps, scheduler.max_lrs, scheduler.min_lrs) == (10, [0.5], [0.0])
    made = scheduler_of_config({"type": "StepLR", "params": {"step_size": 3}}, optimizer, trainer)
    assert type(made.scheduler) is torch.optim.lr_scheduler.StepLR
    for section, reason in (
        ({"type": "Unheard"}, "Unheard"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, "warmup_num_steps is 'auto'"),
        ({"type": "WarmupLR", "params": {"steps": 3}}, "steps"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            scheduler_of_config(section, optimizer, trainer)


def test_optimizers_of_whole_matrices(parameters: list[nn.Parameter], recwarn: pytest.WarningsRecorder) -> None:
    for optimizer in (Muon([parameters[0]]), torch.optim.Muon([parameters[0]]), torch.optim.Adafactor(parameters)):
        with pytest.raises(ConfigurationError, match="flat ranges"):
            check_optimizer(optimizer, 1, 1)
        with pytest.raises(ConfigurationError, match="tensor_parallel_size to 1"):
            check_optimizer(optimizer, 0, 2)
        check_optimizer(optimizer, 0, 1)
    for optimizer in (torch.optim.AdamW(parameters), torch.optim.SGD(parameters), CastingAdamW(parameters)):
        check_optimizer(optimizer, 3, 2)
    assert not recwarn.list

    class Lamb(torch.optim.Optimizer):
        pass

    with pytest.warns(UserWarning, match="flat ranges"):
        check_optimizer(Lamb(parameters, {}), 3, 1)


# -- the loss scale --


def engine_with_scaler(**arguments: Any) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    defaults = {"init_scale": 2.0**8, "scale_window": 4, "min_scale": 1, "delayed_shift": 2}
    scaler = DynamicLossScaler(**{**defaults, "consecutive_hysteresis": False, **arguments})
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


@forked
def test_the_loss_scale_goes_on_where_it_was() -> None:
    for finite in (0, 1, 3, 4, 5, 9):
        one, two = DeepSpeedPrecision("16-true"), DeepSpeedPrecision("16-true")
        one.engine, two.engine = engine_with_scaler(), engine_with_scaler(init_scale=2.0)
        for _ in range(finite):
            one.engine.optimizer.loss_scaler.update_scale(False)
        two.load_state_dict(one.state_dict())
        assert one.state_dict()["finite_steps"] <= 4
        for _ in range(12):
            scales = []
            for precision in (one, two):
                precision.engine.optimizer.loss_scaler.update_scale(False)
                scales.append(precision.engine.optimizer.loss_scaler.cur_scale)
            assert scales[0] == scales[1]

    # And where the other engine left it.
    ours, deepspeeds = LLMPrecision("16-mixed"), DeepSpeedPrecision("16-mixed")
    deepspeeds.engine = engine_with_scaler()
    assert ours.scaler is not None
    ours.scaler.scale, ours.scaler.finite_steps = 32.0, 3
    deepspeeds.on_load_checkpoint({"LLMPrecision": ours.state_dict()})
    assert deepspeeds.state_dict() == {"scale": 32.0, "finite_steps": 3, "hysteresis": 2}
    deepspeeds.engine.optimizer.loss_scaler.cur_scale = 64.0
    ours.on_load_checkpoint({"DeepSpeedPrecision": deepspeeds.state_dict()})
    assert (ours.scaler.scale, ours.scaler.finite_steps) == (64.0, 3)
