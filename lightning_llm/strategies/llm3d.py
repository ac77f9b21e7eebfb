"""`Trainer(strategy="llm3d")`: data, tensor, pipeline, context and expert parallelism under Lightning's Trainer.

This file is the lifecycle only: when what is called. parallelize.py has the order in which a model is taken apart, and
each axis is a file of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.module import LLMModule
from lightning_llm.models.weights import load_weights
from lightning_llm.strategies.checks import check_others, check_plan, mark_as_cut
from lightning_llm.strategies.context import SEQUENCE_DIM, ContextMethod
from lightning_llm.strategies.expert import expert_gradient_factor
from lightning_llm.strategies.layout import Layout, Recompute
from lightning_llm.strategies.mesh import Size
from lightning_llm.strategies.optimization import (
    AccumulatedTokens,
    PipelineOptimization,
    align_gradients,
    gradient_norm,
    one_optimizer_has_all,
    scale_gradients,
)
from lightning_llm.strategies.parallelize import Parts, parallelize, place_the_rest
from lightning_llm.strategies.pipeline import Pipeline
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.precision import LLMPrecision
from lightning_llm.strategies.resumption import ResumableEpochLoop
from lightning_llm.strategies.sharding import ZeroStage, local_shard, reshard_all, set_accumulation
from lightning_llm.strategies.stages import Split
from lightning_llm.strategies.state import ShardedState
from lightning_llm.strategies.tensor import logits_context, retie, to_plain
from lightning_llm.strategies.tied import AliasedSource, add_tied_gradients, ends_group


class LLM3DStrategy(ShardedState):
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
        self.pipeline: Pipeline | None = None
        self._tied_group: dist.ProcessGroup | None = None
        self._parallelized: nn.Module | None = None
        self._scheduled_loss: Tensor | None = None
        self._gradient_norm: Tensor | None = None
        self._tokens = AccumulatedTokens()
        self._denominator: Tensor | None = None
        self._unfinished = False  # whether a backward came after gradients were finished last
        self._one_norm = True  # whether each optimizer step is about all parameters
        self._splits_logits = False

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
            reshard_all(self.lightning_module)
            self._tokens = AccumulatedTokens()
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            self._one_norm = self.reduce_boolean_decision(one_optimizer_has_all(self.optimizers, self.lightning_module))
            ResumableEpochLoop.install(trainer)
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
        """Takes the module's model apart, gives this rank's parts their place and their weights."""
        dims, meshes = self.meshes.dims, self.meshes
        model = getattr(module, "model", None)
        plan = self.plan = check_plan(model if isinstance(model, nn.Module) else module, dims, self.layout)
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
        self.parts = parallelize(
            target,
            plan,
            meshes,
            self.layout,
            device=self.root_device,
            mp_policy=self.precision_plugin.mp_policy,
        )
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
        if isinstance(module, LLMModule) and type(module).forward_loss is not LLMModule.forward_loss:
            raise ConfigurationError(
                f"{type(module).__name__} overrides forward_loss(), which a pipeline replaces by its schedule. "
                "Override loss(), which it calls for each microbatch."
            )
        self.pipeline = Pipeline(
            self.parts.stages,
            self.meshes.pipeline,
            self.root_device,
            schedule=self.layout.pipeline_schedule,
            microbatches=self.layout.microbatches,
        )
        if plan.tied:
            self._tied_group = ends_group(self.meshes.dense, self.layout.schedule, self.timeout)
        # The module's own training_step still runs on every rank and logs as always; what it calls is now the schedule.
        module.forward_loss = self._pipelined_loss  # type: ignore[assignment]
        module.forward = self.pipeline.forward  # type: ignore[method-assign]

    def _count_tokens(self, module: pl.LightningModule) -> None:
        """Has the module's own count of valid tokens weigh the batches of one optimizer step against each other."""
        count = getattr(module, "loss_denominator", None)
        if callable(count):

            def counted(labels: Tensor) -> Tensor:
                self._denominator = count(labels)
                return self._denominator

            module.loss_denominator = counted  # type: ignore[assignment]

    def _materialize(self, module: pl.LightningModule, model: nn.Module) -> None:
        weight_source = getattr(module, "weight_source", None)
        if weight_source is None:
            raise ConfigurationError(
                f"{type(module).__name__} built its model on the meta device but has no weight_source() to fill it "
                "from. Build it with real tensors, or add the method (see lightning_llm.LLMModule)."
            )
        model.to_empty(device="cpu" if self.layout.offload_parameters else self.root_device)
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

    @contextmanager
    def _logits_context(self) -> Generator[None, None, None]:
        if self.meshes.dims.tensor_parallel_size == 1 or self._splits_logits:  # within manual_backward it is on already
            yield
            return
        self._splits_logits = True
        try:
            with logits_context():
                yield
        finally:
            self._splits_logits = False

    def _share(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A step's arguments with the batch checked and cut to what this rank computes of it."""
        batch, *rest = arguments
        self.check_batch(batch)
        if self.parts is not None and self.parts.context is not None:
            batch = self.parts.context.shard_batch(batch)
        return (batch, *rest)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step; in a pipeline it has run the backward too when it returns."""
        assert self.lightning_module is not None and self.parts is not None
        args = self._share(args)
        self._scheduled_loss = self._denominator = None
        if self._accumulates:
            last = not self.lightning_module.trainer.fit_loop.epoch_loop._should_accumulate()
            set_accumulation(self.parts.roots, self.layout.zero_stage, last=last)
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
        args = self._share(args)
        with self._logits_context():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's test step."""
        args = self._share(args)
        with self._logits_context():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's predict step; outputs that are split over ranks are put together."""
        args = self._share(args)
        output = tree_map(to_plain, super().predict_step(*args, **kwargs))
        context = self.parts.context if self.parts is not None else None
        if context is None or context.positions is None:
            return output
        share = len(context.positions)

        def whole(leaf: Any) -> Any:
            along_sequence = isinstance(leaf, Tensor) and leaf.ndim > SEQUENCE_DIM and leaf.shape[SEQUENCE_DIM] == share
            return context.gather_sequence(leaf) if along_sequence else leaf

        return tree_map(whole, output)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward and its hooks; after a pipeline's schedule the hooks alone."""
        self._unfinished = True
        if self.pipeline is None:
            if self._denominator is not None and self._accumulates:
                closure_loss = closure_loss * self._weight(self._denominator)
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
        factor: Any = 1.0
        if module.trainer.training:
            # Lightning divides the loss after the step; gradients made inside the step must be divided here.
            factor = self.precision_plugin.loss_scale / module.trainer.accumulate_grad_batches
            if self._accumulates:
                factor = factor * self._weight(denominator)
        loss = self.pipeline.run(
            batch["input_ids"],
            batch["labels"],
            lambda output, target: module.loss(output, target) / denominator * factor,
            **getattr(module, "model_keywords", lambda _: {})(batch),
        )
        self._scheduled_loss = loss / factor
        return self._scheduled_loss

    # -- optimization --

    @property
    def _decoder(self) -> nn.Module:
        model = getattr(self.lightning_module, "model", None)
        assert isinstance(model, nn.Module)
        return model

    @property
    def _accumulates(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.accumulate_grad_batches > 1

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

    def _weight(self, tokens: Tensor) -> Tensor:
        """Of a batch among those of one optimizer step; its routers' losses get it too."""
        weight = self._tokens.add(self.reduce(tokens, reduce_op="mean"))
        scale = getattr(getattr(getattr(self.lightning_module, "model", None), "router_losses", None), "scale", None)
        if isinstance(scale, Tensor):
            scale.mul_(weight)
        return weight

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

    # -- the end --

    def model_to_device(self) -> None:
        """Done while the model is materialised."""

    def teardown(self) -> None:
        """Ends precision plugin and accelerator; parameters stay where they are, for this trainer's next run."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self._random_state = None  # not taken up where there was nothing left to train
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
