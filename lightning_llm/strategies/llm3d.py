"""`Trainer(strategy="llm3d")`: data, tensor and pipeline parallelism, composed in one fixed order.

This file is the lifecycle only. Each axis is a free function in a file of its own; here stands when it is called.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lightning_llm.checkpoint import distributed as checkpoint_format
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.weights import load_weights
from lightning_llm.strategies.launcher import ProcessLauncher, die_with_launcher, first_to_fail
from lightning_llm.strategies.mesh import Meshes, ParallelDims, Size, recommended_sizes
from lightning_llm.strategies.optimization import LLMPrecision, PipelineOptimization, align_gradients, gradient_norm
from lightning_llm.strategies.pipeline import (
    AliasedSource,
    Pipeline,
    add_tied_gradients,
    choose_microbatches,
    ends_group,
    keep_stage,
)
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.sharding import apply_sharding, local_shard, shard_without_plan
from lightning_llm.strategies.tensor import apply_tensor_parallel, logits_context, retie, to_plain


class LLM3DStrategy(ParallelStrategy):
    """Trains any LightningModule in data, tensor and pipeline parallelism, on FSDP2 and DTensor.

    The module's `model` is cut as its `ParallelPlan` says; a module without a plan trains under sharded data parallelism.
    Every size is a number of ranks or "auto"; together they multiply to the number of processes. Logging, validation,
    callbacks, clipping and accumulation behave as under any Lightning strategy: all ranks see the same loss.

    Args:
        data_parallel_size: Ranks with different samples; "auto" takes what the other axes leave.
        tensor_parallel_size: Ranks that share each layer's matrices; "auto" goes by the model's size.
        pipeline_parallel_size: Stages that share the layers; "auto" goes by the model's size.
        replicate_size: Replicas among the data ranks (hybrid sharding); 1 shards over all of them.
        zero_stage: 3 frees gathered parameters after their forward, 2 keeps them until their backward. A pipeline keeps
            them always, since it would otherwise gather once per microbatch.
        microbatches: Microbatches per batch of a data rank in a pipeline, or "auto".
        sequence_parallel: Split activations between the blocks over the tensor axis, along the sequence.
        process_group_backend: "nccl", "gloo", ...; None chooses by device.
        timeout: Of collectives.

    Raises:
        ConfigurationError: at construction, or before any process is started, where sizes, model and batch do not fit.
    """

    def __init__(
        self,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = 1,
        pipeline_parallel_size: Size = 1,
        replicate_size: int = 1,
        zero_stage: Literal[2, 3] = 3,
        microbatches: int | Literal["auto"] = "auto",
        sequence_parallel: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__()
        if zero_stage not in (2, 3):
            raise ConfigurationError(f"zero_stage={zero_stage!r} must be 2 or 3.")
        self.data_parallel_size = data_parallel_size
        self.tensor_parallel_size = tensor_parallel_size
        self.pipeline_parallel_size = pipeline_parallel_size
        self.replicate_size = replicate_size
        self.zero_stage = zero_stage
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.num_nodes = 1
        self.dims: ParallelDims | None = None
        self.plan: ParallelPlan | None = None
        self.pipeline: Pipeline | None = None
        self._meshes: Meshes | None = None
        self._tied_group: dist.ProcessGroup | None = None
        self._parallelized: nn.Module | None = None
        self._batch_compared = False

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """Device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

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
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data coordinates for samplers: ranks that share a sample's work get the same `rank`."""
        dims = self.meshes.dims
        return {"num_replicas": dims.data_parallel_size, "rank": dims.data_rank(self.global_rank)}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        die_with_launcher()
        if "auto" not in (self.tensor_parallel_size, self.pipeline_parallel_size):
            self._resolve_dims(None)
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = ProcessLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, self._check_before_launch
            )

    def _check_before_launch(self, trainer: pl.Trainer, *arguments: Any, **_: Any) -> None:
        """Finds what cannot work while there is one process only: nothing has to be torn down, one message is shown."""
        datamodules = [a for a in (*arguments, trainer.datamodule) if isinstance(a, pl.LightningDataModule)]
        self._check(trainer, next(iter(datamodules), None))

    def _check(self, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None) -> None:
        build_model = getattr(self.lightning_module, "build_model", None)
        model = getattr(self.lightning_module, "model", None)
        if not isinstance(model, nn.Module) and build_model is not None:
            with torch.device("meta"):
                model = build_model()
        dims = self._resolve_dims(model)
        if isinstance(model, nn.Module) and self._parallelized is None:
            self._plan_for(model, dims)
        if datamodule is not None and hasattr(datamodule, "check"):
            datamodule.check(dims.data_parallel_size, trainer.accumulate_grad_batches)
            self._check_batch(datamodule, dims, trainer.accumulate_grad_batches)

    def _resolve_dims(self, model: nn.Module | None) -> ParallelDims:
        tensor, pipeline = self.tensor_parallel_size, self.pipeline_parallel_size
        world_size = self.num_nodes * self.num_processes
        if "auto" in (tensor, pipeline):
            plan = plan_of(model) if model is not None else None
            wanted = (1, 1)
            if model is not None and plan is not None:
                wanted = recommended_sizes(
                    sum(parameter.numel() for parameter in model.parameters()),
                    world_size,
                    self.num_processes,
                    tensor_divides=plan.tensor_divides.values(),
                    num_units=len(list(model.get_submodule(plan.pipeline_units).children())),
                )
            tensor = wanted[0] if tensor == "auto" else tensor
            pipeline = wanted[1] if pipeline == "auto" else pipeline
        if self.dims is None:
            self.dims = ParallelDims.resolve(
                world_size,
                data_parallel_size=self.data_parallel_size,
                replicate_size=self.replicate_size,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
            )
        return self.dims

    def _plan_for(self, model: nn.Module, dims: ParallelDims) -> ParallelPlan | None:
        plan = plan_of(model)
        if plan is None and dims.model_parallel_size > 1:
            raise ConfigurationError(
                f"{dims.arithmetic()}: tensor and pipeline parallelism need a plan, and {type(model).__name__} has none. "
                "Give it a method `parallel_plan()` that returns a lightning_llm.strategies.plan.ParallelPlan, or train with "
                "data parallelism alone."
            )
        if plan is not None:
            plan.check(
                model,
                tensor_parallel_size=dims.tensor_parallel_size,
                pipeline_parallel_size=dims.pipeline_parallel_size,
            )
        return plan

    def _check_batch(self, datamodule: Any, dims: ParallelDims, accumulate: int) -> None:
        batch_size, seq_len = (getattr(datamodule, name, None) for name in ("batch_size", "seq_len"))
        if batch_size is not None and dims.pipeline_parallel_size > 1:
            local = batch_size // (dims.data_parallel_size * accumulate)
            choose_microbatches(self.microbatches, local, dims.pipeline_parallel_size)
        if seq_len is not None:
            self._check_sequence(seq_len, dims)

    def _check_sequence(self, seq_len: int, dims: ParallelDims) -> None:
        if self.sequence_parallel and seq_len % dims.tensor_parallel_size:
            raise ConfigurationError(
                f"sequence length({seq_len}) is not divisible by tensor_parallel_size({dims.tensor_parallel_size}), which "
                "sequence parallelism needs. Change the sequence length, or set sequence_parallel to false."
            )

    def setup_environment(self) -> None:
        """Connects the processes and cuts the meshes. Every rank calls it; a second call does nothing."""
        super().setup_environment()
        if self._meshes is not None:
            return
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._check(trainer, trainer.datamodule)
        reset_seed()
        self._set_world_ranks()
        assert self.cluster_environment is not None
        backend = self.process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
        device_id = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(self.cluster_environment, backend, timeout=self.timeout, device_id=device_id)
        assert self.dims is not None
        self._meshes = self.dims.build(self.root_device.type)
        rank_zero_info(self.dims.draw())

    def _set_world_ranks(self) -> None:
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank

    # -- the model ----------------------------------------------------------------------------------------------------

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """`trainer.init_module(empty_init=True)` builds on the meta device: weights come after everything is cut."""
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: pl.Trainer) -> None:
        """Parallelises the model, makes the optimizers, and fits the loops to a pipeline."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if self._parallelized is not self.lightning_module:
            self._parallelize(self.lightning_module)
            self._parallelized = self.lightning_module
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if self.pipeline is not None:
            PipelineOptimization.install(trainer)
        # Inference tensors cannot be gathered into again by FSDP nor be received into by a pipeline.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    def _parallelize(self, module: pl.LightningModule) -> None:
        """The one order: split stages -> tensor -> shard -> materialise -> weights."""
        dims, meshes = self.meshes.dims, self.meshes
        model = getattr(module, "model", None)
        plan = self.plan = self._plan_for(model, dims) if isinstance(model, nn.Module) else self._plan_for(module, dims)
        target = module if plan is None else model
        assert isinstance(target, nn.Module)
        self.precision_plugin.convert_module(target)
        built = not any(parameter.is_meta for parameter in target.parameters())
        if built:
            self._copy_from_rank_zero(target)
        if plan is not None:
            if dims.pipeline_parallel_size > 1:
                self._split(module, target, plan)
            if dims.tensor_parallel_size > 1:
                apply_tensor_parallel(target, meshes.tensor, plan, sequence_parallel=self.sequence_parallel)
        if dims.data_parallel_size > 1:
            reshard = self.zero_stage == 3 and dims.pipeline_parallel_size == 1
            if plan is None:
                shard_without_plan(target, meshes.sharding, reshard_after_forward=reshard)
            else:
                units = list(target.get_submodule(plan.pipeline_units).children()) if plan.pipeline_units else []
                apply_sharding(target, units, meshes.sharding, reshard_after_forward=reshard)
        if built:
            target.to(self.root_device)
        else:
            self._materialize(module, target)

    def _split(self, module: pl.LightningModule, model: nn.Module, plan: ParallelPlan) -> None:
        for name in ("loss", "loss_denominator", "forward_loss"):
            if not callable(getattr(module, name, None)):
                raise ConfigurationError(
                    f"A pipeline needs {type(module).__name__}.{name}(); see lightning_llm.LLMModule for what it does."
                )
        keep_stage(model, plan, self.meshes.stage, self.meshes.dims.pipeline_parallel_size)
        self.pipeline = Pipeline(model, self.meshes.pipeline, self.root_device, self.microbatches)
        if plan.tied:
            self._tied_group = ends_group(self.meshes.dense)
        # The module's own training_step still runs on every rank and logs as always; what it calls is now the schedule.
        module.forward_loss = self._pipelined_loss  # type: ignore[assignment]
        module.forward = self.pipeline.forward  # type: ignore[method-assign]

    def _materialize(self, module: pl.LightningModule, model: nn.Module) -> None:
        weight_source = getattr(module, "weight_source", None)
        if weight_source is None:
            raise ConfigurationError(
                f"{type(module).__name__} built its model on the meta device but has no weight_source() to fill it from. "
                "Build it with real tensors, or add the method (see lightning_llm.LLMModule)."
            )
        model.to_empty(device=self.root_device)
        source = weight_source()
        if self.plan is not None:
            for owner, copy in self.plan.tied:
                retie(model, owner, copy)
            source = AliasedSource(source, self.plan)
        load_weights(model, source, local=local_shard)

    def _copy_from_rank_zero(self, model: nn.Module) -> None:
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)

    # -- the step -----------------------------------------------------------------------------------------------------

    def _logits_context(self) -> AbstractContextManager[None]:
        return logits_context() if self.meshes.dims.tensor_parallel_size > 1 else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step; in a pipeline it has run the backward too when it returns."""
        with self._logits_context():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step."""
        with self._logits_context():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's test step."""
        with self._logits_context():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's predict step; outputs that are split over ranks are put together."""
        return torch.utils._pytree.tree_map(to_plain, super().predict_step(*args, **kwargs))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward and its hooks; after a pipeline's schedule the hooks alone."""
        if self.pipeline is None:
            with self._logits_context():
                return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def _pipelined_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Stands in for `LLMModule.forward_loss` when the model is cut into stages."""
        module: Any = self.lightning_module
        assert self.pipeline is not None
        denominator = module.loss_denominator(batch["labels"])
        # Lightning divides the loss by this after the step; gradients made inside the step must be divided here.
        parts = module.trainer.accumulate_grad_batches if module.trainer.training else 1
        loss = self.pipeline.run(
            batch["input_ids"],
            batch["labels"],
            lambda output, target: module.loss(output, target) / (denominator * parts),
        )
        return loss * parts

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first step: are all ranks of a data coordinate handed the same samples?"""
        if not self._batch_compared:
            self._compare_batches(batch)
            self._batch_compared = True

    def _compare_batches(self, batch: Any) -> None:
        dims = self.meshes.dims
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            self._check_sequence(batch["input_ids"].shape[1], dims)
        digest = zlib.crc32(b"".join(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes() for tensor in tensors))
        digests: list[Any] = [None] * dims.world_size
        dist.all_gather_object(digests, digest)
        for rank in range(dims.world_size):
            first = next(r for r in range(dims.world_size) if dims.data_rank(r) == dims.data_rank(rank))
            if digests[rank] != digests[first]:
                raise ConfigurationError(
                    f"Ranks {first} and {rank} work on the same samples (data coordinate {dims.data_rank(rank)}) but were "
                    "handed different batches. The loader must shard by trainer.distributed_sampler_kwargs, not by the world "
                    "rank, and shuffle with the same seed on all ranks (lightning_llm.TokenDataModule does)."
                )
        if dims.data_parallel_size > 1 and len(set(digests)) == 1:
            rank_zero_warn(
                "All data ranks were handed the same batch: they do the same work. Shard the loader by "
                "trainer.distributed_sampler_kwargs."
            )

    # -- optimization ---------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's precision of the same name, with gradient norms over all axes."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, LLMPrecision):
            device_type = self.root_device.type if self.parallel_devices else "cpu"
            plugin = LLMPrecision(str(plugin.precision), device_type, self._finish_gradients, self.gradient_norm)
        self._precision_plugin = plugin

    def _finish_gradients(self) -> None:
        assert self.lightning_module is not None
        align_gradients(self.lightning_module.parameters())
        if self.pipeline is not None and self.plan is not None and self.plan.tied:
            add_tied_gradients(self.pipeline.module, self.plan, self._tied_group)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients over every axis, equal on all ranks."""
        assert self.lightning_module is not None
        copies: set[int] = set()
        if self.pipeline is not None and self.plan is not None and self._tied_group is not None and not self.pipeline.is_first:
            named = dict(self.pipeline.module.named_parameters())
            copies = {id(named[copy]) for _, copy in self.plan.tied if copy in named}
        parameters = [p for p in self.lightning_module.parameters() if id(p) not in copies]
        dims = self.meshes.dims
        return gradient_norm(parameters, dims.world_size // dims.pipeline_parallel_size)

    # -- collectives ----------------------------------------------------------------------------------------------------

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
        """Mean (or another reduction) over all ranks. Ranks of one data coordinate hold equal values, so that the mean over
        the world is the mean over the data ranks.
        """
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into the parts that this rank holds, so the model must be cut first."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` has restored the optimizers already."""
        return False

    def _aliases(self) -> dict[str, str]:
        """Names under which a tied tensor's copy is stored: its owner's."""
        tied = self.plan.tied if self.plan is not None else ()
        return {f"model.{copy}": f"model.{owner}" for owner, copy in tied}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts of the weights."""
        assert self.lightning_module is not None
        return checkpoint_format.model_state(self.lightning_module, self._aliases())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's parts of an optimizer's state, keyed by parameter names."""
        assert self.lightning_module is not None
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return checkpoint_format.optimizer_state(self.lightning_module, raw, self._aliases())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a sharded checkpoint folder; every rank writes what it holds."""
        if storage_options is not None:
            raise TypeError("LLM3DStrategy.save_checkpoint() takes no storage_options: it does not use a CheckpointIO.")
        write_assets = getattr(self.lightning_module, "write_assets", None)
        checkpoint_format.save(checkpoint, Path(self.broadcast(filepath)), write_assets=write_assets)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer states in place, whatever layout they were saved in; returns the rest."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        return checkpoint_format.load(path, self.lightning_module, self.optimizers, self._aliases())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    # -- the end ------------------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """The first rank that fails raises; the others, which see closed connections, leave quietly."""
        failed = first_to_fail(self.global_rank)
        if failed != self.global_rank:
            # This may be the process that the terminal waits for: it goes last, with the failed rank's exit code.
            code = self._launcher.wait_for(failed) if isinstance(self._launcher, ProcessLauncher) else 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def model_to_device(self) -> None:
        """Done while the model is materialised."""

    def teardown(self) -> None:
        """Ends the precision plugin and the accelerator; parameters stay where they are, for the next run of this trainer."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
