"""FSDP2's parameters, gradients and optimizer states, as `LLM3DStrategy` has them, term by term."""

from __future__ import annotations

from lightning_llm.planner.activations import blocks_of
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.shape import Stage
from lightning_llm.planner.states import StateBytes, gathered, matrices, stored


def fsdp2_states(stage: Stage, layout: Layout, workload: Workload) -> StateBytes:
    """ZeRO's stages in FSDP2's terms (n ranks share; bf16-mixed):

    =====  ===============  ==================  ==========================  ==========================================
    stage  stored float32   optimizer states    gradients, float32          whole bfloat16 copies
    =====  ===============  ==================  ==========================  ==========================================
    0      whole            whole               whole                       the whole stage (autocast keeps them)
    1      1 / n            1 / n               whole until the step        the whole stage, within the step
    2      1 / n            1 / n               1 / n                       the whole stage, within the step
    3      1 / n            1 / n               1 / n                       root unit and two blocks
    =====  ===============  ==================  ==========================  ==========================================

    In a pipeline stages 2 and 3 are one: gathering again for each microbatch would cost more than it saves, so whole
    copies stay, and gradients are summed whole, in the reduction's dtype, until a stage's last microbatch.

    Offloaded (`CPUOffloadPolicy`), shards of parameters, gradients and optimizer states are in pinned host memory, and
    the optimizer works there. A unit's shard comes to the device in the stored dtype, on one rank too.
    """
    tensor, expert = layout.tensor_parallel_size, layout.expert_parallel_size
    sharded, offloads = layout.zero_stage > 0, layout.offloads
    shards = layout.sharding_size if sharded else 1
    expert_shards = layout.expert_sharding_size if sharded else 1
    kinds = blocks_of(stage, layout.recompute)
    units = [(1, stage.root), *((kind.number, kind.unit) for kind in kinds)]
    whole = sum(count * gathered(unit, tensor, expert) for count, unit in units)
    kept = sum(count * stored(unit, tensor, shards, expert, expert_shards) for count, unit in units)
    e, p = workload.compute_bytes, workload.parameter_bytes
    communicates = sharded and (shards > 1 or expert_shards > 1)
    moves = communicates or offloads
    has_copies = moves or e != p
    pipelined = layout.pipeline_parallel_size > 1

    states = 2 * kept
    if workload.optimizer == "muon":
        states -= sum(k.number * matrices(k.unit, tensor, shards, expert, expert_shards) for k in kinds)

    # Stage 1 reduces once, after the last batch: at once, if there is only one.
    reduces_at_once = moves and (layout.zero_stage >= 2 or (layout.microbatches == 1 and not pipelined))
    reduced = p * (kept if reduces_at_once else whole)
    largest = max(gathered(unit, tensor, expert) for _, unit in units)
    at_once = whole
    if layout.zero_stage == 3 and moves and not pipelined:
        block = max((gathered(kind.unit, tensor, expert) for kind in kinds), default=0)
        # The root's unit, the block at work and the one that is gathered ahead.
        at_once = gathered(stage.root, tensor, expert) + min(2, len(stage.layers)) * block
    # A gather is copied out of a flat buffer; a reduction takes the unit's gradient in the computation's dtype and a
    # flat copy of it in the reduction's dtype.
    staging = largest * max(e, (0 if pipelined else e) + p) if moves else 0
    if offloads:
        staging += p * max(stored(unit, tensor, shards, expert, expert_shards) for _, unit in units)
    if moves and not pipelined and stage.is_last:
        staging += e * gathered(stage.root, tensor, expert)  # the root's gradients wait for the end of the backward
    offloaded = offloads and reduces_at_once
    return StateBytes(
        stored=kept,
        whole=whole,
        whole_experts=sum(k.number * k.unit.experts // expert for k in kinds),
        parameters=0.0 if offloads else p * kept,
        optimizer=0.0 if offloads else p * states,
        gathered_at_once=e * at_once if has_copies else 0.0,
        whole_gradients=p * whole,
        sharded_gradients=0.0 if offloaded else reduced,
        step_gradients=0.0 if offloads else reduced,
        staging=staging,
        step_moves=0.0 if offloads else 2 * p * (kept + states) + reduced,
        saved=p * (kept + states),
        host=p * (2 * kept + states) if offloads else 0.0,  # parameters, gradients, states
    )
