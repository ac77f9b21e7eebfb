"""The peer of `LLM3DStrategy` in train_overhead.py: the training loop that an engineer would write with torch alone.

No Trainer, no strategy, no callbacks. What cuts the model are the package's free functions, which are torch's
`parallelize_module` and `fully_shard` on a model; all else is torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.weights import load_weights
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.sharding import Sharding, apply_sharding, local_shard
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tensor import apply_tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both sides train with."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 10
    max_norm: float = 1.0
    fused: bool = True  # of the bare loop's AdamW: one kernel instead of a dozen DTensor operations per parameter
    accelerator: str = "cpu"
    precision: str = "32-true"  # or "bf16-mixed", which is `fully_shard`'s on both sides
    compile: bool = False


class BareLoop:
    """Trains a decoder on `(pipeline, data, tensor)` ranks.

    Args:
        config: The decoder.
        sizes: Ranks of the pipeline, data and tensor axes.
        recipe: Optimizer settings.
        loader: Batches of this rank: `{"input_ids": [batch, seq], "labels": [batch, seq]}`, every label counts.
    """

    def __init__(
        self,
        config: DecoderConfig,
        sizes: tuple[int, int, int],
        recipe: Recipe,
        loader: DataLoader,
    ) -> None:
        pipeline, data, tensor = sizes
        self.device = torch.device(recipe.accelerator)
        self.mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("pp", "dp", "tp"))
        if data > 1 and tensor > 1:
            self.mesh["dp", "tp"]._flatten()  # a norm over both axes is then one all-reduce
        self.loader = loader
        self.recipe = recipe
        self.loss_context: Callable[[], AbstractContextManager[None]] = loss_parallel if tensor > 1 else nullcontext
        with torch.device("meta"):
            self.model = Decoder(config)
        plan = plan_of(self.model)
        assert plan is not None
        self.stage = self.mesh["pp"].get_local_rank()
        self.is_first, self.is_last = self.stage == 0, self.stage == pipeline - 1
        if pipeline > 1:
            keep_stages(self.model, plan, [self.stage], split_units(plan, self.model, pipeline))
        if tensor > 1:
            apply_tensor_parallel(self.model, self.mesh["tp"], plan, sequence_parallel=True)
        if recipe.compile:
            for block in plan.units(self.model):
                block.compile()
        mixed = recipe.precision == "bf16-mixed"
        if data > 1 or mixed:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
            sharding = Sharding(mesh=self.mesh["dp"], reshard_after_forward=pipeline == 1, mp_policy=policy)
            apply_sharding(self.model, plan.units(self.model), sharding)
        self.model.to_empty(device=self.device)
        load_weights(self.model, RandomInit(config, seed=0), local=local_shard)

        self.parameters = list(self.model.parameters())
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=recipe.fused)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / recipe.warmup_steps)
        )
        self.schedule = self._schedule(pipeline) if pipeline > 1 else None
        self.batches = self._batches()

    def step(self) -> tuple[Tensor | None, Tensor]:
        """One optimizer step. Returns this data rank's loss, nats per token (None before the last stage), and the
        gradient norm over all axes.
        """
        batch = next(self.batches)
        inputs, labels = (batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "labels"))
        self.optimizer.zero_grad()
        loss: Tensor | None = None
        with self.loss_context():
            if self.schedule is None:
                loss = cross_entropy(self.model(inputs), labels)
                loss.backward()
            else:
                losses: list[Tensor] = []
                self.schedule.step(
                    *((inputs,) if self.is_first else ()),
                    target=labels if self.is_last else None,
                    losses=losses,
                    return_outputs=False,
                )
                loss = torch.stack([loss.detach() for loss in losses]).mean() if self.is_last else None
        norm = self._clip()
        self.optimizer.step()
        self.scheduler.step()
        return (loss if loss is None else loss.detach()), norm

    def _schedule(self, stages: int) -> Schedule1F1B:
        stage = PipelineStage(self.model, self.stage, stages, self.device, group=self.mesh["pp"].get_group())
        local_batch = self.loader.batch_size
        assert local_batch is not None
        count = schedule_kind("1F1B").choose_microbatches("auto", local_batch, stages)
        return Schedule1F1B(stage, count, loss_fn=cross_entropy)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def _clip(self) -> Tensor:
        """`clip_grad_norm_` over all axes: torch knows those of a stage, which are DTensors; stages are summed here."""
        for parameter in self.parameters:
            # Norms leave partial sums behind; every later operation on such a gradient would reduce it once more.
            gradient = parameter.grad
            if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
                if gradient.placements != parameter.placements:
                    parameter.grad = gradient.redistribute(placements=parameter.placements)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.schedule is not None:
            squares = norm**2
            dist.all_reduce(squares, group=self.mesh["pp"].get_group())
            norm = squares.sqrt()
        clip_grads_with_norm_(self.parameters, self.recipe.max_norm, norm)
        return norm


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens, nats; logits `[batch, seq, vocab]` may be split over the vocabulary."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    return loss.to_local() if isinstance(loss, DTensor) else loss
