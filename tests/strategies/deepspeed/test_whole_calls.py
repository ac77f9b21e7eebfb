"""The engine sees one pass over the module in each step, though Lightning's steps call the module within the engine."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_llm import LLM3DDeepSpeedStrategy
from tests.distributed import run_distributed
from tests.strategies.training import loader, make_module, make_trainer

pytest.importorskip("deepspeed")


def fit_twice(zero_stage: int) -> dict[str, Any]:
    strategy = LLM3DDeepSpeedStrategy(
        zero_stage=zero_stage,  # type: ignore[arg-type]
        # Timers that DeepSpeed refuses to start twice.
        config={"wall_clock_breakdown": True, "steps_per_print": 1000},
    )
    trainer = make_trainer(strategy, 2, max_steps=3)
    module = make_module()
    hooks = []
    for steps in (3, 4):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
        hooks.append((len(module._forward_pre_hooks), len(module._forward_hooks)))
    coordinator = strategy.engine.optimizer.parameter_offload.param_coordinator if zero_stage == 3 else None
    return {
        "hooks": hooks,
        "steps": trainer.global_step,
        "knows_the_order": coordinator is None or coordinator.is_complete_trace(),
    }


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_engine_takes_a_step_for_one_pass(zero_stage: int) -> None:
    for seen in run_distributed(fit_twice, 2, zero_stage):
        assert seen["steps"] == 4
        assert seen["hooks"][0] == seen["hooks"][1], "a second run leaves no hooks of the first"
        assert seen["knows_the_order"], "ZeRO-3 gathers ahead once it has seen a whole pass"
