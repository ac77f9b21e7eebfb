"""`Trainer(strategy="llm3d")`: data, tensor and pipeline parallelism, composed in one fixed order.

This file is the lifecycle only. Each axis is a free function in a file of its own; here stands when it is called.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_llm.checkpoint import distributed as checkpoint_format
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.weights import load_weights
from lightning_llm.strategies.checks import check_plan, mark_as_cut
from lightning_llm.strategies.mesh import Size
from lightning_llm.strategies.optimization import (
    LLMPrecision,
    PipelineOptimization,
    align_gradients,
    gradient_norm,
)
from lightning_llm.strategies.pipeline import Pipeline
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.processes import ProcessGrid
from lightning_llm.strategies.schedules import schedule_kind
from lightning_llm.strategies.sharding import apply_sharding, local_shard, shard_without_plan
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tensor import apply_tensor_parallel, logits_context, retie, to_plain
from lightning_llm.strategies.tied import AliasedSource, add_tied_gradients, ends_group


class LLM3DStrategy(ProcessGrid):
    """Trains any LightningModule in data, tensor and pipeline parallelism, on FSDP2 and DTensor.

    The module's `model` is cut as its `ParallelPlan` says; a module without a plan trains under sharded data
    parallelism. Every size is a number of ranks or "auto"; together they multiply to the number of processes.
    Logging, validation, callbacks, clipping and accumulation behave as under any Lightning strategy: all ranks see
    the same loss.

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
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            replicate_size=replicate_size,
            microbatches=microbatches,
            sequence_parallel=sequence_parallel,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if zero_stage not in (2, 3):
            raise ConfigurationError(f"zero_stage={zero_stage!r} must be 2 or 3.")
        if microbatches != "auto" and (not isinstance(microbatches, int) or microbatches < 1):
            raise ConfigurationError(f"microbatches={microbatches!r} must be a whole number of at least 1, or 'auto'.")
        self.zero_stage = zero_stage
        self.plan: ParallelPlan | None = None
        self.pipeline: Pipeline | None = None
        self._tied_group: dist.ProcessGroup | None = None
        self._parallelized: nn.Module | None = None
        self._scheduled_loss: Tensor | None = None
        self._gradient_norm: Tensor | None = None

    # -- the model --

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
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False

    def _parallelize(self, module: pl.LightningModule) -> None:
        """The one order: split stages -> tensor -> shard -> materialise -> weights."""
        dims, meshes = self.meshes.dims, self.meshes
        model = getattr(module, "model", None)
        plan = self.plan = check_plan(model if isinstance(model, nn.Module) else module, dims)
        target = module if plan is None else model
        if not isinstance(target, nn.Module):
            raise ConfigurationError(
                f"{type(module).__name__} has a parallel_plan but no `model`. Put the network into self.model, and the "
                "plan on it."
            )
        self.precision_plugin.convert_module(target)
        built = not any(parameter.is_meta for parameter in target.parameters())
        if built:
            self._copy_from_rank_zero(target)
        parts: list[nn.Module] = [target]  # what runs by itself: the whole model, or each of this rank's stages
        if plan is not None:
            if dims.pipeline_parallel_size > 1:
                parts = self._split(module, target, plan)
            if dims.tensor_parallel_size > 1:
                for part in parts:
                    apply_tensor_parallel(part, meshes.tensor, plan, sequence_parallel=self.sequence_parallel)
        if dims.world_size > 1:
            mark_as_cut(target)
        if dims.data_parallel_size > 1:
            reshard = self.zero_stage == 3 and dims.pipeline_parallel_size == 1
            if plan is None:
                shard_without_plan(target, meshes.sharding, reshard_after_forward=reshard)
            else:
                for part in parts:
                    apply_sharding(part, plan.units(part), meshes.sharding, reshard_after_forward=reshard)
        if built:
            target.to(self.root_device)
        else:
            self._materialize(module, target)

    def _split(self, module: pl.LightningModule, model: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"{type(module).__name__} sets automatic_optimization=False. A pipeline runs the backward within its "
                "schedule, so manual_backward() would do nothing: use automatic optimization."
            )
        for name in ("loss", "loss_denominator", "forward_loss"):
            if not callable(getattr(module, name, None)):
                raise ConfigurationError(
                    f"A pipeline needs {type(module).__name__}.{name}(); see lightning_llm.LLMModule for what it does."
                )
        ranks, kind = self.meshes.dims.pipeline_parallel_size, schedule_kind("1F1B")
        stages_per_rank = kind.resolve_stages_per_rank("auto")
        stages = keep_stages(
            model,
            plan,
            kind.stage_ids(self.meshes.stage, ranks, stages_per_rank),
            split_units(plan, model, ranks * stages_per_rank),
        )
        self.pipeline = Pipeline(
            stages, self.meshes.pipeline, self.root_device, schedule=kind.name, microbatches=self.microbatches
        )
        if plan.tied:
            self._tied_group = ends_group(self.meshes.dense, kind, self.timeout)
        # The module's own training_step still runs on every rank and logs as always; what it calls is now the schedule.
        module.forward_loss = self._pipelined_loss  # type: ignore[assignment]
        module.forward = self.pipeline.forward  # type: ignore[method-assign]
        return list(stages.values())

    def _materialize(self, module: pl.LightningModule, model: nn.Module) -> None:
        weight_source = getattr(module, "weight_source", None)
        if weight_source is None:
            raise ConfigurationError(
                f"{type(module).__name__} built its model on the meta device but has no weight_source() to fill it "
                "from. Build it with real tensors, or add the method (see lightning_llm.LLMModule)."
            )
        model.to_empty(device=self.root_device)
        source = weight_source()
        if self.plan is not None:
            if self.pipeline is None:  # whose first and last stage have a copy each, wherever they are
                for owner, copy in self.plan.tied:
                    retie(model, owner, copy)
            source = AliasedSource(source, self.plan)
        load_weights(model, source, local=local_shard)

    def _copy_from_rank_zero(self, model: nn.Module) -> None:
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                sent = tensor.data.to(self.root_device)  # one at a time: NCCL takes tensors of its devices only
                dist.broadcast(sent, src=0)
                tensor.data.copy_(sent)

    # -- the step --

    def _logits_context(self) -> AbstractContextManager[None]:
        return logits_context() if self.meshes.dims.tensor_parallel_size > 1 else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step; in a pipeline it has run the backward too when it returns."""
        self.check_first_batch(args[0])
        self._scheduled_loss = None
        with self._logits_context():
            output = tree_map(to_plain, super().training_step(*args, **kwargs))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.pipeline is not None and (loss is None or loss is not self._scheduled_loss):
            raise ConfigurationError(
                f"{type(self.lightning_module).__name__}.training_step() must return the value of forward_loss(batch) "
                "as it is: a pipeline has run the backward by then, so another loss would have no effect. Put what you "
                "add to the loss into loss(), which the pipeline calls for each microbatch."
            )
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step."""
        self.check_first_batch(args[0])
        with self._logits_context():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's test step."""
        self.check_first_batch(args[0])
        with self._logits_context():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's predict step; outputs that are split over ranks are put together."""
        self.check_first_batch(args[0])
        return tree_map(to_plain, super().predict_step(*args, **kwargs))

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
        self._scheduled_loss = loss * parts
        return self._scheduled_loss

    # -- optimization --

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's precision of the same name, with gradient norms over all axes."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, LLMPrecision):
            plugin = LLMPrecision(
                str(plugin.precision), lambda: self.root_device.type, self._finish_gradients, self.gradient_norm
            )
        self._precision_plugin = plugin

    def _finish_gradients(self) -> None:
        assert self.lightning_module is not None
        self._gradient_norm = None
        align_gradients(self.lightning_module.parameters())
        if self.pipeline is not None and self.plan is not None and self.plan.tied:
            model: Any = self.lightning_module.model
            add_tied_gradients(model, self.plan, self._tied_group)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients over every axis, equal on all ranks; as they were before any clipping."""
        if self._gradient_norm is None:
            dims = self.meshes.dims
            self._gradient_norm = gradient_norm(self._owned(), dims.world_size // dims.pipeline_parallel_size)
        return self._gradient_norm

    def _owned(self) -> list[nn.Parameter]:
        """This rank's parameters without the last stage's copies of tensors that the first stage owns."""
        assert self.lightning_module is not None
        copies: set[int] = set()
        if self.plan is not None and self.pipeline is not None:
            named = dict(self.lightning_module.model.named_parameters())  # type: ignore[union-attr, operator]
            copies = {id(named[copy]) for _, copy in self.plan.tied if copy in named}
        return [parameter for parameter in self.lightning_module.parameters() if id(parameter) not in copies]

    # -- checkpoints --

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
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING  # validation must not touch optimizers
        optimizers = self.optimizers if fitting else []
        return checkpoint_format.load(path, self.lightning_module, optimizers, self._aliases())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    # -- the end --

    def model_to_device(self) -> None:
        """Done while the model is materialised."""

    def teardown(self) -> None:
        """Ends precision plugin and accelerator; parameters stay where they are, for this trainer's next run."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
