"""The grid of processes: how many ranks each parallel axis has, and the meshes cut from that grid.

`ParallelDims` is plain arithmetic until `build()`; the strategy validates with it before any process is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.dividing import divisors

Size = int | Literal["auto"]

GRID_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DENSE_AXES = ("pp", "dp_replicate", "fsdp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep")
IN_WORLD_SIZE = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of every parallel axis; their product is the world size.

    The grid is `(pp, dp_replicate, dp_shard, cp, tp)`, outermost first, so that tensor-parallel peers are neighbours
    (the same node) and pipeline stages are far apart. Two views of it say where parameters live. The dense view
    `(pp, dp_replicate, fsdp, tp)` shards over `fsdp = dp_shard * cp`: context ranks hold different tokens of the same
    weights, as data ranks do. Experts do not follow it: the expert view `(pp, dp_replicate, efsdp, ep)` folds
    `dp_shard * cp * tp` into `efsdp * ep`, so that expert parallelism is not bounded by the data-parallel size
    (Megatron-Core's "parallel folding", torchtitan's `ParallelDims`).

    Args:
        world_size: Number of processes.
        data_parallel_size: Ranks that see different samples, replicas included.
        replicate_size: How many replicas of the sharded model the data ranks hold (hybrid sharding); 1 shards over all.
        tensor_parallel_size: Ranks that share one layer's matrices.
        pipeline_parallel_size: Stages that the layers are cut into.
        context_parallel_size: Ranks that share one sequence.
        expert_parallel_size: Ranks that the experts of one layer are spread over.

    Raises:
        ConfigurationError: The sizes do not multiply to the world size, or do not divide each other.
    """

    world_size: int
    data_parallel_size: int = 1
    replicate_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            check_size(name, size)
        product = self.data_parallel_size * self.model_parallel_size
        if product != self.world_size:
            raise ConfigurationError(
                f"{self.arithmetic()} = {product} != world size {self.world_size}. {self._suggestion()}"
            )
        if self.data_parallel_size % self.replicate_size:
            raise ConfigurationError(
                f"replicate_size({self.replicate_size}) does not divide data_parallel_size({self.data_parallel_size}). "
                f"Use one of {divisors(self.data_parallel_size)}."
            )
        if self.foldable_size % self.expert_parallel_size:
            raise ConfigurationError(
                f"expert_parallel_size({self.expert_parallel_size}) does not divide shard({self.shard_size}) * "
                f"context({self.context_parallel_size}) * tensor({self.tensor_parallel_size}) = {self.foldable_size}. "
                f"Use one of {divisors(self.foldable_size)}."
            )

    @classmethod
    def resolve(
        cls,
        world_size: int,
        *,
        data_parallel_size: Size = "auto",
        replicate_size: int = 1,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
    ) -> ParallelDims:
        """Sizes with `data_parallel_size="auto"` replaced by the ranks that the other axes leave."""
        others = 1
        for name, size in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("pipeline_parallel_size", pipeline_parallel_size),
            ("context_parallel_size", context_parallel_size),
        ):
            check_size(name, size)
            others *= size
        return cls(
            world_size=world_size,
            data_parallel_size=max(1, world_size // others) if data_parallel_size == "auto" else data_parallel_size,
            replicate_size=replicate_size,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            context_parallel_size=context_parallel_size,
            expert_parallel_size=expert_parallel_size,
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same samples: pipeline * context * tensor."""
        return self.pipeline_parallel_size * self.context_parallel_size * self.tensor_parallel_size

    @property
    def shard_size(self) -> int:
        """Data ranks that parameters are sharded over (`dp_shard`)."""
        return self.data_parallel_size // self.replicate_size

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which gradients are averaged, each with tokens of its own: data * context."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold one pipeline stage."""
        return self.world_size // self.pipeline_parallel_size

    @property
    def foldable_size(self) -> int:
        """Ranks that the expert view may arrange anew: shard * context * tensor."""
        return self.shard_size * self.context_parallel_size * self.tensor_parallel_size

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Sizes of `GRID_AXES`."""
        return (
            self.pipeline_parallel_size,
            self.replicate_size,
            self.shard_size,
            self.context_parallel_size,
            self.tensor_parallel_size,
        )

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Sizes of `DENSE_AXES`."""
        return (
            self.pipeline_parallel_size,
            self.replicate_size,
            self.shard_size * self.context_parallel_size,
            self.tensor_parallel_size,
        )

    @property
    def expert_shape(self) -> tuple[int, ...]:
        """Sizes of `EXPERT_AXES`."""
        return (
            self.pipeline_parallel_size,
            self.replicate_size,
            self.foldable_size // self.expert_parallel_size,
            self.expert_parallel_size,
        )

    def data_rank(self, rank: int) -> int:
        """Data coordinate of a global rank: ranks with the same one see the same samples."""
        _, replicate, shard, _, _ = self.coordinates(rank)
        return replicate * self.shard_size + shard

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Position of a global rank in the grid, in the order of `GRID_AXES`."""
        position = []
        for size in reversed(self.grid_shape):
            position.append(rank % size)
            rank //= size
        return tuple(reversed(position))

    def arithmetic(self) -> str:
        """The sizes as a product, for messages: `pipeline(2) * data(2) * tensor(2)`."""
        parts = {
            "pipeline": self.pipeline_parallel_size,
            "data": self.data_parallel_size,
            "context": self.context_parallel_size,
            "tensor": self.tensor_parallel_size,
        }
        shown = {name: size for name, size in parts.items() if size > 1 or name in ("pipeline", "data", "tensor")}
        return " * ".join(f"{name}({size})" for name, size in shown.items())

    def draw(self) -> str:
        """The grid as text: a row a pipeline stage and data rank, a column a tensor (and context) rank."""
        columns = self.context_parallel_size * self.tensor_parallel_size
        width = len(str(self.world_size - 1))
        lines = [f"{self.world_size} process{'es' if self.world_size > 1 else ''} = {self.arithmetic()}"]
        for first in range(0, self.world_size, columns):
            ranks = " ".join(f"{rank:>{width}}" for rank in range(first, first + columns))
            lines.append(f"  stage {self.coordinates(first)[0]}  data {self.data_rank(first)}  tensor [{ranks}]")
            if len(lines) > 16 and first + columns < self.world_size:
                lines.append(f"  ... {(self.world_size - first) // columns - 1} more rows")
                break
        return "\n".join(lines)

    def build(
        self,
        device_type: str,
        timeout: timedelta | None = None,
        *,
        with_experts: bool = False,
        replicate_all: bool = False,
    ) -> Meshes:
        """Creates the process groups. Collective: every rank calls it once, after `init_process_group`.

        Args:
            device_type: "cpu", "cuda", ...
            timeout: Of collectives within the groups; None takes torch's default.
            with_experts: Create the expert view too.
            replicate_all: Nothing is sharded over data and context ranks: their axis is `dp_replicate`, as in plain
                data parallelism, and `fsdp` and `efsdp` have size 1.
        """
        dense_shape, expert_shape = self.dense_shape, self.expert_shape
        if replicate_all:
            dense_shape, expert_shape = _as_replicas(dense_shape), _as_replicas(expert_shape)
        dense = init_device_mesh(device_type, dense_shape, mesh_dim_names=DENSE_AXES)
        grid = expert = None
        if self.context_parallel_size > 1:
            grid = init_device_mesh(device_type, self.grid_shape, mesh_dim_names=GRID_AXES)
        if with_experts:
            expert = init_device_mesh(device_type, expert_shape, mesh_dim_names=EXPERT_AXES)
        if timeout is not None:
            # New groups do not inherit the timeout of `init_process_group`: a hung peer would block for half an hour.
            for mesh in (dense, grid, expert):
                for group in mesh.get_all_groups() if mesh is not None else ():
                    _set_pg_timeout(timeout, group)
        return Meshes(dims=self, dense=dense, grid=grid, expert=expert)

    def _suggestion(self) -> str:
        if self.world_size % self.model_parallel_size == 0:
            return f"Set data_parallel_size to {self.world_size // self.model_parallel_size} or 'auto'."
        needed = self.data_parallel_size * self.model_parallel_size
        fixed = self.pipeline_parallel_size * self.context_parallel_size
        tensor = [size for size in divisors(self.world_size) if self.world_size % (size * fixed) == 0]
        advice = f"Start {needed} processes"
        if tensor:
            advice += f", or choose tensor_parallel_size from {tensor} and data_parallel_size 'auto'"
        return advice + "."


def _as_replicas(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sharding axis (third) folded into the replicating one (second)."""
    stages, replicas, shards, last = shape
    return (stages, replicas * shards, 1, last)


@dataclass(frozen=True)
class Meshes:
    """The process groups of one run, cut from one grid (see `ParallelDims`).

    Attributes:
        dense: Where parameters live: `DENSE_AXES`.
        grid: All axes apart; None without context parallelism, which alone needs it.
        expert: Where experts live: `EXPERT_AXES`; None for a model without experts.
    """

    dims: ParallelDims
    dense: DeviceMesh
    grid: DeviceMesh | None
    expert: DeviceMesh | None

    @property
    def tensor(self) -> DeviceMesh:
        """Tensor-parallel axis of this rank."""
        return self.dense["tp"]

    @property
    def pipeline(self) -> DeviceMesh:
        """Pipeline axis of this rank: one rank a stage."""
        return self.dense["pp"]

    @property
    def context(self) -> DeviceMesh:
        """Context axis of this rank: the ranks that share its sequences.

        Raises:
            RuntimeError: There is no context parallelism.
        """
        if self.grid is None:
            raise RuntimeError("context_parallel_size is 1: there is no context axis.")
        return self.grid["cp"]

    @property
    def sharding(self) -> DeviceMesh:
        """What `fully_shard` gets: `fsdp`, or `(dp_replicate, fsdp)` for replicas of shards."""
        return _sharding_axes(self.dense, "fsdp")

    @property
    def expert_sharding(self) -> DeviceMesh:
        """What `fully_shard` gets for experts: `efsdp`, or `(dp_replicate, efsdp)`."""
        assert self.expert is not None
        return _sharding_axes(self.expert, "efsdp")

    @property
    def pipeline_rank(self) -> int:
        """This rank's place on the pipeline axis, from 0."""
        return self.pipeline.get_local_rank()

    def model_peers(self) -> list[int]:
        """Global ranks with this rank's data coordinate: they must be handed the same samples."""
        here = self.dims.data_rank(torch.distributed.get_rank())
        return [rank for rank in range(self.dims.world_size) if self.dims.data_rank(rank) == here]


def _sharding_axes(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    return mesh["dp_replicate", axis] if mesh["dp_replicate"].size() > 1 else mesh[axis]


def check_size(name: str, size: object) -> None:
    """Refuses what is no number of ranks.

    Raises:
        ConfigurationError: naming the setting.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        auto = "" if name == "replicate_size" else ", or 'auto'"
        raise ConfigurationError(f"{name}={size!r} must be a whole number of at least 1{auto}.")
