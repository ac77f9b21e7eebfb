"""Pipeline parallelism: the layers are cut into stages, and microbatches run through them on a schedule.

schedules.py says which schedules there are, stages.py cuts the model; llm3d.py hands this rank's stages to a
`Pipeline`, which runs forward and backward of a whole batch in one call. Stages talk point to point; what flows between
them is whatever a block returns, a tensor or a tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.module import IGNORED
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.stages import follow_modes
from lightning_llm.strategies.tensor import to_plain

LossFunction = Callable[[Tensor, Tensor], Tensor]
Microbatch = tuple[Tensor, dict[str, Tensor]]  # what the first stage is called with, and keywords for every stage
Layout = tuple[torch.Size, torch.dtype]  # of a tensor between stages
Message = tuple[Sequence[Tensor], Sequence[dist.Work]]  # on its way

MAX_SCHEDULES = 8  # each holds buffers for the messages of a whole batch
MAX_LAYOUTS = 256

V = TypeVar("V")


class Pipeline:
    """Runs batches through this rank's stages and its peers'.

    Training is torch's schedule; its point-to-point buffers have one size, so there is a schedule for each shape of
    microbatch. The last `MAX_SCHEDULES` shapes are kept; another one costs the forward of one microbatch, to learn what
    the stages send each other. Pad to few sequence lengths. A batch that does not divide into microbatches (a loader's
    last) is filled up with rows whose labels do not count (-100).

    Evaluation is a forward pass of our own, the same for every schedule: torch's `eval` fails on V-shaped ones
    (torch 2.13), and all of them would hold another set of buffers.

    Args:
        stages: What `keep_stages` left: `{stage: module}` of this rank. The first stage takes the inputs, later ones
            what the one before returns; the last one returns the output.
        mesh: The pipeline axis.
        device: Where the stages are.
        schedule: See `schedules.py`.
        microbatches: Number of microbatches per batch, or "auto".

    Raises:
        ConfigurationError: The schedule does not exist or has other stages on this rank.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        mesh: DeviceMesh,
        device: torch.device,
        *,
        schedule: str = "1F1B",
        microbatches: int | str = "auto",
    ) -> None:
        self.stages = dict(sorted(stages.items()))
        self.kind = schedule_kind(schedule)
        self.group = mesh.get_group()
        self.num_ranks = mesh.size()
        self.stages_per_rank = self.kind.resolve_stages_per_rank(len(stages))
        self.num_stages = self.num_ranks * self.stages_per_rank
        self.device = device
        self.microbatches = microbatches
        self.loss_rank = self.kind.loss_rank(self.num_ranks)
        expected = self.kind.stage_ids(mesh.get_local_rank(), self.num_ranks, self.stages_per_rank)
        if tuple(self.stages) != expected:
            raise ConfigurationError(
                f"{self.kind.name} has the stages {expected} on pipeline rank {mesh.get_local_rank()} of "
                f"{self.num_ranks}, not {tuple(self.stages)}."
            )
        for stage, module in self.stages.items():
            if stage > 0:
                module.register_forward_pre_hook(lambda _module, inputs: tuple(map(_ContiguousGradient.apply, inputs)))
            if stage < self.num_stages - 1:
                module.register_forward_hook(lambda _module, _inputs, output: tree_map(_sendable, output))
        self._count: int | None = None
        self._schedules: _Recent[Any] = _Recent(MAX_SCHEDULES)
        self._layouts: _Recent[dict[int, list[Layout]]] = _Recent(MAX_LAYOUTS)
        self._loss_fn: LossFunction | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which is handed the inputs."""
        return 0 in self.stages

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, with the output and the loss."""
        return self.num_stages - 1 in self.stages

    def run(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction, **keywords: Tensor) -> Tensor:
        """Forward of a whole batch, and backward when gradients are enabled.

        Args:
            inputs: `[batch, seq]` token ids, the same on every rank of the pipeline.
            targets: `[batch, seq]` labels, the same on every rank of the pipeline.
            loss_fn: `(output, targets) -> scalar` of one microbatch; the batch's loss is the sum over microbatches, and
                labels of -100 add nothing to it.
            **keywords: `[batch, ...]`; every stage is called with its microbatch's rows of them (positions, ...).

        Returns:
            The loss, detached, on every rank.
        """
        follow_modes(self.stages.values())
        losses: list[Tensor] = []
        if torch.is_grad_enabled():
            self._train(inputs, targets, loss_fn, keywords, losses)
        else:
            rows = self._rows(inputs.shape[0])
            labels = targets.split(rows)
            self._evaluate(
                split(inputs, keywords, rows),
                lambda index, output: losses.append(to_plain(loss_fn(output, labels[index]))),
            )
        loss = torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None
        return share_loss(loss, self.group, self.loss_rank, self.device)

    def forward(self, inputs: Tensor, **keywords: Tensor) -> Tensor:
        """Forward alone: the output `[batch, seq, vocab]`, whole, on every rank."""
        follow_modes(self.stages.values())
        outputs: list[Tensor] = []
        with torch.no_grad():
            microbatches = split(inputs, keywords, self._rows(inputs.shape[0]))
            self._evaluate(microbatches, lambda _, output: outputs.append(to_plain(output)))
        return share_output(torch.cat(outputs) if self.is_last else None, self.group, self.loss_rank, self.device)

    # -- training --

    def _train(
        self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction, keywords: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        if self._count is None:  # the first batch is as it was meant, and refused where it does not fit
            self._count = self.kind.choose_microbatches(
                self.microbatches, inputs.shape[0], self.num_ranks, self.stages_per_rank
            )
        inputs, targets, keywords = fill_up(inputs, targets, keywords, self._count)
        inputs = inputs.contiguous()  # as the examples are: torch 2.11 compares strides, and whole shapes
        first = split(inputs, keywords, inputs.shape[0] // self._count)[0]
        is_new = self._key(first) not in self._schedules
        schedule = self._schedules.lookup(self._key(first), lambda: self._schedule(first))
        self._loss_fn = loss_fn
        arguments = (inputs,) if self.is_first else ()
        to_loss: dict[str, Any] = {"target": targets, "losses": losses} if self.is_last else {}
        with _gradients_apart(self.stages.values()) if is_new else nullcontext():
            schedule.step(*arguments, return_outputs=False, **to_loss, **keywords)

    def _schedule(self, microbatch: Microbatch) -> Any:
        layouts = self._layouts_of(microbatch)
        stages = [
            # With examples of what comes and goes, torch need not run forward and backward to find out.
            PipelineStage(
                module,
                stage,
                self.num_stages,
                self.device,
                input_args=tuple(_example(layout, stage > 0) for layout in layouts[stage]),
                output_args=tuple(_example(layout, True) for layout in layouts[stage + 1]),
                group=self.group,
            )
            for stage, module in self.stages.items()
        ]
        # The loss is already normalised over the whole batch: gradients of microbatches are summed, not averaged.
        make = get_schedule_class(self.kind.name)
        return make(stages if self.kind.multi_stage else stages[0], self._count, loss_fn=self._loss, scale_grads=False)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self._loss_fn is not None
        return _sendable(to_plain(self._loss_fn(output, target)))

    # -- evaluation --

    def _rows(self, batch_size: int) -> int:
        """Rows of a microbatch in evaluation, where any number of microbatches will do and the last may be smaller."""
        wanted = 2 * self.num_ranks if self.microbatches == "auto" else int(self.microbatches)
        return max(1, -(-batch_size // (self._count or wanted)))

    def _evaluate(self, microbatches: Sequence[Microbatch], use: Callable[[int, Any], None]) -> None:
        """Forward of all microbatches; the last stage's rank calls `use(index, output)` for each, in their order.

        All ranks walk through one order of the whole pipeline's work: the stages in turns of one a rank, in each turn
        the microbatches one after the other. A rank does what is its own, and where a peer is about to send to it,
        it posts the receive. So two ranks post their messages in the same order, and none waits for a later one.
        """
        layouts = [self._layouts_of(microbatch) for microbatch in microbatches]
        arriving: dict[tuple[int, int], Message] = {}
        leaving: list[Message] = []
        for turn in range(self.stages_per_rank):
            for index, (inputs, keywords) in enumerate(microbatches):
                for stage in range(turn * self.num_ranks, (turn + 1) * self.num_ranks):
                    if stage in self.stages:
                        arrived = _wait(arriving.pop((stage, index))) if stage > 0 else (inputs,)
                        output = self.stages[stage](*arrived, **keywords)
                        if stage == self.num_stages - 1:
                            use(index, output)
                        elif stage + 1 in self.stages:
                            arriving[stage + 1, index] = _as_tuple(output, stage), []
                        else:
                            leaving.append(self._post(dist.isend, _as_tuple(output, stage), stage + 1))
                    elif stage + 1 in self.stages:
                        buffers = self._buffers(layouts[index][stage + 1])
                        arriving[stage + 1, index] = self._post(dist.irecv, buffers, stage)
        for message in leaving:
            _wait(message)
        self._reshard()

    def _post(self, operation: Callable[..., Any], tensors: Sequence[Tensor], stage: int) -> Message:
        """Begins to send tensors to, or to receive them from, the rank of a stage."""
        peer = self.kind.rank_of(stage, self.num_ranks)
        operations = [dist.P2POp(operation, tensor, group=self.group, group_peer=peer) for tensor in tensors]
        return tensors, dist.batch_isend_irecv(operations)

    # -- what stages send each other --

    def _layouts_of(self, microbatch: Microbatch) -> dict[int, list[Layout]]:
        return self._layouts.lookup(self._key(microbatch), lambda: self._probe(microbatch))

    def _key(self, microbatch: Microbatch) -> Hashable:
        """All that sizes and types of messages depend on."""
        inputs, keywords = microbatch
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in sorted(keywords.items())]
        autocast = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        return inputs.shape, inputs.dtype, tuple(shapes), autocast

    def _probe(self, microbatch: Microbatch) -> dict[int, list[Layout]]:
        """Runs one microbatch through all stages, to see what arrives at this rank's and leaves them.

        Returns:
            `{stage: what it is called with}`; what the last stage returns stands under the number of stages.
        """
        inputs, keywords = microbatch
        hidden: tuple[Tensor, ...] = (inputs,)
        layouts: dict[int, list[Layout]] = {}
        with torch.no_grad(), _without_a_trace(self.stages.values(), self.device):
            for stage in range(self.num_stages):
                if stage in self.stages:
                    layouts[stage] = [(tensor.shape, tensor.dtype) for tensor in hidden]
                    output = self.stages[stage](*hidden, **keywords)
                    hidden = _as_tuple(output, stage, may_be_split=stage == self.num_stages - 1)
                    layouts[stage + 1] = [(tensor.shape, tensor.dtype) for tensor in hidden]
                    if stage + 1 < self.num_stages and stage + 1 not in self.stages:
                        receiver = self.kind.rank_of(stage + 1, self.num_ranks)
                        dist.send_object_list(
                            [layouts[stage + 1]], group=self.group, device=self.device, group_dst=receiver
                        )
                        _wait(self._post(dist.isend, hidden, stage + 1))
                elif stage + 1 in self.stages:
                    announced: list[Any] = [None]
                    sender = self.kind.rank_of(stage, self.num_ranks)
                    dist.recv_object_list(announced, group=self.group, device=self.device, group_src=sender)
                    hidden = tuple(_wait(self._post(dist.irecv, self._buffers(announced[0]), stage)))
        self._reshard()
        return layouts

    def _buffers(self, layouts: list[Layout]) -> list[Tensor]:
        return [torch.empty(size, dtype=dtype, device=self.device) for size, dtype in layouts]

    def _reshard(self) -> None:
        """Frees the parameters that FSDP has gathered; without a backward nothing else would.

        Kept, they would also hide weights that are loaded later.
        """
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def share_loss(loss: Tensor | None, group: dist.ProcessGroup, loss_rank: int, device: torch.device) -> Tensor:
    """Gives the loss of a pipeline's last stage to all its ranks: logging and callbacks see one value everywhere.

    Args:
        loss: On the rank that has it.
        group: The pipeline axis.
        loss_rank: Who has it, in the group.
        device: Of this rank.
    """
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    shared = torch.zeros((), dtype=dtype, device=device) if loss is None else loss.detach().to(dtype, copy=True)
    dist.broadcast(shared, group=group, group_src=loss_rank)
    return shared


def share_output(output: Tensor | None, group: dist.ProcessGroup, loss_rank: int, device: torch.device) -> Tensor:
    """Gives the output of a pipeline's last stage to all its ranks, which do not know its shape. See `share_loss`."""
    described = [None if output is None else (output.shape, output.dtype)]
    dist.broadcast_object_list(described, group=group, group_src=loss_rank, device=device)
    assert described[0] is not None
    shape, dtype = described[0]
    shared = torch.empty(shape, dtype=dtype, device=device) if output is None else output.contiguous()
    dist.broadcast(shared, group=group, group_src=loss_rank)
    return shared


class _Recent(dict[Hashable, V]):
    """The entries that were used last. All ranks look up the same keys, so they forget the same ones."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def lookup(self, key: Hashable, make: Callable[[], V]) -> V:
        """The entry of a key, made if there is none."""
        value = self.pop(key) if key in self else make()
        self[key] = value
        if len(self) > self._size:
            del self[next(iter(self))]
        return value


def split(inputs: Tensor, keywords: Mapping[str, Tensor], rows: int) -> list[Microbatch]:
    """Cuts a batch into microbatches of `rows` sequences."""
    cut = {name: tensor.split(rows) for name, tensor in keywords.items()}
    return [
        (part, {name: parts[index] for name, parts in cut.items()}) for index, part in enumerate(inputs.split(rows))
    ]


def fill_up(
    inputs: Tensor, targets: Tensor, keywords: dict[str, Tensor], count: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The batch with as many rows added as it needs to divide into `count` microbatches; they add nothing to the loss.

    Raises:
        ConfigurationError: The targets are of a type that has no -100.
    """
    missing = -inputs.shape[0] % count
    if missing == 0:
        return inputs, targets, keywords
    if targets.is_floating_point() or not targets.dtype.is_signed:
        raise ConfigurationError(
            f"A batch of {inputs.shape[0]} rows does not divide into {count} microbatches, and rows cannot be added to "
            f"it since targets of type {targets.dtype} cannot be marked as ignored ({IGNORED}). Set drop_last=True in "
            "the loader."
        )

    def repeat_last(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])

    ignored = targets.new_full((missing, *targets.shape[1:]), IGNORED)
    filled = {name: repeat_last(tensor) for name, tensor in keywords.items()}
    return repeat_last(inputs), torch.cat([targets, ignored]), filled


class _ContiguousGradient(torch.autograd.Function):
    """The identity. Its gradient is sent to the stage before, which takes contiguous tensors only."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
        return gradient.contiguous()


def _sendable(tensor: Any) -> Any:
    """A contiguous tensor that is no view: messages need the one, and schedules that split the backward the other,
    since torch then detaches in place what a stage returns."""
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor.contiguous()


def _wait(message: Message) -> Sequence[Tensor]:
    tensors, works = message
    for work in works:
        work.wait()
    return tensors


def _as_tuple(output: Any, stage: int, *, may_be_split: bool = False) -> tuple[Tensor, ...]:
    """What a stage returns, as what the next one is called with."""
    outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    for tensor in outputs:
        if not isinstance(tensor, Tensor) or (isinstance(tensor, DTensor) and not may_be_split):
            raise ConfigurationError(
                f"Pipeline stage {stage} returns a {type(tensor).__name__}; stages can send each other plain tensors "
                "and tuples of them. (With tensor parallelism, let the last module of a block return local tensors.)"
            )
    return outputs


def _example(layout: Layout, with_gradient: bool) -> Tensor:
    size, dtype = layout
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=with_gradient and dtype.is_floating_point)


@contextmanager
def _gradients_apart(stages: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps gradients of earlier batches: a schedule's first step drops those of modules that FSDP shards (torch 2.13,
    `PipelineStage._post_metadata_inference_cleanup`)."""
    kept = [(p, p.grad) for stage in stages for p in stage.parameters() if p.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    yield
    for parameter, gradient in kept:
        parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad


@contextmanager
def _without_a_trace(stages: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Runs modules without effect on random numbers, nor on what they record while they train."""
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        for module, training in modes:
            module.training = training
