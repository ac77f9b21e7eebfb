"""A pipeline on DeepSpeed's engine: its PipelineModule and its 1F1B schedule, a batch of the Trainer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.mesh import Meshes
from lightning_llm.strategies.pipeline import fill_up, share_loss, share_output, split

LossFunction = Callable[[Tensor, Tensor], Tensor]

SCHEDULE = "1F1B"


class Stage(nn.Module):
    """What a rank has of the model, called as DeepSpeed's pipeline calls a layer: with one argument.

    Args:
        module: Token ids or hidden states in, hidden states or logits out.
        last: Whether it has the output.
    """

    def __init__(self, module: nn.Module, last: bool) -> None:
        super().__init__()
        self.module = module
        self.last = last
        self.keywords: tuple[str, ...] = ()

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """`x` or `(x, *values of the keywords)` -> the same for the stage behind."""
        x, *values = inputs if isinstance(inputs, tuple) else (inputs,)
        output = self.module(x, **dict(zip(self.keywords, values, strict=True)))
        return output if self.last or not values else (output, *values)


def pipeline_module(model: nn.Module, meshes: Meshes, tied: list[tuple[nn.Parameter, dist.ProcessGroup]]) -> Any:
    """DeepSpeed's PipelineModule of a model that is cut: a layer for each stage, of which this rank builds its own.

    Args:
        model: This rank's stage.
        meshes: The process groups.
        tied: Parameters that another stage has a copy of, with the group whose gradients are summed.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class Stages(PipelineModule):
        """With tied parameters that are found in the model, instead of modules that are built twice."""

        def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
            return tied

    dims = meshes.dims
    stages = dims.pipeline_parallel_size
    topology = PipeModelDataParallelTopology(
        num_pp=stages,
        num_dp=dims.data_parallel_size * dims.context_parallel_size,
        num_mp=dims.tensor_parallel_size,
    )
    specs = [LayerSpec(Stage, model, stage == stages - 1) for stage in range(stages)]
    return Stages(specs, topology=topology, partition_method="uniform")


class EnginePipeline:
    """Runs batches of the Trainer through DeepSpeed's pipeline engine.

    Args:
        engine: A `PipelineEngine`.
        meshes: The process groups.
        device: Of this rank.
        microbatches: Number of microbatches per batch, or "auto".
    """

    def __init__(self, engine: Any, meshes: Meshes, device: torch.device, microbatches: int | str) -> None:
        self.engine = engine
        self.kind = schedule_kind(SCHEDULE)
        self.group = meshes.pipeline.get_group()
        self.num_ranks = meshes.pipeline.size()
        self.device = device
        self.microbatches = microbatches
        self.last_of_step = True  # whether gradients are reduced behind the next batch
        self._count: int | None = None
        self._form: Any = None

    def run(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction, **keywords: Tensor) -> Tensor:
        """Forward of a whole batch, and backward when gradients are enabled. See `Pipeline.run`."""
        if not torch.is_grad_enabled():
            losses = self._evaluate(inputs, targets, keywords, loss_fn)
            return self._shared_loss(torch.stack(losses).sum() if losses else None)
        if self._count is None:
            self._count = self.kind.choose_microbatches(self.microbatches, inputs.shape[0], self.num_ranks, 1)
        inputs, targets, keywords = fill_up(inputs, targets, keywords, self._count)
        from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule

        left_out = {OptimizerStep} if self.last_of_step else {OptimizerStep, ReduceGrads, ReduceTiedGrads}
        schedule = TrainSchedule(micro_batches=self._count, stages=self.num_ranks, stage_id=self.engine.stage_id)
        self._prepare(inputs, targets, keywords, self._count, loss_fn)
        self.engine._compute_loss = True
        self.engine._exec_schedule(_Without(schedule, left_out))
        return self._shared_loss(self.engine.total_loss)

    def forward(self, inputs: Tensor, **keywords: Tensor) -> Tensor:
        """Forward alone: the output `[batch, seq, vocab]`, whole, on every rank."""
        outputs = self._evaluate(inputs, inputs, keywords, None)
        output = torch.cat(outputs) if self.engine.is_last_stage() else None
        return share_output(output, self.group, self.num_ranks - 1, self.device)

    def _shared_loss(self, loss: Tensor | None) -> Tensor:
        return share_loss(loss, self.group, self.num_ranks - 1, self.device)

    def _evaluate(
        self, inputs: Tensor, targets: Tensor, keywords: dict[str, Tensor], loss_fn: LossFunction | None
    ) -> list[Tensor]:
        """Of each microbatch, on the last stage, its loss or its output."""
        from deepspeed.runtime.pipe.schedule import InferenceSchedule

        count = min(self._count or 2 * self.num_ranks, inputs.shape[0])
        filled, targets, keywords = fill_up(inputs, targets, keywords, count)
        schedule = InferenceSchedule(micro_batches=count, stages=self.num_ranks, stage_id=self.engine.stage_id)
        self._prepare(filled, targets, keywords, count, loss_fn)
        self.engine._compute_loss = loss_fn is not None
        with torch.no_grad():
            self.engine._exec_schedule(schedule)
        found = list(self.engine.fwd_outputs)
        if loss_fn is None and found:
            found = list(torch.cat(found)[: inputs.shape[0]].split(1))
        return found

    def _prepare(
        self, inputs: Tensor, targets: Tensor, keywords: Mapping[str, Tensor], count: int, loss_fn: LossFunction | None
    ) -> None:
        microbatches = split(inputs, keywords, inputs.shape[0] // count)
        names = tuple(sorted(keywords))
        form = microbatches[0][0].shape, names, torch.is_grad_enabled()
        if form != self._form:
            self.engine.reset_activation_shape()
            self._form = form
        for stage in self.engine.module.children():
            if isinstance(stage, Stage):
                stage.keywords = names
        self.engine.module.loss_fn = loss_fn
        self.engine.total_loss = None  # to which the engine adds each microbatch's, or its output
        labels = targets.split(inputs.shape[0] // count)
        self.engine.set_dataiterator(iter(self._rows(microbatches, labels, names)))

    @staticmethod
    def _rows(microbatches: Any, labels: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, Tensor]]:
        for (inputs, keywords), label in zip(microbatches, labels, strict=True):
            yield (inputs, *(keywords[name] for name in names)) if names else inputs, label


class _Without:
    """A schedule without some of its instructions."""

    def __init__(self, schedule: Any, left_out: set[type]) -> None:
        self._schedule = schedule
        self._left_out = left_out

    def num_pipe_buffers(self) -> int:
        return self._schedule.num_pipe_buffers()

    def __iter__(self) -> Iterator[list[Any]]:
        for commands in self._schedule:
            yield [command for command in commands if type(command) not in self._left_out]
