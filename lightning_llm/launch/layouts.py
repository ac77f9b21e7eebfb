"""How many ranks a node gets, and on how many nodes a run's layout can be: asked once, before anything is started."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_llm.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_llm.strategies.mesh import Size

FIT = "fit"


def ranks_of_node(asked: int | Literal["auto"], program: Sequence[str]) -> int:
    """Ranks of each node.

    Args:
        asked: A number, or "auto": one per GPU; without GPUs the `trainer.devices` of `fit`'s files, or 1.
        program: What is launched.
    """
    if asked != "auto":
        return asked
    devices = torch.cuda.device_count()
    if not devices and program[0] == FIT:
        devices = _read(tuple(program)).trainer.devices
    return devices if isinstance(devices, int) and devices > 0 else 1


def usable_nodes(
    program: Sequence[str], ranks_per_node: int, nodes: tuple[int, int], device: str | None = None
) -> dict[int, int]:
    """Of so many nodes, how many the layout can use: data-parallel size shrinks and grows, the other sizes stay.

    Args:
        program: What is launched; only `fit` with a strategy of ours is known, anything else takes what there is.
        ranks_per_node: Processes.
        nodes: The least and the most.
        device: A row of the planner's table, whose memory the layout must fit into; None leaves that out.

    Raises:
        ConfigurationError: The layout cannot be on the least number.
    """
    low, high = nodes
    counts = range(low, high + 1)
    if low == high or program[0] != FIT:
        return {count: count for count in counts}
    config = _read(tuple(program))
    refused = {count: _refusal(config, ranks_per_node, count, device) for count in range(1, high + 1)}
    possible = [count for count, why in refused.items() if why is None]
    if not possible or possible[0] > low:
        others = f" Nodes that can be used: {', '.join(map(str, possible))}." if possible else ""
        raise ConfigurationError(f"--nnodes {low}:{high}: on {low} nodes of {ranks_per_node}: {refused[low]}{others}")
    return {count: max(fewer for fewer in possible if fewer <= count) for count in counts}


def device_here() -> str | None:
    """The planner's name of this node's GPUs; None without, or where it does not know them. Makes no CUDA context."""
    from lightning_llm.planner.devices import device_named

    if not torch.cuda.device_count() or shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.splitlines()
    row = device_named(names[0]) if names else None
    return row.name if row is not None else None


@cache  # asked for the ranks of a node, then for the nodes
def _read(program: tuple[str, ...]) -> Any:
    from lightning_llm.strategies.run_file import read_run

    files = [word for flag, word in zip(program, program[1:], strict=False) if flag in ("-c", "--config")]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ConfigurationError(f"There is no run file {missing[0]}.")
    return read_run(_without_checkpoint(program[1:]))


def _without_checkpoint(words: Sequence[str]) -> list[str]:
    """`--ckpt_path` is of `fit` alone, not of its configuration."""
    kept = list(words)
    for at, word in enumerate(words):
        if word.startswith("--ckpt_path"):
            del kept[at : at + (1 if "=" in word else 2)]
            break
    return kept


def _refusal(config: Any, ranks_per_node: int, nodes: int, device: str | None) -> str | None:
    """Why a layout cannot be on so many nodes; None where it can, or where its sizes are chosen then."""
    from lightning_llm.data.module import TokenDataModule
    from lightning_llm.strategies.automatic import resolve_dims
    from lightning_llm.strategies.llm3d import LLM3DStrategy
    from lightning_llm.strategies.processes import ProcessGrid
    from lightning_llm.strategies.run_file import made_strategy, plan_of_config

    strategy = made_strategy(config.trainer.strategy)
    if not isinstance(strategy, ProcessGrid):
        return None
    sizes: dict[str, Size] = {**strategy.sizes, "data_parallel_size": "auto"}
    if any(size == "auto" for name, size in sizes.items() if name != "data_parallel_size"):
        return None
    try:
        dims = resolve_dims(None, sizes, world_size=ranks_per_node * nodes, devices_per_node=ranks_per_node)
        data = TokenDataModule(**config.data.as_dict())
        data.check_batch_size(dims.data_parallel_size, config.trainer.accumulate_grad_batches)
        if device is not None and isinstance(strategy, LLM3DStrategy):
            plan, _ = plan_of_config(config, device, sizes, ranks_per_node, nodes)
            if not plan.fits:
                return f"the model does not fit into {device}'s memory."
    except ConfigurationError as error:
        return str(error)
    return None
