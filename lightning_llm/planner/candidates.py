"""Every layout that a model, a cluster and a batch can be divided into, on one engine. `search.py` weighs them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_llm.planner.dividing import divisors
from lightning_llm.planner.estimate import Cluster
from lightning_llm.planner.layout import Layout, Recompute, Workload
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.planner.shape import Shape, sizes_of
from lightning_llm.planner.timeline import runs

LONG_CONTEXT = 32768  # tokens from which a sequence may be shared by several ranks
MAX_PIPELINE = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the search may choose from. A fixed size leaves it no choice.

    Attributes:
        engine: "fsdp2" or "deepspeed".
        offload_optimizer, offload_parameters: As in `Layout`; one choice at a time, see `engines.OFFLOADS`.
        tensor_parallel_size, pipeline_parallel_size, context_parallel_size, expert_parallel_size, replicate_size: A
            number of ranks, or None to choose.
        zero_stages: None: those worth considering on the engine. Sharding gradients beside optimizer states costs FSDP2
            nothing, so that 0 and 1 are for estimates alone; DeepSpeed's pipeline takes no more than 1.
        recomputes: In the order in which they are preferred.
        schedules: Those that are safe with recomputation and compilation; zero-bubble schedules can be estimated, not
            chosen.
        stages_per_rank: Of interleaved schedules.
        microbatch_sizes: Sequences computed at once.
    """

    engine: str = "fsdp2"
    offload_optimizer: str | None = None
    offload_parameters: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    context_parallel_size: int | None = None
    expert_parallel_size: int | None = None
    replicate_size: int | None = None
    zero_stages: tuple[int, ...] | None = None
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    schedules: tuple[str, ...] = ("1F1B", "Interleaved1F1B")
    stages_per_rank: tuple[int, ...] = (2, 4)
    microbatch_sizes: tuple[int, ...] = (1, 2, 4, 8)


@dataclass
class Count:
    """How many layouts were considered."""

    considered: int = 0


