"""`Trainer(strategy="llm3d")`: data, tensor, pipeline, context and expert parallelism under Lightning's Trainer.

This file is the lifecycle only: when what is called. parallelize.py has the order in which a model is taken apart, and
each axis is a file of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from lightning_llm.models.weights import load_weights
from lightning_llm.strategies.checks import check_others, mark_as_cut, target_of
from lightning_llm.strategies.context import ContextMethod
from lightning_llm.strategies.expert import expert_gradient_factor
from lightning_llm.strategies.layout import Layout, Recompute
from lightning_llm.strategies.mesh import Size
from lightning_llm.strategies.optimization import (
    align_gradients,
    gradient_norm,
    one_optimizer_has_all,
    scale_gradients,
)
from lightning_llm.strategies.parallelize import Parts, parallelize, place_the_rest
from lightning_llm.strategies.pipeline import Pipeline
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.precision import LLMPrecision
from lightning_llm.strategies.sharding import ZeroStage, local_shard, reshard_all, set_accumulation
from lightning_llm.strategies.stages import Split
from lightning_llm.strategies.steps import ParallelSteps, check_pipelined
from lightning_llm.strategies.tensor import logits_context, retie
from lightning_llm.strategies.tied import AliasedSource, add_tied_gradients, ends_group


class LLM3DStrategy(ParallelSteps):
    """Trains any LightningModule in data, tensor, pipeline, context and expert parallelism, on FSDP2 and DTensor.

    The module's `model` is cut as its `ParallelPlan` says; a module without a plan trains under sharded data
    parallelism. Every size is a number of ranks or "auto"; data * tensor * pipeline * context is the number of
    processes, and experts are spread over those that are there. Logging, validation, callbacks, clipping and
    accumulation behave as under any Lightning strategy: all ranks see the same loss.

    Args:
        data_parallel_size: Ranks with different samples; "auto" takes what the other axes leave.
        tensor_parallel_size: Ranks that share each layer's matrices. Here and below "auto" is decided from the model,
            the processes and, where the planner knows it, the device (see `lightning-llm plan`).
        pipeline_parallel_size: Ranks that the layers are cut over, in stages.
        context_parallel_size: Ranks that share each sequence.
        expert_parallel_size: Ranks that share the experts of each layer. It divides data (without replicas) * context *
            tensor ranks, whose places it folds into its own.
        replicate_size: Replicas among the data ranks (hybrid sharding); 1 shards over all of them.
        zero_stage: What data ranks share out instead of each holding it whole: 0 nothing; 1 optimizer states; 2
            gradients too; 3 parameters too. Stages 1 and 2 differ under gradient accumulation, see `set_accumulation`.
            A pipeline keeps parameters gathered during a step in any stage, since it would otherwise gather once per
            microbatch.
        pipeline_schedule: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        pipeline_stages_per_rank: Stages that each pipeline rank has; "auto" is 2 for schedules that take several,
            else 1.
        pipeline_split: "balanced" by parameters, "even" by layers, or a list with an entry for each stage: how many
            layers, or the names of its modules. See `split_units`.
        microbatches: Microbatches per batch of a data rank in a pipeline, or "auto".
        sequence_parallel: Split activations between the blocks over the tensor axis, along the sequence.
        context_parallel_method: "allgather", "ulysses" or "ring"; see `ContextParallel`.
        recompute: "none", "selective", "full", n (every n-th block), or a memory budget below 1; see `apply_recompute`.
        compile: Compile each block with `torch.compile`.
        offload_parameters: "cpu" keeps shards of parameters, gradients and optimizer states in host memory, and updates
            them there.
        offload_optimizer: "cpu" is what `offload_parameters` implies; states alone cannot be offloaded.
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
        context_parallel_size: Size = 1,
        expert_parallel_size: Size = 1,
        replicate_size: int = 1,
        zero_stage: ZeroStage = 3,
        pipeline_schedule: str = "1F1B",
        pipeline_stages_per_rank: int | Literal["auto"] = "auto",
        pipeline_split: Split = "balanced",
        microbatches: int | Literal["auto"] = "auto",
        sequence_parallel: bool = True,
        context_parallel_method: ContextMethod = "allgather",
        recompute: Recompute = "none",
        compile: bool = False,
        offload_parameters: Literal["cpu"] | None = None,
        offload_optimizer: Literal["cpu"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            sizes={
                "data_parallel_size": data_parallel_size,
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": pipeline_parallel_size,
                "context_parallel_size": context_parallel_size,
                "expert_parallel_size": expert_parallel_size,
                "replicate_size": replicate_size,
            },
            layout=Layout(
                zero_stage=zero_stage,
                pipeline_schedule=pipeline_schedule,
                pipeline_stages_per_rank=pipeline_stages_per_rank,
                pipeline_split=pipeline_split,
                microbatches=microbatches,
                sequence_parallel=sequence_parallel,
                context_parallel_method=context_parallel_method,
                recompute=recompute,
                compile=compile,
                offload_parameters=offload_parameters,
                offload_optimizer=offload_optimizer,
            ),
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.parts: Parts | None = None
        self._tied_group: dist.ProcessGroup | None = None
        self._parallelized: nn.Module | None = None
        self._gradient_norm: Tensor | None = None
        self._one_norm = True  # whether each optimizer step is about all parameters
        self._splits_logits = False

    # -- the model --

    def setup(self, trainer: pl.Trainer) -> None:
        """Parallelises the model, makes the optimizers, and fits the loops to a pipeline."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if self._parallelized is not self.lightning_module:
            self._parallelize(self.lightning_module)
            self._parallelized = self.lightning_module
        self.barrier()
        self._begin(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            reshard_all(self.lightning_module)
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            self._one_norm = self.reduce_boolean_decision(one_optimizer_has_all(self.optimizers, self.lightning_module))
        self.setup_precision_plugin()
        self._without_inference_mode(trainer)

    def _parallelize(self, module: pl.LightningModule) -> None:
        """Takes the module's model apart, gives this rank's parts their place and their weights."""
        dims, meshes = self.meshes.dims, self.meshes
        target, plan = target_of(module, dims, self.layout)
        self.plan = plan
        self.precision_plugin.convert_module(target)
        built = not any(parameter.is_meta for parameter in target.parameters())
        if built:
            self._copy_from_rank_zero(target)
        self.parts = parallelize(
            target,
            plan,
            meshes,
            self.layout,
            device=self.root_device,
            mp_policy=self.precision_plugin.mp_policy,
        )
        self.context = self.parts.context
        if dims.world_size > 1 or self.parts.roots:
            mark_as_cut(target)
        if plan is not None and dims.pipeline_parallel_size > 1:
            self._build_pipeline(module, plan)
        check_others(module, target, dims)
        self._count_tokens(module)
        if not built:
            self._materialize(module, target)
        elif self.layout.offload_parameters is None:
            target.to(self.root_device)
        place_the_rest(module, target, self.root_device)

    def _build_pipeline(self, module: pl.LightningModule, plan: ParallelPlan) -> None:
        assert self.parts is not None
        check_pipelined(module)
        pipeline = Pipeline(
            self.parts.stages,
            self.meshes.pipeline,
            self.root_device,
            schedule=self.layout.pipeline_schedule,
            microbatches=self.layout.microbatches,
        )
        if plan.tied:
            self._tied_group = ends_group(self.meshes.dense, self.layout.schedule, self.timeout)
        self._run_in_pipeline(module, pipeline)

    def _materialize(self, module: pl.LightningModule, model: nn.Module) -> None:
        source = self._weight_source(module)
        model.to_empty(device="cpu" if self.layout.offload_parameters else self.root_device)
        if self.plan is not None:
            if self.pipeline is None:  # whose first and last stage have a copy each, wherever they are
                for owner, copy in self.plan.tied:
                    retie(model, owner, copy)
            source = AliasedSource(source, self.plan)
        load_weights(model, source, local=local_shard)

    # -- the step --

    @contextmanager
    def _step_context(self) -> Generator[None, None, None]:
        """Logits may be split over the vocabulary, in forward and backward."""
        if self.meshes.dims.tensor_parallel_size == 1 or self._splits_logits:  # within manual_backward it is on already
            yield
            return
        self._splits_logits = True
        try:
            with logits_context():
                yield
        finally:
            self._splits_logits = False

    def _accumulate(self, *, last: bool) -> None:
        assert self.parts is not None
        set_accumulation(self.parts.roots, self.layout.zero_stage, last=last)

    # -- optimization --

    @property
    def precision_plugin(self) -> LLMPrecision:
        """Lightning's precision of the same name, with mixed precision and gradient norms over all axes."""
        # Lightning asks before it has set one, and takes what it finds then for the user's.
        return self._precision_plugin or LLMPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            plugin = plugin if isinstance(plugin, LLMPrecision) else LLMPrecision(str(plugin.precision))
            plugin.attach(self._finish_gradients, self.gradient_norm)
        self._precision_plugin: LLMPrecision | None = plugin

    def _finish_gradients(self) -> None:
        assert self.lightning_module is not None
        if not self._unfinished:  # clip_gradients() of manual optimization comes before the step that would do it
            return
        self._unfinished = False
        self._gradient_norm = None
        align_gradients(self.lightning_module.parameters())
        if self.pipeline is not None and self.plan is not None and self.plan.tied:
            add_tied_gradients(self._decoder, self.plan, self._tied_group)
        if self.parts is not None and self.parts.experts:
            factor = expert_gradient_factor(self.meshes.dims, sequence_parallel=self.layout.sequence_parallel)
            scale_gradients((p for module in self.parts.experts for p in module.parameters()), factor)
        weight = self._tokens.close(self.lightning_module.trainer.accumulate_grad_batches)
        if weight is not None:
            scale_gradients(self.lightning_module.parameters(), weight)

    def gradient_norm(self, parameters: list[nn.Parameter] | None = None) -> Tensor:
        """Euclidean norm of gradients over every axis, equal on all ranks; as they were before any clipping.

        Args:
            parameters: Of these; None, or where one optimizer has all: of all, computed once a step.
        """
        ranks = self.meshes.dims.ranks_per_stage
        if parameters is not None and not self._one_norm:
            wanted = {id(parameter) for parameter in parameters}
            return gradient_norm([p for p in self._owned() if id(p) in wanted], ranks, self.root_device)
        if self._gradient_norm is None:
            self._gradient_norm = gradient_norm(self._owned(), ranks, self.root_device)
        return self._gradient_norm

    def _owned(self) -> list[nn.Parameter]:
        """This rank's parameters without the last stage's copies of tensors that the first stage owns."""
        assert self.lightning_module is not None
        copies: set[int] = set()
        if self.plan is not None and self.pipeline is not None:
            named = dict(self._decoder.named_parameters())
            copies = {id(named[copy]) for _, copy in self.plan.tied if copy in named}
        return [parameter for parameter in self.lightning_module.parameters() if id(parameter) not in copies]
