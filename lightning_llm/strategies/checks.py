"""What is refused before any process is started, and what the processes compare once when they all run.

llm3d.py calls these; each raises `ConfigurationError` with the arithmetic and what to change.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.context import check_context, check_ulysses
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.stages import split_units

_CUT = "_lightning_llm_is_cut"


def model_in_outline(module: LightningModule) -> nn.Module | None:
    """The model that a module will train: the one it has, or one that it builds without memory (meta device)."""
    model, build_model = getattr(module, "model", None), getattr(module, "build_model", None)
    if isinstance(model, nn.Module):
        return model
    if build_model is None:
        return None
    with torch.device("meta"):
        return build_model()


def mark_as_cut(model: nn.Module) -> None:
    """Notes that a strategy has replaced parts of this model, so that no other one tries to cut it again."""
    setattr(model, _CUT, True)


def check_plan(model: nn.Module, dims: ParallelDims, layout: Layout) -> ParallelPlan | None:
    """The model's plan, if this layout can be cut from it."""
    if getattr(model, _CUT, False):
        raise ConfigurationError(
            f"This {type(model).__name__.removeprefix('FSDP')} was cut into its parallel parts by an earlier Trainer. "
            "Call that Trainer's fit(), validate() or test() again, or make a new module and load its checkpoint "
            "(ckpt_path=...)."
        )
    plan = plan_of(model)
    if plan is not None:
        plan.check(model, dims)
        if dims.context_parallel_size > 1:
            check_rotary(model)
        if dims.pipeline_parallel_size > 1:
            split_units(plan, model, dims.pipeline_parallel_size * layout.stages_per_rank, layout.pipeline_split)
        if dims.context_parallel_size > 1 and layout.context_parallel_method == "ulysses":
            assert plan.attention_heads is not None
            heads, kv_heads = (number // dims.tensor_parallel_size for number in plan.attention_heads)
            check_ulysses(heads, kv_heads, dims.context_parallel_size)
    elif dims.model_parallel_size > 1 or dims.expert_parallel_size > 1:
        raise ConfigurationError(
            f"{dims.arithmetic()}: only data parallelism needs no plan, and {type(model).__name__} has none. "
            "Give it a method `parallel_plan()` that returns a lightning_llm.strategies.plan.ParallelPlan, or train "
            "with data parallelism alone."
        )
    return plan


def check_schedule(dims: ParallelDims, layout: Layout, backend: str, torch_version: str = torch.__version__) -> None:
    """Refuses V-shaped schedules where torch cannot run them.

    Two neighbouring stages of a V are on one rank, which in torch 2.11 sends to itself, and gloo cannot. Later versions
    hand such tensors on.
    """
    v_shaped = dims.pipeline_parallel_size > 1 and layout.schedule.placement == "V"
    if v_shaped and backend == "gloo" and TorchVersion(torch_version) < "2.12":
        raise ConfigurationError(
            f"pipeline_schedule={layout.schedule.name!r} runs on gloo from torch 2.12 on, and this is torch "
            f"{torch_version}. Use another schedule, such as InterleavedZeroBubble, or a later torch."
        )


def target_of(module: LightningModule, dims: ParallelDims, layout: Layout) -> tuple[nn.Module, ParallelPlan | None]:
    """What of a module is cut over ranks, and its plan: its model, or where there is no plan all of it."""
    model = getattr(module, "model", None)
    plan = check_plan(model if isinstance(model, nn.Module) else module, dims, layout)
    target = module if plan is None else model
    if not isinstance(target, nn.Module):
        raise ConfigurationError(
            f"{type(module).__name__} has a parallel_plan but no `model`. Put the network into self.model, and the "
            "plan on it."
        )
    return target, plan


def check_others(module: LightningModule, model: nn.Module, dims: ParallelDims) -> None:
    """Refuses parameters beside the model that is cut: each rank would train its own.

    Raises:
        ConfigurationError: naming some.
    """
    cut = {id(parameter) for parameter in model.parameters()}
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in cut]
    if outside and dims.world_size > 1:
        raise ConfigurationError(
            f"{type(module).__name__} has parameters beside self.model, for example {outside[:3]}, which no rank "
            "would share with the others. Put them into self.model and its plan, or freeze them."
        )


