"""Models that the planner's tests plan for."""

from __future__ import annotations

from functools import cache

from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner.devices import device
from lightning_llm.planner.estimate import Cluster
from lightning_llm.planner.shape import Shape


@cache
def shape_of(name: str) -> Shape:
    return Shape.of(DecoderConfig.preset(name))


def h100s(count: int) -> Cluster:
    row = device("h100")
    return Cluster(row, count, min(count, row.per_node), row.memory)
