"""Takes a model apart for DeepSpeed: stages, context, AutoTP, expert groups; then block by block to memory.

The order is that of parallelize.py. Nothing is allocated until `materialize`, so that of a model that was built on the
meta device no rank ever holds more than its own part and, under ZeRO-3, one block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.moe import Experts
from lightning_llm.models.weights import Box, WeightSource, load_weights, whole
from lightning_llm.strategies.context import ContextParallel
from lightning_llm.strategies.expert import TokenExchange, connect_routers, experts_of
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import Meshes
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.recompute import apply_recompute
from lightning_llm.strategies.sharding import blocks_of
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tensor import matches


@dataclass(frozen=True)
class Shard:
    """Which part of a global tensor a parameter is: the `index`-th of `count` equal ones along `dim`."""

    dim: int
    index: int
    count: int

    def global_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor that a part of this shape belongs to."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(local))

    def offsets(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Where in it the part begins."""
        return tuple(size * self.index if dim == self.dim else 0 for dim, size in enumerate(local))


@dataclass(kw_only=True)
class Cut:
    """What this rank has of a model.

    Attributes:
        stage: Of the pipeline.
        context: The context axis, if there is one.
        shards: Parameters that are parts of global tensors, by their name in the model.
    """

    stage: int = 0
    context: ContextParallel | None = None
    shards: dict[str, Shard] = field(default_factory=dict)


def cut(model: nn.Module, plan: ParallelPlan | None, meshes: Meshes, layout: Layout) -> Cut:
    """Cuts `model` in place: stages -> context -> tensor -> experts -> recompute.

    Args:
        model: Whole, on the meta device or with equal weights on all ranks.
        plan: Its plan; None leaves it whole.
        meshes: The process groups.
        layout: How.
    """
    dims, found = meshes.dims, Cut()
    if plan is None:
        apply_recompute([block for child in model.children() for block in blocks_of(child)], layout.recompute)
        return found
    if dims.pipeline_parallel_size > 1:
        found.stage = meshes.pipeline_rank
        keep_stages(
            model, plan, [found.stage], split_units(plan, model, dims.pipeline_parallel_size, layout.pipeline_split)
        )
    if plan.forward is not None and dims.model_parallel_size > 1:
        model.forward = partial(plan.forward, model, sequence_ranks=1)  # type: ignore[method-assign]
    if dims.context_parallel_size > 1:
        found.context = ContextParallel(meshes.context, layout.context_parallel_method)
        found.context.attach(model)
    if dims.tensor_parallel_size > 1:
        found.shards |= apply_autotp(model, plan, meshes.tensor.get_group())
    if experts_of(model) and dims.world_size > 1:
        if dims.expert_parallel_size > 1:
            found.shards |= spread_experts(model, dims.expert_parallel_size)
        connect_routers(model, meshes, sequence_parallel=False)
    apply_recompute(plan.units(model), layout.recompute)
    return found


def apply_autotp(model: nn.Module, plan: ParallelPlan, group: dist.ProcessGroup) -> dict[str, Shard]:
    """Has DeepSpeed's AutoTP shard the linear layers that the plan names; everything else stays whole on every rank.

    Args:
        model: Whole, or a pipeline's stage.
        plan: Its tensor-parallel styles.
        group: Ranks that share each layer.

    Returns:
        The parameters that are shards now.

    Raises:
        ConfigurationError: A style, or a kind of layer, that AutoTP does not know.
    """
    from deepspeed import set_autotp_mode
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    for name, module in model.named_modules():
        if _style_of(name, plan) in ("column", "row") and type(module) is not nn.Linear:
            raise ConfigurationError(
                f"tensor_parallel_size: {name} is a {type(module).__name__}, which DeepSpeed's AutoTP would replace "
                "by a plain linear layer. Leave out what converts it (FP8Precision, for example), or use "
                'strategy="llm3d".'
            )
    set_autotp_mode(training=True)
    size = dist.get_world_size(group)
    autotp = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig.from_dict({**partition_config(model, plan), "tp_size": size}),
        training_mode=True,
    )
    autotp.mp_group, autotp.mp_size = group, size  # not `set_tensor_parallel_config`: that knows one grid per process
    autotp.update_linear_policies()
    autotp._replace_module(model)
    shards: dict[str, Shard] = {}
    rank = dist.get_rank(group)
    for name, parameter in model.named_parameters():
        style = _style_of(name.rpartition(".")[0], plan)
        if style == "column":
            shards[name] = Shard(0, rank, size)
        elif style == "row" and parameter.ndim == 2:
            shards[name] = Shard(1, rank, size)
        elif style == "row":
            # AutoTP marks a bias that every rank has as one of its own; norms would count it once a rank.
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    return shards