def check_rotary(model: nn.Module) -> None:
    """Refuses rotary embeddings that change with the sequence's length, of which a context rank sees a part."""
    scaling = getattr(getattr(model, "config", None), "rope_scaling", None) or {}
    if isinstance(scaling, dict) and scaling.get("rope_type") in ("dynamic", "longrope"):
        raise ConfigurationError(
            f"context_parallel_size: the model's rope_scaling {scaling['rope_type']!r} depends on the length of the "
            "sequence, of which each context rank has a part. Set context_parallel_size to 1."
        )


def check_data(datamodule: Any, dims: ParallelDims, layout: Layout, *, accumulate: int) -> None:
    """Whether a data module's batches divide over the data ranks, the microbatches, the tensor and the context ranks.

    Asks `datamodule.check(data_ranks, accumulate)`, `.batch_size` (over all data ranks) and `.seq_len`, where it has
    them.
    """
    if hasattr(datamodule, "check"):
        datamodule.check(dims.data_parallel_size, accumulate)
    batch_size, seq_len = (getattr(datamodule, name, None) for name in ("batch_size", "seq_len"))
    if batch_size is not None and dims.pipeline_parallel_size > 1:
        local = batch_size // (dims.data_parallel_size * accumulate)
        layout.schedule.choose_microbatches(
            layout.microbatches, local, dims.pipeline_parallel_size, layout.stages_per_rank
        )
    if seq_len is not None:
        check_sequence(seq_len, dims, layout)


def check_sequence(seq_len: int, dims: ParallelDims, layout: Layout) -> None:
    """Whether context parallelism, and sequence parallelism over the tensor ranks, can share a sequence out."""
    tensor = dims.tensor_parallel_size if layout.sequence_parallel else 1
    if dims.context_parallel_size > 1:
        check_context(seq_len, dims.context_parallel_size, tensor)
    elif seq_len % tensor:
        raise ConfigurationError(
            f"sequence length({seq_len}) is not divisible by tensor_parallel_size({tensor}), which "
            "sequence parallelism needs. Change the sequence length, or set sequence_parallel to false."
        )


def compare_batches(batch: Any, dims: ParallelDims) -> None:
    """Whether all ranks of a data coordinate were handed the same samples. Collective.

    A loader that shards by world rank gives tensor-parallel peers different samples, and nothing else would ever tell.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    # As bytes: numpy does not know every dtype that torch has.
    whole = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors)
    digest = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in whole))
    digests: list[Any] = [None] * dims.world_size
    dist.all_gather_object(digests, digest)
    first_with: dict[int, int] = {}
    for rank in range(dims.world_size):
        first = first_with.setdefault(dims.data_rank(rank), rank)
        if digests[rank] != digests[first]:
            raise ConfigurationError(
                f"Ranks {first} and {rank} work on the same samples (data coordinate {dims.data_rank(rank)}) but "
                "were handed different batches. The loader must shard by trainer.distributed_sampler_kwargs, not by "
                "the world rank, and shuffle with the same seed on all ranks (lightning_llm.TokenDataModule does)."
            )
    if dims.data_parallel_size > 1 and tensors and len(set(digests)) == 1:
        rank_zero_warn(
            "All data ranks were handed the same batch: they do the same work. Shard the loader by "
            "trainer.distributed_sampler_kwargs."
        )


def sequence_length(batch: Any) -> int | None:
    """Tokens per sequence of a batch of `{"input_ids": [batch, seq], ...}`; None for other batches."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return tokens.shape[1] if isinstance(tokens, Tensor) and tokens.ndim > 1 else None
