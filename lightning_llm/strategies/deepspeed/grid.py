"""The process groups of a run, as DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist

from lightning_llm.strategies.mesh import Meshes


class Grid:
    """What DeepSpeed and Megatron-LM call the `mpu`, over the meshes of this run.

    Data ranks are all that average gradients: those with other samples, and those with other tokens of the same ones.

    Attributes:
        replica: Those of them that are one replica; None where there is one alone.
    """

    def __init__(self, meshes: Meshes) -> None:
        replicas, shards = meshes.dense["dp_replicate"], meshes.dense["fsdp"]
        both = meshes.dense["dp_replicate", "fsdp"]._flatten() if replicas.size() > 1 else shards
        self._data, self._tensor = both.get_group(), meshes.tensor.get_group()
        self.replica = shards.get_group() if replicas.size() > 1 else None

    def take_up(self) -> None:
        """Has DeepSpeed gather parameters within replicas (its hpZ), if there are several.

        DeepSpeed keeps one such group in a global variable, which it makes of neighbouring ranks unless there is one,
        an earlier run's too.
        """
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = self.replica

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that average gradients."""
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The same by their global numbers."""
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share each layer's matrices."""
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return dist.get_rank(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self._tensor)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
