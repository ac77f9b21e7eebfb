"""Pipeline parallelism: the layers are cut into stages, and microbatches run through them on a schedule.

llm3d.py cuts the model with `keep_stage` and hands the stage to a `Pipeline`, which runs forward and backward of a
whole batch in one call. Stages talk point to point; what flows is whatever a block returns.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.weights import WeightSource
from lightning_llm.strategies.mesh import divisors
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.tensor import to_plain

LossFunction = Callable[[Tensor, Tensor], Tensor]


def stage_units(num_units: int, num_stages: int) -> list[range]:
    """Which units each stage has: contiguous, sizes differ by at most one, the outer stages are the smaller ones.

    The first stage also has the embedding and the last one the output layer, so they get a layer less where counts
    differ.
    """
    small, longer = divmod(num_units, num_stages)
    by_load = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0))
    sizes = [small + (by_load.index(stage) < longer) for stage in range(num_stages)]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def keep_stage(model: nn.Module, plan: ParallelPlan, stage: int, num_stages: int) -> None:
    """Removes from `model` what other stages own. Names of what stays do not change."""
    units = model.get_submodule(plan.pipeline_units)
    keys = [name for name, _ in units.named_children()]
    kept = {keys[unit] for unit in stage_units(len(keys), num_stages)[stage]}
    for key in keys:
        if key not in kept:
            delattr(units, key)
    foreign = (plan.pipeline_first if stage > 0 else ()) + (plan.pipeline_last if stage < num_stages - 1 else ())
    for name in foreign:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, None)


def choose_microbatches(wanted: int | str, batch_size: int, num_stages: int, *, strict: bool = True) -> int:
    """Number of microbatches for a rank's batch: `wanted`, or for "auto" the smallest divisor from `2 * num_stages` up.

    1F1B idles `(stages - 1) / (microbatches + stages - 1)` of the time, so more are better until each is too small to
    keep the device busy (https://arxiv.org/abs/2104.04473, section 2.2).

    Args:
        wanted: A number, or "auto".
        batch_size: Sequences of one data rank.
        num_stages: Of the pipeline.
        strict: False takes what is nearest instead of refusing, for the smaller last batch of an epoch.

    Raises:
        ConfigurationError: The batch cannot be split so, or there are fewer microbatches than stages.
    """
    if wanted == "auto":
        enough = [count for count in divisors(batch_size) if count >= 2 * num_stages]
        count = enough[0] if enough else batch_size
    else:
        count = int(wanted)
    if not strict and (batch_size % count or count < num_stages):
        return max(divisor for divisor in divisors(batch_size) if divisor <= count)
    if batch_size < num_stages:
        raise ConfigurationError(
            f"Each data rank gets {batch_size} sequences per batch, fewer than the {num_stages} pipeline stages. Raise "
            f"the batch size so that each data rank gets at least {num_stages}, or use fewer stages."
        )
    if batch_size % count or count < num_stages:
        raise ConfigurationError(
            f"microbatches({count}) must divide the {batch_size} sequences that each data rank gets per batch, and be "
            f"at least the {num_stages} pipeline stages. "
            f"Choose microbatches from {[d for d in divisors(batch_size) if d >= num_stages]}."
        )
    return count


class Pipeline:
    """Runs batches through this rank's stage and its peers'.

    Args:
        stage_module: What `keep_stage` left: token ids or hidden states in, hidden states or logits out.
        mesh: The pipeline axis.
        device: Where the stage is.
        microbatches: Number of microbatches per batch, or "auto".
    """

    def __init__(
        self,
        stage_module: nn.Module,
        mesh: DeviceMesh,
        device: torch.device,
        microbatches: int | str = "auto",
    ) -> None:
        self.module = stage_module
        self.group = mesh.get_group()
        self.stage = mesh.get_local_rank()
        self.num_stages = mesh.size()
        self.device = device
        self.microbatches = microbatches
        # Point-to-point buffers are sized by the first batch, so each shape has a schedule of its own.
        self._schedules: dict[tuple[torch.Size, bool, bool], Schedule1F1B | ScheduleGPipe] = {}
        self._loss_fn: LossFunction | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is handed the token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the logits and the loss."""
        return self.stage == self.num_stages - 1

    def run(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Forward of a whole batch, and backward when gradients are enabled.

        Args:
            inputs: `[batch, seq]` token ids, the same on every stage.
            targets: `[batch, seq]` labels, the same on every stage.
            loss_fn: `(output, targets) -> scalar` of one microbatch; the batch's loss is the sum over microbatches.

        Returns:
            The loss, detached, on every stage.
        """
        training = torch.is_grad_enabled()
        schedule = self._schedule(inputs, training)
        self._loss_fn = loss_fn
        losses: list[Tensor] = []
        arguments = (inputs,) if self.is_first else ()
        keywords: dict[str, Any] = {"target": targets, "losses": losses} if self.is_last else {}
        if training:
            schedule.step(*arguments, return_outputs=False, **keywords)
        else:
            schedule.eval(*arguments, return_outputs=False, **keywords)  # logits of a whole batch would be kept
        return self._share_loss(torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Forward alone: the output `[batch, seq, vocab]`, whole, on every stage."""
        with torch.no_grad():
            output = self._schedule(inputs, training=False, with_loss=False).eval(*((inputs,) if self.is_first else ()))
        return self._share_output(to_plain(output) if self.is_last else None)

    def _schedule(self, inputs: Tensor, training: bool, with_loss: bool = True) -> Schedule1F1B | ScheduleGPipe:
        key = (inputs.shape, training, with_loss)
        if key not in self._schedules:
            stage = PipelineStage(self.module, self.stage, self.num_stages, self.device, group=self.group)
            # A loader's last batch may be smaller, which must not end the run; but the first one is as it was meant.
            first = training and not any(trained for _, trained, _ in self._schedules)
            count = choose_microbatches(self.microbatches, inputs.shape[0], self.num_stages, strict=first)
            kind = Schedule1F1B if count >= self.num_stages else ScheduleGPipe
            # The loss is already normalised over the whole batch: gradients of microbatches are summed, not averaged.
            loss_fn = self._loss if with_loss else None
            self._schedules[key] = kind(stage, count, loss_fn=loss_fn, scale_grads=False)
        return self._schedules[key]

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self._loss_fn is not None
        return to_plain(self._loss_fn(output, target))

    def _share_loss(self, loss: Tensor | None) -> Tensor:
        """Gives the last stage's loss to all stages, so that logging and callbacks see one value everywhere."""
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        shared = torch.zeros((), dtype=dtype, device=self.device) if loss is None else loss.to(dtype)
        dist.broadcast(shared, group=self.group, group_src=self.num_stages - 1)
        return shared

    def _share_output(self, output: Tensor | None) -> Tensor:
        """Gives the last stage's output to all stages, which do not know its shape."""
        described = [None if output is None else (output.shape, output.dtype)]
        dist.broadcast_object_list(described, group=self.group, group_src=self.num_stages - 1, device=self.device)
        assert described[0] is not None
        shape, dtype = described[0]
        shared = torch.empty(shape, dtype=dtype, device=self.device) if output is None else output.contiguous()
        dist.broadcast(shared, group=self.group, group_src=self.num_stages - 1)
        return shared


class AliasedSource:
    """A weight source in which the copy of a tied tensor is read under its owner's name."""

    def __init__(self, source: WeightSource, plan: ParallelPlan) -> None:
        self._source = source
        self._owner_of = {copy: owner for owner, copy in plan.tied}

    def read(self, name: str, box: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        return self._source.read(self._owner_of.get(name, name), box, shape)


def ends_group(dense_mesh: DeviceMesh, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """The group of the first and the last stage of this rank's pipeline; None on stages between. Collective.

    Args:
        dense_mesh: With the pipeline as its first axis.
        timeout: Of collectives within the group; None takes torch's default.
    """
    grid = dense_mesh.mesh.reshape(dense_mesh.shape[0], -1)
    mine = None
    for first, last in zip(grid[0].tolist(), grid[-1].tolist(), strict=True):
        group = dist.new_group([first, last], timeout=timeout)
        if dist.get_rank() in (first, last):
            mine = group
    return mine


def add_tied_gradients(model: nn.Module, plan: ParallelPlan, ends: dist.ProcessGroup | None) -> None:
    """Sums the gradients of tensors that are tied across the first and the last stage, on both.

    The copies start equal and get equal gradients, so that equal optimizer steps keep them equal (Megatron-LM's
    scheme).
    """
    if ends is None:
        return
    parameters = dict(model.named_parameters())
    for names in plan.tied:
        for parameter in (parameters[name] for name in names if name in parameters):
            gradient = parameter.grad
            assert gradient is not None, f"no gradient reached the tied tensor {names}"
            dist.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient, group=ends)