def candidates(
    shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options, count: Count | None = None
) -> Iterator[Layout]:
    """Every layout of all devices that the model, the batch and the schedules can be divided into."""
    count = count or Count()
    for tensor in _tensor_sizes(shape, cluster, workload, options):
        for context in _context_sizes(cluster.count // tensor, workload, options):
            for pipeline in _pipeline_sizes(shape, cluster.count // (tensor * context), options):
                data = cluster.count // (tensor * context * pipeline)
                if global_batch % data:
                    continue
                for replicate in _replicate_sizes(data, tensor * context, cluster, options):
                    foldable = data // replicate * context * tensor
                    for expert in _expert_sizes(shape, foldable, options):
                        sizes: dict[str, Any] = {
                            "tensor_parallel_size": tensor,
                            "context_parallel_size": context,
                            "pipeline_parallel_size": pipeline,
                            "data_parallel_size": data,
                            "replicate_size": replicate,
                            "expert_parallel_size": expert,
                        }
                        if options.engine == "deepspeed" and expert > 1 and tensor * pipeline > 1:
                            continue
                        for layout in _ways(shape, sizes, global_batch // data, options):
                            count.considered += 1
                            yield layout


def _ways(shape: Shape, sizes: dict[str, Any], local_batch: int, options: Options) -> Iterator[Layout]:
    """The ways to run one set of sizes: schedule, microbatches, recomputation, ZeRO stage."""
    pipeline = sizes["pipeline_parallel_size"]
    schedules: list[tuple[str, int]] = [("1F1B", 1)]
    if pipeline > 1:
        schedules = [
            (schedule, virtual)
            for schedule in options.schedules
            if options.engine == "fsdp2" or schedule == "1F1B"
            for virtual in (options.stages_per_rank if schedule_kind(schedule).multi_stage else (1,))
            if pipeline * virtual <= len(shape.layers)
        ]
    stages = _zero_stages(options, pipeline, sizes["expert_parallel_size"])
    for schedule, virtual in schedules:
        for size in options.microbatch_sizes:
            count = local_batch // size
            # Fewer microbatches than ranks leave most of a pipeline idle.
            if local_batch % size or count < pipeline or not runs(schedule, pipeline, virtual, count):
                continue
            for zero_stage in stages:
                for recompute in options.recomputes:
                    yield Layout(
                        **sizes,
                        engine=options.engine,
                        sequence_parallel=options.engine == "fsdp2",
                        offload_optimizer=options.offload_optimizer,
                        offload_parameters=options.offload_parameters,
                        zero_stage=zero_stage,
                        pipeline_schedule=schedule,
                        stages_per_rank=virtual,
                        microbatch_size=size,
                        microbatches=count,
                        recompute=recompute,
                    )


def _zero_stages(options: Options, pipeline: int, expert: int) -> tuple[int, ...]:
    """Those of ZeRO's stages that the engine offers with these sizes and this offloading."""
    if options.engine == "fsdp2":
        stages = options.zero_stages or (2, 3)
        return (max(stages),) if pipeline > 1 else stages  # in a pipeline stages 2 and 3 are one
    offloads = bool(options.offload_optimizer or options.offload_parameters)
    if pipeline > 1:
        # States in host memory are for models without room for stages that hold parameters and gradients whole.
        return () if offloads else tuple(s for s in options.zero_stages or (1,) if s <= 1)
    least = 3 if options.offload_parameters or options.offload_optimizer == "nvme" else int(offloads)
    most = 2 if expert > 1 else 3
    return tuple(s for s in options.zero_stages or ((2, 3) if offloads else (1, 2, 3)) if least <= s <= most)


# -- sizes --


def _fixed(size: int | None, sizes: list[int]) -> list[int]:
    return sizes if size is None else [s for s in sizes if s == size]


def tensor_divides(shape: Shape, engine: str = "fsdp2") -> dict[str, int]:
    """What the tensor size must divide. DeepSpeed's engine does not cut the vocabulary."""
    widths = {sizes_of(unit).intermediate for unit in shape.layers} - {0}
    return {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        **({"vocab_size": shape.vocab} if engine == "fsdp2" else {}),
        **{f"intermediate_size {width}": width for width in widths},
    }


def _tensor_sizes(shape: Shape, cluster: Cluster, workload: Workload, options: Options) -> list[int]:
    """Within a node, for its links; dividing heads, widths, vocabulary and the sequence."""
    sequence = workload.seq_len if options.engine == "fsdp2" else 0  # which DeepSpeed's engine does not cut either
    numbers = (*tensor_divides(shape, options.engine).values(), sequence, cluster.count)
    sizes = [size for size in divisors(cluster.per_node) if all(number % size == 0 for number in numbers)]
    if options.engine == "deepspeed" and (workload.float8 or shape.config.qk_norm_whole):
        sizes = [1]  # AutoTP cuts plain linear layers, and has no norm over all heads of a projection
    return _fixed(options.tensor_parallel_size, sizes)


def _context_sizes(ranks: int, workload: Workload, options: Options) -> list[int]:
    """Only for long sequences: each rank needs two equal pieces, one early and one late, of thousands of tokens."""
    wanted = options.context_parallel_size
    shortest = LONG_CONTEXT // 4 if wanted is None else 1
    sizes = [
        size
        for size in divisors(ranks)
        if size == 1
        or (
            workload.seq_len % (2 * size) == 0
            and workload.seq_len // size >= shortest
            and (wanted is not None or workload.seq_len >= LONG_CONTEXT)
        )
    ]
    return _fixed(wanted, sizes)


def _pipeline_sizes(shape: Shape, ranks: int, options: Options) -> list[int]:
    sizes = [size for size in divisors(ranks) if size <= min(MAX_PIPELINE, len(shape.layers))]
    return _fixed(options.pipeline_parallel_size, sizes)


def _replicate_sizes(data: int, stride: int, cluster: Cluster, options: Options) -> list[int]:
    """One replica, or replicas that are sharded over one, two, four or eight nodes (hybrid sharding, FSDP2's)."""
    sizes = [1]
    for nodes in (1, 2, 4, 8) if options.engine == "fsdp2" else ():
        shards = nodes * cluster.per_node // stride
        if 1 < shards < data and data % shards == 0:
            sizes.append(data // shards)
    if options.engine == "fsdp2" and options.replicate_size is not None and data % options.replicate_size == 0:
        sizes.append(options.replicate_size)
    return _fixed(options.replicate_size, sorted(set(sizes)))


def _expert_sizes(shape: Shape, foldable: int, options: Options) -> list[int]:
    experts = shape.num_experts
    if not experts:
        return _fixed(options.expert_parallel_size, [1])
    return _fixed(options.expert_parallel_size, divisors(math.gcd(experts, foldable)))
