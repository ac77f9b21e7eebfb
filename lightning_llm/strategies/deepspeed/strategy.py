"""`Trainer(strategy="llm3d_deepspeed")`: the sizes and the plan of "llm3d" on DeepSpeed's engine.

This file is the lifecycle only. settings.py makes DeepSpeed's configuration, cutting.py takes the model apart,
pipeline.py runs stages, precision.py and zero.py step, state.py is what checkpoints hold.
"""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.checks import check_others, mark_as_cut, target_of
from lightning_llm.strategies.context import ContextMethod
from lightning_llm.strategies.deepspeed.cutting import Cut, cut, materialize, reduce_replicated, tell_of_experts
from lightning_llm.strategies.deepspeed.grid import Grid
from lightning_llm.strategies.deepspeed.monitoring import printed_for_debugging, quieten, watch
from lightning_llm.strategies.deepspeed.ops import import_deepspeed, prepare_ops
from lightning_llm.strategies.deepspeed.optimizers import (
    Group,
    check_optimizer,
    follow,
    for_host,
    groups_by_name,
    optimizer_of_config,
    scheduler_of_config,
    split_experts,
)
from lightning_llm.strategies.deepspeed.pipeline import SCHEDULE, EnginePipeline, pipeline_module
from lightning_llm.strategies.deepspeed.precision import BY_NORM_ALONE, DeepSpeedPrecision
from lightning_llm.strategies.deepspeed.sections import CHOSEN_LATER
from lightning_llm.strategies.deepspeed.settings import (
    EngineSettings,
    OffloadDevice,
    check_by_deepspeed,
    check_engine,
    configure_checkpointing,
    engine_config,
)
from lightning_llm.strategies.deepspeed.state import EngineState
from lightning_llm.strategies.deepspeed.zero import Gradients, follow_whole_calls
from lightning_llm.strategies.layout import Layout, Recompute
from lightning_llm.strategies.mesh import ParallelDims, Size
from lightning_llm.strategies.parallelize import place_the_rest
from lightning_llm.strategies.sharding import ZeroStage
from lightning_llm.strategies.stages import Split
from lightning_llm.strategies.steps import ParallelSteps, check_pipelined
from lightning_llm.strategies.tensor import retie
from lightning_llm.strategies.tied import AliasedSource, ends_group


