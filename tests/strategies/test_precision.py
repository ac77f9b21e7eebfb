"""Precisions: types, the loss scale, and runs in each of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.precision import COMPUTE_DTYPES, PARAMETER_DTYPES, LLMPrecision, LossScaler
from tests.distributed import run_distributed, run_on_gpu
from tests.strategies.training import Recorder, loader, make_module, make_strategy, make_trainer, on_deepspeed, train


@pytest.mark.parametrize("name", ["16-true", "transformer-engine", "fp8"])
def test_another_precision_is_refused_with_those_that_are_there(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"precision='{name}' is not available") as refused:
        LLMPrecision(name)
    assert all(available in str(refused.value) for available in PARAMETER_DTYPES)


@pytest.mark.parametrize(("name", "dtype"), PARAMETER_DTYPES.items())
def test_a_precision_decides_the_types(name: str, dtype: torch.dtype) -> None:
    plugin, linear = LLMPrecision(name), nn.Linear(2, 2)
    assert plugin.convert_module(linear).weight.dtype == dtype
    with plugin.module_init_context():
        assert nn.Linear(2, 2).weight.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    with plugin.forward_context():
        made = torch.ones(2)
        output = linear(made.to(dtype))
    assert made.dtype == dtype
    assert output.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    assert plugin.mp_policy.param_dtype == COMPUTE_DTYPES.get(name)


def test_the_loss_scale_follows_overflows() -> None:
    scaler = LossScaler(scale=8.0, growth_interval=3)
    scales = []
    for finite in (True, True, False, True, True, True, True):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [8, 8, 4, 4, 4, 8, 8]
    again = LossScaler()
    again.load_state_dict(scaler.state_dict())
    assert (again.scale, again.finite_steps) == (scaler.scale, scaler.finite_steps) == (8.0, 1)


def train_in(
    world_size: int,
    sizes: dict[str, Any],
    precision: str,
    scale: float = 2.0**16,
    accumulate: int = 1,
    steps: int = 6,
) -> dict[str, Any]:
    strategy, recorder = make_strategy(sizes), Recorder()
    plugin = type(strategy.precision_plugin)(
        precision
    )  # on a CPU Lightning itself would make "bf16-mixed" of "16-mixed"
    if plugin.scaler is not None:
        plugin.scaler.scale = scale
    trainer = make_trainer(
        strategy,
        world_size,
        plugins=[plugin],
        callbacks=[recorder],
        max_steps=steps,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(make_module(), loader(trainer, strategy, accumulate))
    return {
        "losses": recorder.step_losses,
        "norms": recorder.step_norms,
        "scale": plugin.loss_scale,
        "global_step": trainer.global_step,
    }


@functools.cache
def by_one_process(precision: str) -> dict[str, Any]:
    return run_distributed(train_in, 1, 1, {}, precision)[0]


LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (2, {"tensor_parallel_size": 2}, 1),
    (4, {"pipeline_parallel_size": 2, "zero_stage": 1}, 2),
    (4, {"context_parallel_size": 2, "zero_stage": 2, "recompute": "full"}, 2),
]


DEEPSPEED_LAYOUTS = [  # whose engine does not take float16 on CPUs
    (2, on_deepspeed(1), 2),
    (2, on_deepspeed(3), 1),
    (2, on_deepspeed(1, pipeline_parallel_size=2), 2),
]


@pytest.mark.parametrize(
    ("precision", "world_size", "sizes", "accumulate"),
    [
        *((precision, *layout) for precision in ("16-mixed", "bf16-mixed") for layout in LAYOUTS),
        *(("bf16-mixed", *layout) for layout in DEEPSPEED_LAYOUTS),
    ],
)
def test_mixed_precision_is_the_same_run_in_every_layout(
    precision: str, world_size: int, sizes: dict[str, Any], accumulate: int
) -> None:
    exact, one = by_one_process("32-true"), by_one_process(precision)
    assert one["losses"] != exact["losses"]
    assert one["losses"] == pytest.approx(exact["losses"], abs=0.02)
    for seen in run_distributed(train_in, world_size, world_size, sizes, precision, 2.0**16, accumulate):
        assert seen["losses"] == pytest.approx(one["losses"], abs=0.01)
        assert seen["norms"] == pytest.approx(one["norms"], rel=0.03)
        assert seen["scale"] == one["scale"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("precision", "strategy"),
    [("bf16-mixed", {}), ("bf16-mixed", {"compile": True}), ("16-mixed", {}), ("bf16-mixed", on_deepspeed(1))],
)
def test_mixed_precision_on_a_gpu_is_that_of_a_cpu(precision: str, strategy: dict[str, Any]) -> None:
    run = functools.partial(train, max_steps=6, accelerator="cuda", precision=precision, limit_val_batches=0)
    seen = run_on_gpu(run, 1, strategy)
    assert seen["step_losses"] != by_one_process("32-true")["losses"]
    assert seen["step_losses"] == pytest.approx(by_one_process(precision)["losses"], abs=0.02)


@pytest.mark.parametrize(("world_size", "sizes", "accumulate"), LAYOUTS)
def test_an_overflow_anywhere_leaves_the_step_out_everywhere(
    world_size: int, sizes: dict[str, Any], accumulate: int
) -> None:
    """A scale that float16 cannot hold: nothing is learnt until it has been halved often enough."""
    for seen in run_distributed(train_in, world_size, world_size, sizes, "16-mixed", 2.0**24, accumulate, 12):
        finite = [norm == norm and norm != float("inf") for norm in seen["norms"]]
        assert not finite[0] and finite[-1]
        assert seen["scale"] == 2.0**24 / 2 ** finite.count(False)
        assert seen["losses"][1] == pytest.approx(seen["losses"][0], abs=0.2), "nothing was learnt from an overflow"
        assert seen["global_step"] == 12


def test_deepspeeds_16_bits_need_zero() -> None:
    with pytest.raises(ConfigurationError, match=r"precision='bf16-mixed' with zero_stage=0: .* Set zero_stage=1: the"):
        make_trainer(make_strategy(on_deepspeed(0)), 1, precision="bf16-mixed")
