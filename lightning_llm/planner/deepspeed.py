"""Parameters, gradients and optimizer states on DeepSpeed's engine: ZeRO, ZeRO-Offload and ZeRO-Infinity, term by term.

Papers: https://arxiv.org/abs/1910.02054, https://arxiv.org/abs/2101.06840, https://arxiv.org/abs/2104.07857. What they
leave open (buffers, what is kept on the host) is as `deepspeed/runtime/zero/` of DeepSpeed 0.19 allocates it.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

from lightning_llm.planner.activations import blocks_of
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.shape import Stage, Unit
from lightning_llm.planner.states import StateBytes, gathered

# Defaults of `zero_optimization` in DeepSpeed's configuration, in elements.
REDUCE_BUCKET = 500_000_000  # reduce_bucket_size
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters, and stage3_max_reuse_distance
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
SUB_GROUP = 1_000_000_000  # sub_group_size: elements that ZeRO-3 updates at a time
OPTIMIZER_BUFFERS = 4  # offload_optimizer.buffer_count
PARAMETER_BUFFERS, PARAMETER_BUFFER = 5, 100_000_000  # offload_param.buffer_count and .buffer_size
MAX_IN_CPU = 1_000_000_000  # offload_param.max_in_cpu

MASTER = 12  # bytes: float32 weights and Adam's two moments
FLOAT32 = 4


def deepspeed_states(stage: Stage, layout: Layout, workload: Workload) -> StateBytes:
    """Bytes per parameter on the device (n ranks share; e = 2 in bfloat16):

    =====  ==========  ===========  ============  =====================================================================
    stage  weights     gradients    optimizer     buffers
    =====  ==========  ===========  ============  =====================================================================
    0      e           e            12
    1      e           e            12 / n        a bucket to reduce
    2      e           e / n        12 / n        a bucket to reduce, the largest tensor's gradient
    3      e / n       e / n        12 / n        two buckets, the largest module's gradient; gathered modules, up to
                                                  10^9 parameters or the largest module, and what is fetched ahead
    =====  ==========  ===========  ============  =====================================================================

    The step casts gradients to float32: 4 / n more, by groups of 10^9 in stage 3. Offloaded, per parameter of a rank's
    share: the optimizer on the CPU takes 12 + 4 (gradients in float32) + e (gradients, or weights on their way back) of
    host memory, on NVMe 16 of disk and of the host e (gradients) and four buffers of a group; parameters take e on the
    host, or e on disk and buffers. That is ZeRO-Infinity's "20 bytes per parameter" (section 3), e of them gradients,
    which that paper moved to NVMe and DeepSpeed 0.19 keeps on the host (`grad_partitions_flat_buffer`).
    """
    tensor, expert, zero = layout.tensor_parallel_size, layout.expert_parallel_size, layout.zero_stage
    kinds = blocks_of(stage, layout.recompute)
    # Embedding and output layer are replicated over tensor ranks.
    counted = [(1, stage.root, 1), *((kind.number, kind.unit, tensor) for kind in kinds)]
    whole = sum(count * gathered(unit, cut, expert) for count, unit, cut in counted)
    experts = sum(count * unit.experts // expert for count, unit, _ in counted)
    kept = whole
    if zero:  # states are one vector, cut evenly
        kept = -(-(whole - experts) // layout.sharding_size) + -(-experts // layout.expert_sharding_size)
    e = workload.compute_bytes
    off_optimizer, off_parameters = layout.offload_optimizer, layout.offload_parameters

    largest = max(_largest_module(unit, cut, expert) for _, unit, cut in counted)
    gradients = e * (kept if zero >= 2 else whole)
    if off_optimizer and zero >= 2:
        gradients = 0
    buckets = {0: 0, 1: 1, 2: 1, 3: 2}[zero]
    cast = 0 if e == FLOAT32 else FLOAT32 * (min(kept, SUB_GROUP) if zero == 3 else kept)
    return StateBytes(
        stored=kept,
        whole=whole,
        whole_experts=experts,
        parameters=0.0 if off_parameters else e * (kept if zero == 3 else whole),
        optimizer=0.0 if off_optimizer else MASTER * kept,
        gathered_at_once=e * min(whole, max(MAX_LIVE, largest + PREFETCH)) if zero == 3 else 0.0,
        whole_gradients=gradients,
        sharded_gradients=gradients,
        step_gradients=gradients + (0 if off_optimizer or zero == 0 else cast),
        staging=e * (buckets * REDUCE_BUCKET + (largest if zero >= 2 else 0)),
        # Master weights and moments read and written, gradients cast and read, weights written.
        step_moves=0.0 if off_optimizer else (2 * MASTER + 2 * e + 2 * FLOAT32) * kept,
        saved=(MASTER + e) * kept,
        host=_host(kept, largest, layout, e),
        disk=_disk(kept, layout, e),
    )


def _host(kept: int, largest: int, layout: Layout, e: int) -> float:
    """Bytes of host memory of a rank."""
    bytes_ = 0
    if layout.offload_optimizer == "cpu":
        bytes_ += (MASTER + FLOAT32 + e) * kept
        if layout.zero_stage < 3 and layout.microbatches > 1:
            bytes_ += e * kept  # gradients so far
    elif layout.offload_optimizer == "nvme":
        bytes_ += e * kept + OPTIMIZER_BUFFERS * FLOAT32 * min(kept, SUB_GROUP)
    if layout.offload_parameters == "cpu":
        bytes_ += e * kept
    elif layout.offload_parameters == "nvme":
        buffer = max(PARAMETER_BUFFER, largest // layout.sharding_size)  # a buffer must hold a parameter's share
        bytes_ += e * (PARAMETER_BUFFERS * buffer + min(kept, MAX_IN_CPU))
    return float(bytes_)


def _disk(kept: int, layout: Layout, e: int) -> float:
    """Bytes of disk of a rank."""
    optimizer = MASTER + FLOAT32 if layout.offload_optimizer == "nvme" else 0
    parameters = e if layout.offload_parameters == "nvme" else 0
    return float((optimizer + parameters) * kept)


@lru_cache(maxsize=4096)
def _largest_module(unit: Unit, tensor: int, expert: int) -> int:
    """Elements of the largest module that has parameters of its own: what ZeRO-3 gathers at a time."""
    modules: Counter[str] = Counter()
    for weight in unit.weights:
        elements = weight.numel // expert if weight.is_expert else math.prod(weight.cut(tensor))
        modules[weight.name.rpartition(".")[0]] += elements
    return max(modules.values(), default=0)