class LLM3DDeepSpeedStrategy(ParallelSteps):
    """Trains any LightningModule in data, tensor, pipeline, context and expert parallelism on DeepSpeed's engine.

    The same sizes, the same `ParallelPlan`, the same checkpoints as `LLM3DStrategy`; choose this one for ZeRO-Offload,
    NVMe, or a DeepSpeed configuration that exists. Runs on CPUs (gloo) too.

    Args:
        data_parallel_size: Ranks with different samples; "auto" takes what the other axes leave.
        tensor_parallel_size: Ranks that share each layer's matrices, by DeepSpeed's AutoTP.
        pipeline_parallel_size: Ranks that the layers are cut over, by DeepSpeed's PipelineModule and its 1F1B schedule.
        context_parallel_size: Ranks that share each sequence.
        expert_parallel_size: Ranks that share the experts of each layer, over DeepSpeed's expert groups.
        replicate_size: Replicas among the data ranks: with ZeRO-3, parameters are gathered within one (its hpZ).
        zero_stage: What data ranks share out: 0 nothing; 1 optimizer states; 2 gradients too; 3 parameters too. "auto":
            what `config` says, else 1 in a pipeline, 2 with experts spread over ranks, 3 otherwise.
        pipeline_split: See `LLM3DStrategy`.
        microbatches: Microbatches per batch of a data rank in a pipeline, or "auto".
        context_parallel_method: "allgather", "ulysses" or "ring".
        recompute: See `LLM3DStrategy`.
        offload_optimizer: "cpu" keeps optimizer states in host memory and steps there (ZeRO-Offload); "nvme" keeps them
            on a disk (ZeRO-Infinity).
        offload_parameters: "cpu" or "nvme" for the parameters' shards of ZeRO-3.
        nvme_path: Folder on that disk.
        config: DeepSpeed's configuration, a mapping or the path of its JSON. What the arguments above and the Trainer
            say comes before it, and is told; all else is handed on.
        process_group_backend: "nccl", "gloo", ...; None chooses by device.
        timeout: Of collectives.

    Raises:
        ConfigurationError: at construction, or before any process is started, where sizes, model, batch and what
            DeepSpeed allows do not fit.
    """

    def __init__(
        self,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = 1,
        pipeline_parallel_size: Size = 1,
        context_parallel_size: Size = 1,
        expert_parallel_size: Size = 1,
        replicate_size: int = 1,
        zero_stage: ZeroStage | Literal["auto"] = "auto",
        pipeline_split: Split = "balanced",
        microbatches: int | Literal["auto"] = "auto",
        context_parallel_method: ContextMethod = "allgather",
        recompute: Recompute = "none",
        offload_optimizer: OffloadDevice | None = None,
        offload_parameters: OffloadDevice | None = None,
        nvme_path: str | Path | None = None,
        config: dict[str, Any] | str | Path | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        sizes: dict[str, Size] = {
            "data_parallel_size": data_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "context_parallel_size": context_parallel_size,
            "expert_parallel_size": expert_parallel_size,
            "replicate_size": replicate_size,
        }
        self.settings = EngineSettings.resolve(
            zero_stage=zero_stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            nvme_path=nvme_path,
            config=config,
            sizes=sizes,
        )
        check_engine(sizes, self.settings)
        super().__init__(
            sizes=sizes,
            layout=Layout(
                zero_stage=self.settings.zero_stage,
                pipeline_schedule=SCHEDULE,
                pipeline_split=pipeline_split,
                microbatches=microbatches,
                sequence_parallel=False,
                context_parallel_method=context_parallel_method,
                recompute=recompute,
            ),
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.engine: Any = None
        self.gradients: Gradients | None = None
        self._engine_hooks: list[RemovableHandle] = []
        self._has_cpu_adam = False
        self._optimizer: Optimizer | None = None
        self._groups: dict[str, Group] = {}
        self._split_groups: list[tuple[Group, Group]] = []
        self._cut: Cut | None = None
        self._cut_module: pl.LightningModule | None = None
        self._grid: Grid | None = None
        self._told = False  # of what the user's configuration does not decide

    def _check(self, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None) -> None:
        super()._check(trainer, datamodule)
        if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise ConfigurationError(BY_NORM_ALONE)

    def _resolve_dims(self, *arguments: Any) -> ParallelDims:
        dims = super()._resolve_dims(*arguments)
        check_engine(vars(dims), self.settings)
        return dims

    # -- the model --

    def setup(self, trainer: pl.Trainer) -> None:
        """Cuts the model, makes optimizers and engine, and fits the loops to them."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._make_ready()
        if self._cut_module is not self.lightning_module:
            self._take_apart(self.lightning_module)
            self._cut_module = self.lightning_module
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            self._take_from_config(trainer)
            self._optimizer = self._fit_optimizer(self.lightning_module)
            self._start_engine(self._optimizer)
            self.optimizers = [self.engine.optimizer]  # whose zero_grad() leaves the masters' gradients alone
        elif self.engine is None and (self.settings.zero_stage == 3 or self._is_pipelined):
            self._start_engine(None)
        self._begin(trainer)
        self.setup_precision_plugin()
        self._without_inference_mode(trainer)

    def _make_ready(self) -> None:
        """Has DeepSpeed take up the processes that are connected, with the operators that it will use."""
        deepspeed = import_deepspeed(self.root_device.type)
        settings = self.settings
        needed = ["cpu_adam"] if settings.offload_optimizer is not None else []
        if "nvme" in (settings.offload_optimizer, settings.offload_parameters):
            needed.append("async_io")
        ready = prepare_ops(needed)
        self._has_cpu_adam = self.reduce_boolean_decision("cpu_adam" in ready)
        if (
            self.precision_plugin.compute_dtype == torch.float16
            and not deepspeed.accelerator.get_accelerator().is_fp16_supported()
        ):
            raise ConfigurationError(
                f"precision={self.precision_plugin.precision!r}: DeepSpeed has no float16 on this "
                f"{self.root_device.type}. Use precision='bf16-mixed'."
            )
        deepspeed.init_distributed(dist_init_required=False)
        quieten()
        self._grid = self._grid or Grid(self.meshes)
        self._grid.take_up()

    @property
    def _is_pipelined(self) -> bool:
        return self.meshes.dims.pipeline_parallel_size > 1

    def _take_apart(self, module: pl.LightningModule) -> None:
        """Cuts the module's model, gives this rank's parts their place and their weights."""
        dims = self.meshes.dims
        target, plan = target_of(module, dims, self.layout)
        self.plan = plan
        self.precision_plugin.convert_module(target)
        built = not any(parameter.is_meta for parameter in target.parameters())
        if built:
            self._copy_from_rank_zero(target)
        self._cut = cut(target, plan, self.meshes, self.layout)
        self.context = self._cut.context
        if dims.world_size > 1 or self.settings.zero_stage == 3:
            mark_as_cut(target)
        if self._is_pipelined:
            check_pipelined(module)
        if dims.model_parallel_size > 1:
            check_others(module, target, dims)
        self._count_tokens(module)
        if not built:
            self._materialize(module, target)
        if plan is not None and dims.tensor_parallel_size > 1:
            reduce_replicated(target, plan, self.meshes.tensor.get_group())
        place_the_rest(module, target, self.root_device)

    def _materialize(self, module: pl.LightningModule, model: nn.Module) -> None:
        assert self._cut is not None
        source = self._weight_source(module)
        if self.plan is not None:
            source = AliasedSource(source, self.plan)
        in_host = self.settings.offload_parameters is not None
        partition = self._partition if self.settings.zero_stage == 3 else None
        device = "cpu" if in_host else self.root_device
        materialize(model, self.plan, source, self._cut.shards, device, partition)
        if self.plan is not None:
            for owner, copy in self.plan.tied:
                retie(model, owner, copy)

    def _partition(self, part: nn.Module) -> None:
        """ZeRO-3's share of a block's parameters, in the engine's type."""
        import deepspeed

        dtype = self.precision_plugin.compute_dtype
        for parameter in part.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
        assert self._grid is not None
        deepspeed.zero.Init(
            module=part,
            data_parallel_group=self._grid.get_data_parallel_group(),
            zero_param_parallel_group=self._grid.replica,
            config_dict_or_path=self._engine_config(trains=True),
            mpu=self._grid,
            dtype=dtype,
        )

    # -- the engine --

    def _take_from_config(self, trainer: pl.Trainer) -> None:
        """Optimizer and schedule of DeepSpeed's configuration, which come before those of configure_optimizers()."""
        config, module = self.settings.config, self.lightning_module
        assert module is not None
        if section := config.get("optimizer"):
            configured = self.optimizers[0] if self.optimizers else None
            self.optimizers = [optimizer_of_config(section, configured, module.parameters())]
            self.lr_scheduler_configs = []
        if section := config.get("scheduler"):
            self.lr_scheduler_configs = [scheduler_of_config(section, self.optimizers[0], trainer)]
        if told := [key for key in CHOSEN_LATER if config.get(key)]:
            rank_zero_info(
                f"DeepSpeed's configuration has the {' and the '.join(told)}: what configure_optimizers() returned is "
                f"not used{'' if 'optimizer' in told else ' for it'}."
            )

    def _fit_optimizer(self, module: pl.LightningModule) -> Optimizer:
        """Makes of the module's optimizer what the engine takes."""
        if len(self.optimizers) != 1:
            raise ConfigurationError(
                f"DeepSpeed's engine takes one optimizer, and configure_optimizers() returned {len(self.optimizers)}."
            )
        optimizer = self.optimizers[0]
        check_optimizer(optimizer, self.settings.zero_stage, self.meshes.dims.tensor_parallel_size)
        if self.meshes.dims.expert_parallel_size > 1 and self.settings.zero_stage > 0:
            optimizer, self._split_groups = split_experts(optimizer)
        if self._has_cpu_adam:  # the last: its memory goes with the first copy that does
            optimizer = for_host(optimizer)
        self._groups = groups_by_name(optimizer, module)
        return optimizer

    def _engine_config(self, *, trains: bool) -> dict[str, Any]:
        assert self.lightning_module is not None and self._grid is not None
        trainer = self.lightning_module.trainer
        dims, replica = self.meshes.dims, self._grid.replica
        batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        config, overridden = engine_config(
            self.settings,
            precision=str(self.precision_plugin.precision),
            batch_size=max(1, batch // dims.data_parallel_size // trainer.accumulate_grad_batches) if batch else 1,
            secondary_shards=dist.get_world_size(replica) if replica is not None else 1,
            clips=trainer.gradient_clip_val is not None,
            trains=trains,
        )
        check_by_deepspeed(config, self._grid)
        if overridden and not self._told:
            rank_zero_info("Of DeepSpeed's configuration: " + "; ".join(overridden))
        self._told = True
        return config

    def _start_engine(self, optimizer: Optimizer | None) -> None:
        import deepspeed

        assert self.lightning_module is not None
        if self.engine is not None:
            self.engine.destroy()
            for hook in self._engine_hooks:
                hook.remove()
        module = self.lightning_module
        model: Any = module
        if section := self.settings.config.get("activation_checkpointing"):
            configure_checkpointing(section, self._grid)
        if self._is_pipelined:
            with printed_for_debugging():
                model = pipeline_module(self._decoder, self.meshes, self._tied_across_stages())
            for name, parameter in self._decoder.named_parameters():
                parameter.ds_pipe_replicated = name in self._copies  # type: ignore[attr-defined]  # left out of norms
        experts = self.meshes.dims.expert_parallel_size
        if experts > 1:
            tell_of_experts(self._decoder, experts)
        trains = module.trainer.state.fn == TrainerFn.FITTING
        try:
            with printed_for_debugging():
                self.engine, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=optimizer,
                    config=self._engine_config(trains=trains),
                    mpu=None if self._is_pipelined else self._grid,
                    dist_init_required=False,
                )
        except (AssertionError, NotImplementedError) as error:  # settings that exclude each other
            raise ConfigurationError(f"DeepSpeed's engine does not start: {error}") from error
        watch(self.engine, module.trainer)
        self.gradients = Gradients(self.engine, self.root_device)
        self.precision_plugin.attach_engine(self.engine, self.gradients, self._finish_gradients)
        if self._is_pipelined:
            self._run_in_pipeline(
                module, EnginePipeline(self.engine, self.meshes, self.root_device, self.layout.microbatches)
            )
        else:
            self._engine_hooks = follow_whole_calls(self.engine)
            self.model = self.engine

    @property
    def _copies(self) -> set[str]:
        """Parameters that another stage owns."""
        return {copy for _, copy in self.plan.tied} if self.plan is not None and self._is_pipelined else set()

    def _tied_across_stages(self) -> list[tuple[nn.Parameter, Any]]:
        """Parameters that the pipeline's other end has too."""
        assert self.plan is not None
        group = ends_group(self.meshes.dense, self.layout.schedule, self.timeout) if self.plan.tied else None
        named = dict(self._decoder.named_parameters())
        found = []
        for owner, copy in self.plan.tied:
            for name in (owner, copy):
                if name in named and group is not None:
                    found.append((named[name], group))
        return found

    # -- steps and gradients --

    def _accumulate(self, *, last: bool) -> None:
        if isinstance(self.pipeline, EnginePipeline):
            self.pipeline.last_of_step = last
        else:
            self.engine.set_gradient_accumulation_boundary(last)

    def block_backward_sync(self) -> Any:
        """Nothing to do: `_accumulate` has told the engine."""
        return nullcontext()

    @property
    def _pipelined_loss_scale(self) -> float:
        return 1.0  # the engine scales

    @property
    def precision_plugin(self) -> DeepSpeedPrecision:
        """Lightning's precision of the same name, on DeepSpeed's engine."""
        # Lightning asks before it has set one, and takes what it finds then for the user's.
        return self._precision_plugin or DeepSpeedPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, DeepSpeedPrecision):
            plugin = DeepSpeedPrecision(str(plugin.precision))
        if plugin is not None and plugin.compute_dtype != torch.float32 and self.settings.zero_stage == 0:
            raise ConfigurationError(
                f"precision={plugin.precision!r} with zero_stage=0: there every rank would keep float32 masters and "
                "states of all 16-bit weights, in an optimizer of DeepSpeed's that checkpoints do not reach. Set "
                "zero_stage=1: the same arithmetic, the same traffic, and the masters are shared out."
            )
        self._precision_plugin: DeepSpeedPrecision | None = plugin

    def _finish_gradients(self) -> None:
        assert self.lightning_module is not None and self.gradients is not None
        if not self._unfinished:  # clip_gradients() of manual optimization comes before the step that would do it
            return
        self._unfinished = False
        follow(self._split_groups)
        weight = self._tokens.close(self.lightning_module.trainer.accumulate_grad_batches)
        if weight is not None:
            self.gradients.scale(weight)

    def gradient_norm(self, parameters: list[nn.Parameter] | None = None) -> Tensor:
        """Euclidean norm of all gradients over every axis, equal on all ranks; as they were before any clipping."""
        assert self.gradients is not None
        return self.gradients.norm()

    # -- the state --

    @property
    def _state(self) -> EngineState:
        assert self.lightning_module is not None and self._cut is not None
        prefix = "model." if self.plan is not None else ""
        return EngineState(
            self.lightning_module,
            shards={f"{prefix}{name}": shard for name, shard in self._cut.shards.items()},
            copies={f"{prefix}{name}" for name in self._copies},
            engine=self.engine,
            optimizer=self._optimizer,
            groups=self._groups,
        )

    @property
    def stepped_optimizers(self) -> list[Optimizer]:
        """What the engine steps: ranges of float32 masters are its parameters."""
        return [self._optimizer] if self._optimizer is not None else []

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts of the weights: the float32 masters, where the engine has them."""
        return self._state.weights()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's parts of the optimizer's state, keyed by parameter names."""
        return self._state.optimizer_state()

    def _restore(self, checkpoint: Checkpoint, optimizers: list[Optimizer]) -> None:
        self._state.restore(checkpoint, self._aliases(), with_optimizer=bool(optimizers))