def partition_config(model: nn.Module, plan: ParallelPlan) -> dict[str, Any]:
    """AutoTP's `partition_config`, as it would stand in DeepSpeed's JSON, from a plan's styles."""
    if "projection_norm" in {_style_of(name, plan) for name, _ in model.named_modules()}:
        raise ConfigurationError(
            f"tensor_parallel_size: {type(model).__name__} normalises over all heads of a projection, which "
            "DeepSpeed's AutoTP has no layer for. "
            'Set tensor_parallel_size to 1, or use strategy="llm3d".'
        )
    kinds: dict[str, dict[str, Any]] = {
        "column": {"partition_type": "column"},
        "row": {"partition_type": "row"},
        # Weights of norms over single heads: each rank has the gradient of its heads.
        "head_norm": {"partition_type": "skip", "grad_allreduce": True},
    }
    return {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [_regex(pattern) for pattern, style in plan.tensor_parallel.items() if style == kind], **spec}
            for kind, spec in kinds.items()
        ],
    }


def reduce_replicated(model: nn.Module, plan: ParallelPlan, group: dist.ProcessGroup) -> None:
    """Sums gradients of weights that every tensor rank has, but applies to its own heads. Once they are in memory.

    What `AutoTP.register_replicated_grad_hooks` does, for parameters that have taken the place of those on meta.
    """

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in model.named_parameters():
        if _style_of(name.rpartition(".")[0], plan) == "head_norm" and parameter.requires_grad:
            parameter.register_hook(summed)


def spread_experts(model: nn.Module, size: int) -> dict[str, Shard]:
    """Leaves each rank its share of the stacked experts, over DeepSpeed's expert groups of `size` ranks.

    Returns:
        The parameters that are shards now.
    """
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(size)
    name_of_group = f"ep_size_{size}"
    group = groups._get_expert_parallel_group(name_of_group)
    rank = dist.get_rank(group)
    exchange = TokenExchange(group)
    shards: dict[str, Shard] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            for name, parameter in list(module.named_parameters(recurse=False)):
                own = parameter.detach().chunk(size)[rank].clone()
                share = nn.Parameter(own, requires_grad=parameter.requires_grad)
                # DeepSpeed averages it over the ranks with the same experts, and knows those by the group's name.
                share.allreduce, share.group_name = False, name_of_group  # type: ignore[attr-defined]
                module.register_parameter(name, share)
                shards[f"{path}.{name}"] = Shard(0, rank, size)
            exchange.attach(module)
    return shards


def tell_of_experts(model: nn.Module, size: int) -> None:
    """Has DeepSpeed's engine, which is to be made, find experts in the model, if there are any that are trained.

    Args:
        model: Its experts are spread.
        size: Over how many ranks.
    """
    from deepspeed.moe.layer import MoE

    class HasExperts(MoE):
        """Without content. DeepSpeed's engine looks for this type alone to find out whether there are experts."""

        def __init__(self, num_experts: int) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """Nothing to do: the groups are there."""

    experts = experts_of(model)
    trained = any(parameter.requires_grad for module in experts for parameter in module.parameters())
    model.register_module("has_experts", HasExperts(experts[0].gate_proj.shape[0] * size) if trained else None)


def materialize(
    model: nn.Module,
    plan: ParallelPlan | None,
    source: WeightSource,
    shards: dict[str, Shard],
    device: torch.device | str,
    partition: Callable[[nn.Module], None] | None,
) -> None:
    """Gives a model on the meta device memory and weights, block by block.

    Args:
        model: Cut.
        plan: Names the blocks; None takes the model in one piece.
        source: Of the weights.
        shards: As `cut` gave them.
        device: Where the weights lie first.
        partition: Called with each block when its weights are there, to share them out over the data ranks.
    """
    for part in (*(plan.units(model) if plan is not None else ()), model):
        names = _to_memory(model, part, device)
        by_id = {id(tensor): shards[name] for name, tensor in model.named_parameters() if name in shards}

        def local(tensor: Tensor, by_id: dict[int, Shard] = by_id) -> tuple[Tensor, Box, tuple[int, ...]]:
            shard = by_id.get(id(tensor))
            if shard is None:
                return whole(tensor)
            shape = tuple(tensor.shape)
            starts = shard.offsets(shape)
            box = tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))
            return tensor.detach(), box, shard.global_shape(shape)

        load_weights(model, source, local=local, names=names)
        if partition is not None:
            partition(part)


def _to_memory(model: nn.Module, part: nn.Module, device: torch.device | str) -> list[str]:
    """Allocates what of `part` is on the meta device; returns its names in `model`. What hangs on parameters stays.

    `nn.Module.to_empty` makes new parameters without the attributes that AutoTP has given the old ones.
    """
    made: dict[int, nn.Parameter] = {}
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device=device), parameter.requires_grad
                    )
                    made[id(parameter)].__dict__.update(parameter.__dict__)
                module._parameters[name] = made[id(parameter)]
    buffers = [
        (module, name, buffer)
        for module in part.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    for module, name, buffer in buffers:
        module._buffers[name] = torch.empty_like(buffer, device=device)
    new = {id(parameter) for parameter in made.values()} | {id(module._buffers[name]) for module, name, _ in buffers}
    return [name for name, tensor in _named_tensors(model) if id(tensor) in new]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _style_of(module: str, plan: ParallelPlan) -> str | None:
    return next((style for pattern, style in plan.tensor_parallel.items() if matches(module, pattern)), None)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"[^.]+") + r"\.weight$"
