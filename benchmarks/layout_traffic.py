"""axes.py's second part: what the ranks of a layout send each other in a step of the real Trainer, over what they must.

Bytes are counted call by call (traffic.py) and set against the formulas of least_traffic.py, for each axis and kind of
collective. What the formulas give no reason for is listed, not left out.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from least_traffic import Term, Work, least_traffic
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from traffic import Sent, count_traffic, profile_calls, socket_bytes
from training_job import TokenRows

from lightning_llm import DecoderConfig, LLM3DStrategy, LLMModule

WARM_UP = 2  # steps before the one that is looked at: in the first one batches are compared, buffers made


@dataclass(frozen=True, kw_only=True)
class TrafficCase:
    """One layout.

    Attributes:
        name: In the table.
        ranks: Processes.
        settings: Arguments of `LLM3DStrategy`.
        config: The model. Its routing is made balanced, so that bytes do not depend on the data.
        batch_size: Sequences per step over all data ranks.
        seq_len: Tokens of each.
    """

    name: str
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)
    config: DecoderConfig
    batch_size: int
    seq_len: int


class _Watch(Callback):
    """Looks at the first step, from the start of training, and at the one after the warm-up, from the end of the step
    before it, so that all that the Trainer does between two steps is in."""

    def __init__(self) -> None:
        self.first: list[Sent] = []
        self.calls: list[Sent] = []
        self.profiled: Counter[str] = Counter()
        self.socket_bytes = 0
        self._stack = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = self._stack.enter_context(count_traffic())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            self._stack.close()
        elif trainer.global_step == WARM_UP:
            self.calls = self._stack.enter_context(count_traffic())
            self.profiled = self._stack.enter_context(profile_calls())
            self.socket_bytes = -socket_bytes()
        elif trainer.global_step == WARM_UP + 1:
            self.socket_bytes += socket_bytes()
            self._stack.close()


def run_layout(case: TrafficCase) -> dict[str, Any]:
    """Trains on this rank; what it sent, in plain data."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy, watch = LLM3DStrategy(**case.settings), _Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=strategy,
        max_steps=WARM_UP + 1,
        gradient_clip_val=1.0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert strategy.dims is not None
    rows = TokenRows(case.batch_size * (WARM_UP + 1), case.seq_len, case.config.vocab_size)
    loader = DataLoader(rows, batch_size=case.batch_size // strategy.dims.data_parallel_size)
    trainer.fit(LLMModule(case.config, force_balanced_routing=True), loader)
    work = Work(
        config=case.config,
        dims=strategy.dims,
        layout=strategy.layout,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        element_size=torch.get_default_dtype().itemsize,
    )
    return {
        "calls": watch.calls,
        "first": watch.first,
        "profiled": watch.profiled,
        "socket_bytes": watch.socket_bytes,
        "axes": _axes(strategy),
        "least": least_traffic(work),
    }


def _axes(strategy: LLM3DStrategy) -> dict[str, str]:
    """`{mesh axis: name of its process group}`; axes that span all ranks have the world's."""
    meshes = strategy.meshes
    views = [mesh for mesh in (meshes.dense, meshes.grid, meshes.expert) if mesh is not None]
    groups = {axis: mesh.get_group(axis).group_name for mesh in views for axis in mesh.mesh_dim_names or ()}
    return {**groups, "world": dist.group.WORLD.group_name}


def summarize_traffic(case: TrafficCase, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One layout's rows: bytes sent per rank (mean over ranks) and calls, for each axis and kind, over the least.

    Raises:
        RuntimeError: The profiler saw other calls, so the counting missed some.
    """
    for index, rank in enumerate(ranks):
        counted = Counter(call.kind for call in rank["calls"])
        if counted != rank["profiled"]:
            raise RuntimeError(f"{case.name}, rank {index}: counted {counted}, but the profiler saw {rank['profiled']}")
    terms: list[Term] = ranks[0]["least"]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for term in terms:
        row = rows.setdefault((_label(term.axis, ranks[0]["axes"], terms), term.kind), _row())
        row["least"] += term.sent
        row["reasons"].append(f"{term.reason} ({term.source})")
    for rank in ranks:
        names = {group: _label(axis, rank["axes"], terms) for axis, group in rank["axes"].items()}
        for call in rank["calls"]:
            row = rows.setdefault((names[call.group], call.kind), _row())
            row["calls"] += 1 / len(ranks)
            row["sent"] += call.sent / len(ranks)
    sent, first = (sum(call.sent for rank in ranks for call in rank[step]) / len(ranks) for step in ("calls", "first"))
    least = sum(term.sent for term in terms)
    gloo = sum(call.sent * gloo_factor(call) for rank in ranks for call in rank["calls"]) / len(ranks)
    return {
        **asdict(case),
        "config": case.config.to_dict(),
        "rows": [{"axis": axis, "kind": kind, **row} for (axis, kind), row in sorted(rows.items())],
        "sent": sent,
        "least": least,
        "ratio": sent / least,
        "first_step_more": first - sent,
        "on_sockets": sum(rank["socket_bytes"] for rank in ranks) / len(ranks),
        "on_sockets_expected": gloo,
    }


def _row() -> dict[str, Any]:
    return {"calls": 0.0, "sent": 0.0, "least": 0.0, "reasons": []}


def _label(axis: str, axes: dict[str, str], terms: list[Term]) -> str:
    """The axes with a reason to send that have this axis's process group: `tp`, or `cp, fsdp` where it is one group."""
    same = [other for other in dict.fromkeys(term.axis for term in terms) if axes[other] == axes[axis]]
    return ", ".join(same) or axis


def gloo_factor(call: Sent) -> int:
    """How often gloo sends what must be sent once: its reduce-scatter is an all-reduce (torch 2.13)."""
    return 2 if call.kind == "reduce_scatter" else 1
