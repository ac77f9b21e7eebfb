"""A LightningCLI run file as the planner sees it: read, checked as the strategy would check it, nothing started.

`lightning-llm plan --config` calls it. What is refused here is refused by the same functions that a run would call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from lightning_llm.data.module import TokenDataModule
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.module import LLMModule, resolve_config
from lightning_llm.planner import Layout, Plan, plan
from lightning_llm.strategies.automatic import resolve_dims
from lightning_llm.strategies.checks import check_plan, check_sequence
from lightning_llm.strategies.deepspeed.strategy import LLM3DDeepSpeedStrategy
from lightning_llm.strategies.llm3d import LLM3DStrategy
from lightning_llm.strategies.mesh import Size
from lightning_llm.strategies.stages import split_units

PRECISIONS = {None: "32-true", "32": "32-true", 32: "32-true", "bf16": "bf16-mixed"}


class _Reader(LightningCLI):
    """Parses as `fit` does, and stops there: no trainer is made, which would ask for its devices."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def plan_of_run(
    path: str | Path,
    device: str,
    *,
    devices: int | None = None,
    memory_gib: float | None = None,
    host_memory_gib: float | None = None,
    nvme_gb: float | None = None,
) -> tuple[Plan, DecoderConfig]:
    """The plan of exactly the layout that a run file asks for, and its model.

    Args:
        path: The YAML file.
        device: A row of the device table.
        devices: In all, where the file says "auto".
        memory_gib: Of one device, if not what the table says.
        host_memory_gib, nvme_gb: Of a node, if not what the table says.

    Raises:
        ConfigurationError: The file is missing, is not for `LLM3DStrategy`, or asks for what the strategy refuses.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"There is no run file {path}.")
    config = read_run(["--config", str(path)])
    strategy = _strategy(config.trainer.strategy)
    per_node, nodes = _devices(config.trainer, devices)
    return plan_of_config(
        config,
        device,
        strategy.sizes,
        per_node,
        nodes,
        memory_gib=memory_gib,
        host_memory_gib=host_memory_gib,
        nvme_gb=nvme_gb,
    )


def plan_of_config(
    config: Namespace,
    device: str,
    sizes: Mapping[str, Size],
    per_node: int,
    nodes: int,
    *,
    memory_gib: float | None = None,
    host_memory_gib: float | None = None,
    nvme_gb: float | None = None,
) -> tuple[Plan, DecoderConfig]:
    """The same of values that are read already, on a number of nodes, with sizes that may be others than the file's.

    Args:
        config: As `read_run` gives it.
        device: A row of the device table.
        sizes: See `LLM3DStrategy.sizes`.
        per_node: Devices of a node.
        nodes: How many.
        memory_gib, host_memory_gib, nvme_gb: As for `plan_of_run`.
    """
    trainer = config.trainer
    architecture = resolve_config(config.model.model, config.model.vocab_size)
    strategy = _strategy(trainer.strategy)
    with torch.device("meta"):
        model = Decoder(architecture)
    dims = resolve_dims(model, sizes, world_size=per_node * nodes, devices_per_node=per_node)
    settings = strategy.layout
    made_plan = check_plan(model, dims, settings)
    if isinstance(settings.recompute, float) and settings.recompute < 1:
        raise ConfigurationError(
            "The planner has no figures for recompute as a memory budget: leave it out to have the rest estimated."
        )
    data = TokenDataModule(**config.data.as_dict())
    accumulate = trainer.accumulate_grad_batches
    data.check_batch_size(dims.data_parallel_size, accumulate)
    check_sequence(data.seq_len, dims, settings)
    local = data.batch_size // (dims.data_parallel_size * accumulate)
    # Batches that are accumulated are counted as more microbatches of one schedule.
    count, layers = 1, None
    ranks, stages_per_rank = dims.pipeline_parallel_size, settings.stages_per_rank
    if ranks > 1:
        assert made_plan is not None
        count = settings.schedule.choose_microbatches(settings.microbatches, local, ranks, stages_per_rank)
        cut = split_units(made_plan, model, ranks * stages_per_rank, settings.pipeline_split)
        layers = tuple(len(units) for units in cut)
    layout = Layout(
        data_parallel_size=dims.data_parallel_size,
        replicate_size=dims.replicate_size,
        tensor_parallel_size=dims.tensor_parallel_size,
        pipeline_parallel_size=dims.pipeline_parallel_size,
        context_parallel_size=dims.context_parallel_size,
        expert_parallel_size=dims.expert_parallel_size,
        zero_stage=settings.zero_stage,
        sequence_parallel=settings.sequence_parallel,
        pipeline_schedule=settings.schedule.name,
        stages_per_rank=stages_per_rank if ranks > 1 else 1,
        layers_per_stage=layers,
        recompute=settings.recompute if isinstance(settings.recompute, str) else int(settings.recompute),
        microbatch_size=math.ceil(local / count),
        microbatches=count * accumulate,
        offload_parameters=settings.offload_parameters,
    )
    made = plan(
        architecture,
        dims.world_size,
        device,
        name=config.model.model,
        seq_len=data.seq_len,
        precision=PRECISIONS.get(trainer.precision, trainer.precision),
        devices_per_node=per_node,
        memory_gib=memory_gib,
        host_memory_gib=host_memory_gib,
        nvme_gb=nvme_gb,
        layout=layout,
    )
    return made, architecture


def read_run(arguments: list[str]) -> Namespace:
    """The values of `fit`'s arguments, with the defaults of what they leave out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        reader = _Reader(
            LLMModule,
            TokenDataModule,
            args=arguments,
            run=False,
            seed_everything_default=False,
            trainer_defaults={"strategy": "llm3d"},
            save_config_callback=None,
            parser_kwargs={"prog": "lightning-llm"},
        )
    return reader.config


def made_strategy(given: Any) -> Any:
    """The strategy of a run file, made: a registered name, or one of our classes with its arguments; else None."""
    if isinstance(given, str) and given in StrategyRegistry:
        return StrategyRegistry.get(given)
    if isinstance(given, Namespace):
        for kind in (LLM3DStrategy, LLM3DDeepSpeedStrategy):
            if given.class_path.rpartition(".")[2] == kind.__name__:
                return kind(**given.init_args.as_dict())
    return None


def _strategy(given: Any) -> LLM3DStrategy:
    strategy = made_strategy(given)
    if not isinstance(strategy, LLM3DStrategy):
        shown = given.class_path if isinstance(given, Namespace) else given
        raise ConfigurationError(
            f"The run file's strategy is {shown}: the planner knows the layouts of LLM3DStrategy alone. Set "
            "trainer.strategy to llm3d, or to class_path lightning_llm.LLM3DStrategy with init_args."
        )
    return strategy


def _devices(trainer: Namespace, total: int | None) -> tuple[int, int]:
    """Devices of a node, and nodes."""
    nodes = trainer.num_nodes
    given = trainer.devices
    if isinstance(given, list):
        return len(given), nodes
    if str(given).isdigit() and int(given) > 0:
        return int(given), nodes
    if total is None:
        raise ConfigurationError(f"The run file says devices: {given}. Say how many there are in all: --devices N.")
    if total % nodes:
        raise ConfigurationError(f"{total} devices are not a whole number for each of {nodes} nodes (num_nodes).")
    return total // nodes, nodes
