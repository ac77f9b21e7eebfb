"""The same run in every layout: one loss curve, one gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_llm import DecoderConfig, LLM3DStrategy
from tests.distributed import full, run_distributed, run_on_gpu
from tests.strategies.training import (
    BATCH_SIZE,
    SMALL,
    Recorder,
    TokenRows,
    loader,
    make_module,
    make_trainer,
    on_deepspeed,
    skip_unless_built,
    train,
)

STEPS = 10
MODELS = {
    "plain": SMALL,
    "tied": SMALL.replace(tie_word_embeddings=True),
    "biases": SMALL.replace(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "qk_norm": SMALL.replace(qk_norm=True, model_type="qwen3"),
    "moe": SMALL.replace(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, router_aux_loss_coef=0.05, model_type="mixtral"
    ),
    # Sigmoid scores, biased choice, a shared expert, and a first layer without experts.
    "shared": SMALL.replace(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        scoring_func="sigmoid",
        use_routing_bias=True,
        first_k_dense_replace=1,
        qk_norm=True,
        model_type="dots1",
    ),
    "whole_norm": SMALL.replace(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        qk_norm=True,
        qk_norm_whole=True,
        model_type="olmoe",
    ),
}
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
EP4 = {"expert_parallel_size": 4}
WHOLE_SEQUENCE = {"sequence_parallel": False}


def by(schedule: str) -> dict[str, Any]:
    return {**PP2, "pipeline_schedule": schedule}


@dataclass(frozen=True)
class Layout:
    """A row of the table: sizes and settings of the strategy, and of the run."""

    name: str
    world_size: int
    strategy: dict[str, Any]
    model: str = "plain"
    accumulate: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    core: bool = False  # its gradients are compared in float64 in every run of the tests, the others' in the slow ones
    slow: bool = False

    def __str__(self) -> str:
        engine = {"deepspeed": "DeepSpeed"}.get(self.strategy.get("engine", ""), "")
        parts = [f"{engine} {self.name}".strip(), "" if self.model == "plain" else self.model]
        return ", ".join([*filter(None, parts), *([f"accumulate {self.accumulate}"] if self.accumulate > 1 else [])])


BY_VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
UNCLIPPED = {"gradient_clip_val": None}
LAYOUTS = [
    # One axis.
    Layout("dp2", 2, {}, core=True),
    Layout("dp2 ZeRO-0", 2, {"zero_stage": 0}, "tied"),
    Layout("dp2 ZeRO-1", 2, {"zero_stage": 1}, accumulate=2, core=True),
    Layout("dp2 ZeRO-2", 2, {"zero_stage": 2, "recompute": "full"}, accumulate=2, trainer=BY_VALUE),
    Layout("dp4 as replicate2 x shard2", 4, {"replicate_size": 2, "zero_stage": 2}, accumulate=2, core=True),
    Layout("dp2 offloaded", 2, {"offload_parameters": "cpu"}),
    Layout("tp2", 2, TP2, "biases"),
    Layout("tp2 whole sequence", 2, {**TP2, **WHOLE_SEQUENCE, "recompute": 2}, "tied"),
    Layout("cp2 allgather", 2, {**CP2, "recompute": "selective"}, core=True),
    Layout("cp2 ulysses", 2, {**CP2, "context_parallel_method": "ulysses"}, "qk_norm"),
    Layout("cp2 ring", 2, {**CP2, "context_parallel_method": "ring"}, accumulate=2),
    # Every schedule.
    Layout("pp2 GPipe", 2, by("GPipe"), trainer=BY_VALUE),
    Layout("pp2 1F1B", 2, by("1F1B"), "tied", accumulate=2, core=True),
    Layout("pp2 Interleaved1F1B", 2, {**by("Interleaved1F1B"), "recompute": "full"}, core=True),
    Layout("pp2 LoopedBFS", 2, by("LoopedBFS"), trainer=UNCLIPPED),
    Layout("pp2 InterleavedZeroBubble", 2, by("InterleavedZeroBubble"), "biases", core=True),
    Layout("pp2 ZBVZeroBubble", 2, by("ZBVZeroBubble"), "tied", core=True),
    Layout("pp2 DualPipeV", 2, by("DualPipeV"), "tied"),
    Layout("pp4", 4, {"pipeline_parallel_size": 4, "pipeline_split": [1, 1, 1, 1]}, "tied"),
    # Axes together.
    Layout("dp2 x tp2", 4, TP2, "qk_norm", core=True),
    Layout("pp2 x dp2", 4, {**PP2, "zero_stage": 1}, accumulate=2),
    Layout("cp2 x tp2", 4, {**CP2, **TP2}),
    Layout("pp2 x tp2 whole sequence", 4, {**TP2, **PP2, **WHOLE_SEQUENCE}, "tied"),
    Layout("pp2 x dp2 x tp2", 8, {**by("Interleaved1F1B"), **TP2}, "tied", accumulate=2, core=True),
    Layout("pp2 x cp2 x tp2", 8, {**by("ZBVZeroBubble"), **CP2, **TP2}, "tied", slow=True),
    # Mixtures of experts.
    Layout("dp2", 2, {}, "moe"),
    Layout("dp2 x ep2", 2, {**EP2, "recompute": "full"}, "moe", core=True),
    Layout("tp2 x ep2", 2, {**TP2, **EP2}, "whole_norm"),
    Layout("dp2 x tp2 x ep4", 4, {**TP2, **EP4}, "shared", core=True),
    Layout("cp2 x dp2 x ep4, ZeRO-0", 4, {**CP2, **EP4, "zero_stage": 0}, "shared"),
    Layout("pp2 x dp2 x ep2", 4, {**by("ZBVZeroBubble"), **EP2}, "moe", core=True),
    Layout("pp2 x dp2 x tp2 x ep4", 8, {**by("Interleaved1F1B"), **TP2, **EP4}, "shared", slow=True),
    Layout("replicate2 x tp2 x ep2", 4, {**TP2, **EP2, **WHOLE_SEQUENCE, "replicate_size": 2}, "shared"),
]
OFFLOADED = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
# The buffers on the way to a disk are made for large models: half a gigabyte each.
NVME = {
    "offload_optimizer": "nvme",
    "offload_parameters": "nvme",
    "config": {"zero_optimization": {"offload_param": {"buffer_size": 100_000}}},
}
LAYOUTS += [
    Layout("one process ZeRO-3", 1, on_deepspeed(3), trainer=UNCLIPPED, slow=True),
    Layout("dp2 ZeRO-0", 2, on_deepspeed(0), "tied", slow=True),
    Layout("dp2 ZeRO-1", 2, on_deepspeed(1), accumulate=2),
    Layout("dp2 ZeRO-2", 2, on_deepspeed(2, recompute="full"), "tied", accumulate=2),
    Layout("dp2 ZeRO-3", 2, on_deepspeed(3), "tied", accumulate=2),
    Layout("dp4 ZeRO-3 as replicate2 x shard2", 4, on_deepspeed(3, replicate_size=2), slow=True),
    Layout("replicate2 x cp2 ZeRO-3", 4, on_deepspeed(3, **CP2, replicate_size=2), slow=True),
    Layout("replicate2 x shard2 x tp2 ZeRO-3", 8, on_deepspeed(3, **TP2, replicate_size=2), "tied", slow=True),
    Layout("dp2 ZeRO-1 offloaded", 2, on_deepspeed(1, offload_optimizer="cpu"), slow=True),
    Layout("dp2 ZeRO-3 offloaded", 2, on_deepspeed(3, **OFFLOADED)),
    Layout("dp2 ZeRO-3 on a disk", 2, on_deepspeed(3, **NVME), slow=True),
    Layout("tp2 ZeRO-0", 2, on_deepspeed(0, **TP2), "biases", trainer=UNCLIPPED),
    Layout("dp2 x tp2 ZeRO-2", 4, on_deepspeed(2, **TP2), "qk_norm", slow=True),
    Layout("dp2 x tp2 ZeRO-3", 4, on_deepspeed(3, **TP2), "tied", slow=True),
    Layout("cp2 ZeRO-2", 2, on_deepspeed(2, **CP2), trainer=UNCLIPPED),
    Layout("cp2 ulysses ZeRO-3", 2, on_deepspeed(3, **CP2, context_parallel_method="ulysses"), "qk_norm", slow=True),
    Layout("cp2 ring x tp2 ZeRO-1", 4, on_deepspeed(1, **CP2, **TP2, context_parallel_method="ring"), slow=True),
    Layout("pp2 ZeRO-0", 2, on_deepspeed(0, **PP2), trainer=UNCLIPPED, slow=True),
    Layout("pp2 ZeRO-1", 2, on_deepspeed(1, **PP2), "tied", accumulate=2),
    Layout("pp2 x dp2 ZeRO-1", 4, on_deepspeed(1, **PP2), "biases", slow=True),
    Layout("pp2 x cp2 ZeRO-0", 4, on_deepspeed(0, **PP2, **CP2), "tied", slow=True),
    Layout("pp2 x dp2 x tp2 ZeRO-1", 8, on_deepspeed(1, **PP2, **TP2), "tied"),
    Layout("dp2 ZeRO-3", 2, on_deepspeed(3), "moe", slow=True),
    Layout("dp2 x ep2 ZeRO-2", 2, on_deepspeed(2, **EP2, recompute="full"), "moe"),
    Layout("dp4 x ep2 ZeRO-1", 4, on_deepspeed(1, **EP2), "shared", slow=True),
    Layout("cp2 x dp2 x ep4 ZeRO-0", 4, on_deepspeed(0, **CP2, **EP4), "shared", slow=True),
]


def rows(layouts: list[Layout], marked: Callable[[Layout], bool]) -> list[Any]:
    return [pytest.param(row, id=str(row), marks=pytest.mark.slow if marked(row) else ()) for row in layouts]


@functools.cache
def curve_of_one_process(model: str, clipping: str) -> dict[str, Any]:
    """By the strategy's own path for one process; `test_lightnings_own_strategy...` compares it with another's."""
    trainer = {"": {}, "value": BY_VALUE, "none": UNCLIPPED}[clipping]
    return run_distributed(functools.partial(train, max_steps=STEPS, **trainer), 1, 1, {}, MODELS[model])[0]


@pytest.mark.parametrize("row", rows(LAYOUTS, lambda row: row.slow))
def test_loss_curve_is_that_of_one_process(row: Layout, tmp_path: Path) -> None:
    skip_unless_built(row.strategy)
    strategy = {**row.strategy, **({"nvme_path": tmp_path} if "nvme" in row.strategy.values() else {})}
    clipping = {"norm": "", "value": "value"}[row.trainer.get("gradient_clip_algorithm", "norm")]
    reference = curve_of_one_process(row.model, "none" if row.trainer == UNCLIPPED else clipping)
    assert reference["losses"][-1] < reference["losses"][0] - 0.2, "the reference must learn"
    run = functools.partial(train, max_steps=STEPS, **row.trainer)
    for seen in run_distributed(run, row.world_size, row.world_size, strategy, MODELS[row.model], row.accumulate):
        assert seen["step_losses"] == pytest.approx(reference["step_losses"], abs=1e-4)
        assert seen["step_norms"] == pytest.approx(reference["step_norms"], rel=2e-3)
        assert seen["metrics"]["val_loss"] == pytest.approx(reference["metrics"]["val_loss"], abs=1e-4)
        assert seen["global_step"] == STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        pytest.param("plain", {}, id="one GPU"),
        pytest.param("tied", {"recompute": "selective"}, id="tied, recomputed in part"),
        pytest.param("qk_norm", {"compile": True, "recompute": "full"}, id="compiled and recomputed"),
        pytest.param("plain", {"offload_parameters": "cpu"}, id="offloaded"),
        pytest.param("moe", {}, id="experts"),
        pytest.param("shared", {"recompute": "full"}, id="experts with a routing bias, recomputed"),
        pytest.param("plain", on_deepspeed(1), id="DeepSpeed ZeRO-1"),
        pytest.param("tied", on_deepspeed(3), id="DeepSpeed ZeRO-3, tied"),
    ],
)
def test_a_gpu_gives_the_curve_of_a_cpu(model: str, strategy: dict[str, Any]) -> None:
    """In float32, without TF32."""
    reference = curve_of_one_process(model, "")
    seen = run_on_gpu(functools.partial(train, max_steps=STEPS, accelerator="cuda"), 1, strategy, MODELS[model])
    assert seen["step_losses"] == pytest.approx(reference["step_losses"], abs=1e-4)
    assert seen["step_norms"] == pytest.approx(reference["step_norms"], rel=2e-3)
    assert seen["metrics"]["val_loss"] == pytest.approx(reference["metrics"]["val_loss"], abs=1e-4)


def train_with_ddp(world_size: int) -> list[float]:
    recorder = Recorder()
    trainer = make_trainer("ddp", world_size, callbacks=[recorder], max_steps=STEPS)
    rows = DataLoader(TokenRows(), batch_size=BATCH_SIZE // world_size)
    trainer.fit(make_module(), rows)
    return recorder.losses


def test_lightnings_own_strategy_gives_the_same_curve() -> None:
    expected = curve_of_one_process("plain", "")["losses"]
    for losses in run_distributed(train_with_ddp, 2, 2):
        assert losses == pytest.approx(expected, abs=1e-4)


class GradientsOfFirstStep(Callback):
    """Collects whole gradients, by parameter name, before they are clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = module.named_parameters()
            self.gradients = {name: full(p.grad).clone() for name, p in named if p.grad is not None}


