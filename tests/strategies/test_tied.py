"""Tied tensors under a pipeline: where both stages are on one rank, a checkpoint stores one tensor and fills both."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_llm import Decoder
from lightning_llm.checkpoint.module_state import collect, model_state, optimizer_state, restore
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver
from lightning_llm.planner.schedules import SCHEDULES, schedule_kind
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tied import ends_group
from tests.distributed import run_distributed
from tests.strategies.training import SMALL

OWNER, COPY = "model.embed_tokens.weight", "lm_head.weight"


def ends(world_size: int) -> dict[str, Any]:
    mesh = ParallelDims.resolve(world_size, pipeline_parallel_size=3, tensor_parallel_size=2).build("cpu").dense
    groups = {kind.name: ends_group(mesh, kind) for kind in SCHEDULES}
    return {name: group and dist.get_process_group_ranks(group) for name, group in groups.items()}


def test_first_and_last_stage_meet_where_they_are_apart() -> None:
    for rank, groups in enumerate(run_distributed(ends, 6, 6)):
        pair = {0: [0, 4], 4: [0, 4], 1: [1, 5], 5: [1, 5]}.get(rank)
        for kind in SCHEDULES:
            assert groups[kind.name] == (None if kind.placement == "V" else pair)


def save_and_load(folder: str) -> dict[str, Tensor]:
    kind, aliases = schedule_kind("ZBVZeroBubble"), {COPY: OWNER}

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Decoder(SMALL.replace(tie_word_embeddings=True))
        model.reset_parameters(seed)
        plan = plan_of(model)
        assert plan is not None
        keep_stages(model, plan, kind.stage_ids(dist.get_rank(), 2, 2), split_units(plan, model, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, seed + 1.0)
        optimizer.step()
        return model, optimizer

    saved, optimizer = build(0)
    state = model_state(saved, aliases)
    states = [optimizer_state(saved, optimizer, aliases)]
    assert COPY not in state
    CheckpointSaver().save(collect({"state_dict": state, "optimizer_states": states}), Path(folder) / "ckpt")
    loaded, optimizer_loaded = build(5)
    restore(Checkpoint.open(Path(folder) / "ckpt"), loaded, [optimizer_loaded], aliases)
    for (name, parameter), expected in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
        assert torch.equal(optimizer_loaded.state[parameter]["exp_avg"], optimizer.state[expected]["exp_avg"]), name
    named = dict(loaded.named_parameters())
    if dist.get_rank() == 0:
        averages = [optimizer_loaded.state[named[name]]["exp_avg"] for name in (OWNER, COPY)]
        assert averages[0].data_ptr() != averages[1].data_ptr(), "one step must not be taken twice"
    return {name: parameter.detach() for name, parameter in named.items()}


def test_a_checkpoint_fills_owner_and_copy_on_one_rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = run_distributed(save_and_load, 2, folder)
    assert torch.equal(first[OWNER], first[COPY])
    assert not second.keys() & {OWNER, COPY}
