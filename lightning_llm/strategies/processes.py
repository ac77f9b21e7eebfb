"""The processes of a run: how many, who is who, what is checked before they start, and what they say to each other.

`ProcessGrid` is the half of a strategy that does not touch the model; llm3d.py adds the other half.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from lightning_llm.resilience.environment import ELASTIC_VARIABLE
from lightning_llm.strategies.automatic import Workload, resolve_dims
from lightning_llm.strategies.checks import (
    check_data,
    check_plan,
    check_schedule,
    check_sequence,
    compare_batches,
    model_in_outline,
    sequence_length,
)
from lightning_llm.strategies.launcher import ProcessLauncher, die_with_launcher, first_to_fail
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import Meshes, ParallelDims, Size
from lightning_llm.strategies.tensor import to_plain


class ProcessGrid(ParallelStrategy):
    """Starts, connects and arranges the processes.

    Args:
        sizes: `data_parallel_size` and the other sizes by name, each a number or "auto".
        layout: The other settings of the layout.
        process_group_backend: See `LLM3DStrategy`.
        timeout: See `LLM3DStrategy`.
    """

    def __init__(
        self,
        *,
        sizes: Mapping[str, Size],
        layout: Layout,
        process_group_backend: str | None,
        timeout: timedelta,
    ) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        if ELASTIC_VARIABLE in os.environ:  # nodes come and go: the other sizes stay, this one takes what there is
            self.sizes["data_parallel_size"] = "auto"
        self.layout = layout
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.num_nodes = 1
        self.dims: ParallelDims | None = None
        self._meshes: Meshes | None = None
        self._with_experts = False
        self._stages_checked: set[RunningStage | None] = set()

    @property
    def root_device(self) -> torch.device:
        """Device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def _backend(self) -> str:
        return self.process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or ())

    @property
    def is_distributed(self) -> bool:
        """Tells Lightning to give plain DataLoaders a DistributedSampler."""
        return True

    @property
    def meshes(self) -> Meshes:
        """Process groups of every axis, once the processes are connected."""
        if self._meshes is None:
            raise RuntimeError("The meshes exist once the processes are connected: from LightningModule.setup() on.")
        return self._meshes

    @property
    def ranks_per_sequence(self) -> int:
        """Among how many ranks the tokens of a sequence are split, as far as losses are averaged over them."""
        return self.meshes.dims.context_parallel_size

    @property
    def gradient_ranks(self) -> int:
        """Ranks with tokens of their own, over which gradients and losses are averaged."""
        return self.meshes.dims.gradient_ranks

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data coordinates for samplers: ranks that share a sample's work get the same `rank`."""
        dims = self.meshes.dims
        return {"num_replicas": dims.data_parallel_size, "rank": dims.data_rank(self.global_rank)}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        die_with_launcher()
        if all(size != "auto" for name, size in self.sizes.items() if name != "data_parallel_size"):
            self.dims = self._resolve_dims(None, None)
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = ProcessLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, self._check_before_launch
            )

    def _check_before_launch(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Finds what cannot work while there is one process only: nothing has to be torn down, one message is shown."""
        candidates = (*arguments, getattr(trainer, "datamodule", None))
        datamodules = [argument for argument in candidates if isinstance(argument, pl.LightningDataModule)]
        self._check(trainer, next(iter(datamodules), None))

    def _check(self, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None) -> None:
        if self._meshes is not None:  # an earlier run of this trainer was checked, and its model is cut by now
            return
        assert self.lightning_module is not None
        model = model_in_outline(self.lightning_module)
        self.dims = self._resolve_dims(model, datamodule)
        check_schedule(self.dims, self.layout, self._backend)
        if model is not None:
            plan = check_plan(model, self.dims, self.layout)
            self._with_experts = plan is not None and plan.num_experts > 0 and self.dims.world_size > 1
        check = getattr(self.lightning_module, "check", None)
        if callable(check):
            check(datamodule)
        if datamodule is not None:
            check_data(
                datamodule,
                self.dims,
                self.layout,
                accumulate=trainer.accumulate_grad_batches,
            )

    def _resolve_dims(self, model: nn.Module | None, datamodule: pl.LightningDataModule | None) -> ParallelDims:
        workload = Workload.on(
            self.root_device,
            layout=self.layout,
            precision=str(self.precision_plugin.precision),
            seq_len=getattr(datamodule, "seq_len", None),
            global_batch=getattr(datamodule, "batch_size", None),
        )
        return resolve_dims(
            model,
            self.sizes,
            world_size=self.num_nodes * self.num_processes,
            devices_per_node=self.num_processes,
            workload=workload,
        )

    def setup_environment(self) -> None:
        """Connects the processes and cuts the meshes. Every rank calls it; a second call does nothing."""
        super().setup_environment()
        if self._meshes is not None:
            return
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._check(trainer, getattr(trainer, "datamodule", None))
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        device_id = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(self.cluster_environment, self._backend, timeout=self.timeout, device_id=device_id)
        assert self.dims is not None
        self._meshes = self.dims.build(
            self.root_device.type,
            self.timeout,
            with_experts=self._with_experts,
            replicate_all=self.layout.replicates_all,
        )
        rank_zero_info(self.dims.draw())

    def set_world_ranks(self) -> None:
        """Tells Lightning's environment and its rank-zero helpers who this process is."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def check_batch(self, batch: Any) -> None:
        """Does a batch fit? And before the first step of training, of validation, ...: do the peers have the same?

        Every loader may be wrong in its own way, and a batch that does not fit can end a process without a traceback.
        """
        assert self.lightning_module is not None
        seq_len = sequence_length(batch)
        if seq_len is not None:  # which may be another one in every batch
            check_sequence(seq_len, self.meshes.dims, self.layout)
        stage = self.lightning_module.trainer.state.stage
        if stage in self._stages_checked:
            return
        self._stages_checked.add(stage)
        compare_batches(batch, self.meshes.dims)

    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks."""
        if _distributed_is_initialized():
            dist.barrier(device_ids=[self.root_device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """`obj` of rank `src`, on all ranks."""
        if not _distributed_is_initialized():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Mean (or another reduction) over the data and context ranks, the same to the last bit on all ranks.

        Tensor and pipeline ranks hold equal values: mean, maximum and minimum over the world are those over the others,
        and a sum has each value as often as ranks repeat it.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        reduced = to_plain(tensor).detach().to(self.root_device, copy=True)
        if not _distributed_is_initialized():
            return reduced
        kind = reduce_op.lower() if isinstance(reduce_op, str) else str(reduce_op).rpartition(".")[2].lower()
        kind = {"avg": "mean"}.get(kind, kind)
        if kind == "mean" and not reduced.is_floating_point():
            reduced = reduced.to(torch.get_default_dtype())
        # No barrier before it, as Lightning's own has: an all-reduce waits for all ranks anyway.
        operation = dist.ReduceOp.SUM if kind == "mean" else getattr(dist.ReduceOp, kind.upper())
        dist.all_reduce(reduced, op=operation, group=group)
        if kind == "mean":
            reduced /= dist.get_world_size(group)
        elif kind == "sum" and self._meshes is not None:
            # Context ranks have a part of the tokens each; pipeline and tensor ranks repeat what they share.
            dims = self._meshes.dims
            copies = dims.pipeline_parallel_size * dims.tensor_parallel_size
            reduced = reduced / copies if reduced.is_floating_point() else reduced // copies
        return reduced

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (or any rank) decided so; every rank has a vote here, whatever its data coordinate."""
        votes = torch.tensor(int(decision), device=self.root_device)
        if _distributed_is_initialized():
            dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    def on_exception(self, exception: BaseException) -> None:
        """The first rank that fails raises; the others, which see closed connections, leave quietly."""
        failed = first_to_fail(self.global_rank)
        if failed != self.global_rank:
            # Where all ranks fail alike they say so alike: a scheduler may see any of their exit codes.
            code = exception.code if isinstance(exception, SystemExit) and isinstance(exception.code, int) else 1
            if isinstance(self._launcher, ProcessLauncher):
                # The terminal waits for this process: it goes last, with the failed rank's exit code.
                code = self._launcher.wait_for(failed)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