def first_gradients(
    world_size: int,
    strategy_arguments: dict[str, Any],
    config: DecoderConfig,
    accumulate: int = 1,
    documents: bool = False,
) -> dict[str, Any]:
    strategy = LLM3DStrategy(**strategy_arguments)
    collected = GradientsOfFirstStep()
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[collected],
        max_steps=1,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    trainer.fit(make_module(config, warmup_steps=0), loader(trainer, strategy, accumulate, documents=documents))
    return collected.gradients


@functools.cache
def gradients_of_one_process(model: str) -> dict[str, torch.Tensor]:
    return run_distributed(first_gradients, 1, 1, {}, MODELS[model])[0]


IN_FLOAT64 = [row for row in LAYOUTS if "engine" not in row.strategy]  # which DeepSpeed's engine does not have


@pytest.mark.parametrize("row", rows(IN_FLOAT64, lambda row: not row.core))
def test_gradients_are_those_of_one_process(row: Layout) -> None:
    config = MODELS[row.model]
    reference = gradients_of_one_process(row.model)
    seen: dict[str, torch.Tensor] = {}
    world = row.world_size
    for gradients in run_distributed(first_gradients, world, world, row.strategy, config, row.accumulate):
        seen |= gradients
    tied_copy = {"model.lm_head.weight"} if config.tie_word_embeddings else set()
    assert seen.keys() - tied_copy == reference.keys()
    for name, gradient in seen.items():
        expected = reference["model.model.embed_tokens.weight" if name in tied_copy else name]
        assert expected.dtype == torch.float64
        assert (gradient - expected).norm() <= 1e-9 * expected.norm(), name


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        pytest.param(2, CP2, id="cp2 allgather"),
        pytest.param(2, {**CP2, "context_parallel_method": "ulysses"}, id="cp2 ulysses"),
        pytest.param(2, by("ZBVZeroBubble"), id="pp2"),
        pytest.param(8, {**by("Interleaved1F1B"), **CP2, **TP2}, id="pp2 x cp2 x tp2"),
    ],
)
def test_documents_are_kept_apart_in_every_layout(world_size: int, strategy: dict[str, Any]) -> None:
    reference = run_distributed(first_gradients, 1, 1, {}, SMALL, 1, True)[0]
    blind = gradients_of_one_process("plain")
    for gradients in run_distributed(first_gradients, world_size, world_size, strategy, SMALL, 1, True):
        for name, gradient in gradients.items():
            assert (gradient - reference[name]).norm() <= 1e-9 * reference[name].norm(), name
            assert (gradient - blind[name]).norm() > 1e-3 * blind[name].norm(), "the mask must matter"


def test_the_table_is_as_wide_as_it_says() -> None:
    for engine, rows_of_engine in (("fsdp2", 24), ("deepspeed", 20)):
        strategies = [row.strategy for row in LAYOUTS if row.strategy.get("engine", "fsdp2") == engine]
        assert len(strategies) >= rows_of_engine
        assert {strategy.get("zero_stage", 3) for strategy in strategies} == {0, 1, 2, 3}
    assert sum(row.core for row in LAYOUTS) >= 12
    schedules = {row.strategy.get("pipeline_schedule") for row in LAYOUTS} - {None}
    assert len(schedules) == 7
