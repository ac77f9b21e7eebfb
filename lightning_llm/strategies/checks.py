"""What is refused before any process is started, and what the processes compare once when they all run.

llm3d.py calls these; each raises `ConfigurationError` with the arithmetic and what to change.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.mesh import ParallelDims, Size, check_size, recommended_sizes
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.schedules import schedule_kind

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


def resolve_dims(
    model: nn.Module | None,
    *,
    world_size: int,
    devices_per_node: int,
    tensor_parallel_size: Size,
    pipeline_parallel_size: Size,
    data_parallel_size: Size,
    replicate_size: int,
) -> ParallelDims:
    """The sizes of a run, with each "auto" decided from the model and the number of processes."""
    tensor, pipeline = 1, 1
    tensor_auto = tensor_parallel_size == "auto"
    given = {
        "data_parallel_size": data_parallel_size,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
    }
    taken = 1
    for name, size in given.items():
        if size != "auto":
            check_size(name, size)
            taken *= size
    plan = plan_of(model) if model is not None else None
    if model is not None and plan is not None and "auto" in given.values():
        tensor, pipeline = recommended_sizes(
            sum(parameter.numel() for parameter in model.parameters()),
            max(1, world_size // taken),
            devices_per_node,
            tensor_divides=plan.tensor_divides.values() if plan.tensor_parallel and tensor_auto else (1,),
            num_units=len(plan.units(model)) or 1,
        )
    return ParallelDims.resolve(
        world_size,
        data_parallel_size=data_parallel_size,
        replicate_size=replicate_size,
        tensor_parallel_size=tensor if tensor_parallel_size == "auto" else tensor_parallel_size,
        pipeline_parallel_size=pipeline if pipeline_parallel_size == "auto" else pipeline_parallel_size,
    )


def mark_as_cut(model: nn.Module) -> None:
    """Notes that a strategy has replaced parts of this model, so that no other one tries to cut it again."""
    setattr(model, _CUT, True)


def check_plan(model: nn.Module, dims: ParallelDims) -> ParallelPlan | None:
    """The model's plan, if these sizes can be cut from it."""
    if getattr(model, _CUT, False):
        raise ConfigurationError(
            f"This {type(model).__name__.removeprefix('FSDP')} was cut into its parallel parts by an earlier Trainer. "
            "Call that Trainer's fit(), validate() or test() again, or make a new module and load its checkpoint "
            "(ckpt_path=...)."
        )
    plan = plan_of(model)
    if plan is not None:
        plan.check(
            model,
            tensor_parallel_size=dims.tensor_parallel_size,
            pipeline_parallel_size=dims.pipeline_parallel_size,
        )
    elif dims.model_parallel_size > 1:
        raise ConfigurationError(
            f"{dims.arithmetic()}: tensor and pipeline parallelism need a plan, and {type(model).__name__} has none. "
            "Give it a method `parallel_plan()` that returns a lightning_llm.strategies.plan.ParallelPlan, or train "
            "with data parallelism alone."
        )
    return plan


def check_data(
    datamodule: Any,
    dims: ParallelDims,
    *,
    accumulate: int,
    microbatches: int | str,
    sequence_parallel: bool,
    schedule: str = "1F1B",
    stages_per_rank: int | Literal["auto"] = "auto",
) -> None:
    """Whether a data module's batches divide over the data ranks, the microbatches and the tensor ranks.

    Asks `datamodule.check(data_ranks, accumulate)`, `.batch_size` (over all data ranks) and `.seq_len`, where it has
    them.
    """
    if hasattr(datamodule, "check"):
        datamodule.check(dims.data_parallel_size, accumulate)
    batch_size, seq_len = (getattr(datamodule, name, None) for name in ("batch_size", "seq_len"))
    if batch_size is not None and dims.pipeline_parallel_size > 1:
        local = batch_size // (dims.data_parallel_size * accumulate)
        kind = schedule_kind(schedule)
        stages = kind.resolve_stages_per_rank(stages_per_rank)
        kind.choose_microbatches(microbatches, local, dims.pipeline_parallel_size, stages)
    if seq_len is not None and sequence_parallel:
        check_sequence(seq_len, dims)


def check_sequence(seq_len: int, dims: ParallelDims) -> None:
    """Whether sequence parallelism can share a sequence among the tensor ranks."""
    if seq_len % dims.tensor_parallel_size:
        raise ConfigurationError(
            f"sequence length({seq_len}) is not divisible by tensor_parallel_size({dims.tensor_parallel_size}), which "
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
