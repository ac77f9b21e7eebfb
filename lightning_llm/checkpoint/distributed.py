"""The one place where a run's state is written and read: a folder of shards by torch.distributed.checkpoint.

    weights and optimizer state   *.distcp + .metadata   every rank writes what it holds, in global names and offsets
    loops, schedulers, callbacks  trainer.pt             written by rank 0, read without executing anything
    config.json, tokenizer.json                          what is needed to use the weights alone

The strategy saves and restores with it; export reads weights one by one with `iterate_weights`.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_llm.errors import ConfigurationError

TRAINER_STATE = "trainer.pt"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def model_state(module: nn.Module, aliases: Mapping[str, str]) -> dict[str, Any]:
    """This rank's weights by global name. `aliases`: name of a tied copy -> its owner's, so that it is stored once."""
    return _renamed(get_model_state_dict(module), aliases)


def optimizer_state(module: nn.Module, optimizer: Optimizer, aliases: Mapping[str, str]) -> dict[str, Any]:
    """This rank's optimizer state, flat and by parameter name, so that another layout can load it."""
    return _renamed(get_optimizer_state_dict(module, optimizer, options=_FLAT), aliases)


def save(checkpoint: dict[str, Any], path: Path, write_assets: Callable[[Path], None] | None = None) -> None:
    """Writes what `Trainer.dump_checkpoint` collected. Collective.

    Args:
        checkpoint: `state_dict` and `optimizer_states` as made above; everything else is the trainer's.
        path: The folder to write.
        write_assets: Called by rank 0 with the folder, to add what makes the weights usable on their own.
    """
    if path.is_file():
        raise ConfigurationError(f"{path} is a file; a sharded checkpoint is a folder. Choose another path.")
    staging = path.with_name(f".{path.name}.saving")
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    rest = dict(checkpoint)
    tensors = {"model": rest.pop("state_dict")}
    for index, state in enumerate(rest.pop("optimizer_states", [])):
        tensors[f"optimizer_{index}"] = state
    dcp.save(tensors, checkpoint_id=staging)
    if dist.get_rank() == 0:
        torch.save(rest, staging / TRAINER_STATE)
        _check_readable(staging)
        if write_assets is not None:
            write_assets(staging)
        _publish(staging, path)
    dist.barrier()


def _check_readable(path: Path) -> None:
    """Refuses to write what `trainer_state` would refuse to read: a run must not find that out when it resumes."""
    try:
        trainer_state(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        shutil.rmtree(path)
        raise ConfigurationError(
            f"The trainer's state holds {found[1] if found else 'an object'}, which no checkpoint can give back "
            "without executing code. Keep to plain values and tensors in hyperparameters "
            "(save_hyperparameters(ignore=[...])) and in the state_dict() of callbacks."
        ) from error


def _publish(staging: Path, path: Path) -> None:
    """Puts a finished folder in its place. What stood there before goes only after that."""
    before = path.with_name(f".{path.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    staging.rename(path)
    shutil.rmtree(before, ignore_errors=True)


def load(path: Path, module: nn.Module, optimizers: list[Optimizer], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Loads weights and optimizer states into the parts that this rank holds; returns the trainer's state. Collective.

    Raises:
        ConfigurationError: `path` is no such checkpoint, lacks tensors that the model has or has them in other shapes,
            or holds weights alone, or another optimizer's state, where optimizers are to be restored.
    """
    check(path)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {"model": model_state(module, aliases)}
    for optimizer in optimizers:
        optimizer.zero_grad()  # torch makes the states that are to be loaded only where there are no gradients
    states = [get_optimizer_state_dict(module, optimizer, options=_FLAT) for optimizer in optimizers]
    tensors |= {
        f"optimizer_{index}": _started(_renamed(state, aliases), stored, f"optimizer_{index}")
        for index, state in enumerate(states)
    }
    missing = [name for name in tensors["model"] if f"model.{name}" not in stored]
    if missing:
        raise ConfigurationError(
            f"{path} lacks {len(missing)} tensors of this model, for example {missing[:3]}: it was "
            "saved by another one."
        )
    wrong = [
        f"{name} {tuple(found.size)} for {tuple(tensor.shape)}"
        for name, tensor in tensors["model"].items()
        if isinstance(found := stored[f"model.{name}"], TensorStorageMetadata) and found.size != tensor.shape
    ]
    if wrong:
        raise ConfigurationError(
            f"{path} holds {len(wrong)} tensors of other shapes than this model, for example {wrong[:3]}: it was saved "
            "by another one."
        )
    if optimizers and not any(name.startswith("optimizer_0.") for name in stored):
        raise ConfigurationError(
            f"{path} holds weights alone (it was saved with save_weights_only=True), so a run cannot go on from it. "
            "Use a whole checkpoint, or export this one and start anew from the exported folder."
        )
    absent = [f"{key}.{name}" for key, state in tensors.items() if key != "model" for name in state]
    absent = [name for name in absent if name not in stored]
    if absent:
        raise ConfigurationError(
            f"{path} lacks {len(absent)} entries of this optimizer's state, for example {absent[0]}: it was saved with "
            "another optimizer. Go on with that one, or export the checkpoint and start anew from the exported folder."
        )
    dcp.load(tensors, checkpoint_id=path)
    for name, tensor in get_model_state_dict(module).items():
        # A rank that has both a tied tensor and its copy has loaded one of them.
        loaded = tensors["model"][_rename(name, aliases)]
        if isinstance(tensor, Tensor) and tensor is not loaded:
            tensor.copy_(loaded)
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        loaded = tensors[f"optimizer_{index}"]
        back = {
            name: _own(loaded.get(_rename(name, aliases), fresh), _rename(name, aliases) != name)
            for name, fresh in state.items()
        }
        set_optimizer_state_dict(module, optimizer, back, options=_FLAT)
    return trainer_state(path)


def trainer_state(path: Path) -> dict[str, Any]:
    """Loops, schedulers, callbacks and hyperparameters of a checkpoint; unpickles plain data and tensors only."""
    with torch.serialization.safe_globals([type(Path()), type(PurePath())]):
        return torch.load(path / TRAINER_STATE, map_location="cpu", weights_only=True)


def stored_weights(path: Path, prefix: str = "model.") -> dict[str, TensorStorageMetadata]:
    """Shapes and types of the weights in a checkpoint, by name without the module's `prefix`; reads no tensor."""
    check(path)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    key = f"model.{prefix}"
    tensors = {name.removeprefix(key): found for name, found in stored.items() if name.startswith(key)}
    return {name: found for name, found in tensors.items() if isinstance(found, TensorStorageMetadata)}


def iterate_weights(path: Path, prefix: str = "model.") -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint one by one, whole, on one process, in sorted order of their names."""
    for name, found in sorted(stored_weights(path, prefix).items()):
        state = {f"model.{prefix}{name}": torch.empty(found.size, dtype=found.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        yield name, next(iter(state.values()))


def check(path: Path) -> None:
    """Refuses what is not a complete checkpoint folder.

    Raises:
        ConfigurationError: naming what is missing.
    """
    if not path.exists():
        raise ConfigurationError(f"There is no checkpoint at {path}.")
    for name in (".metadata", TRAINER_STATE):
        if not (path / name).is_file():
            raise ConfigurationError(
                f"{path} is not a complete checkpoint: {name} is missing. Use another checkpoint: a run that was "
                "interrupted while it wrote leaves such a folder."
            )


def _own(value: Any, is_copy: bool) -> Any:
    """Two optimizer states must not be one tensor, where a rank has both a tied tensor and its copy."""
    return value.clone() if is_copy and isinstance(value, Tensor) else value


def _renamed(state: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    return {_rename(name, aliases): value for name, value in state.items()}


def _rename(name: str, aliases: Mapping[str, str]) -> str:
    """`state.model.lm_head.weight.exp_avg` -> `state.model.model.embed_tokens.weight.exp_avg`, for a tied head."""
    for copy, owner in aliases.items():
        for before in ("", "state.", "param_groups."):
            if name == before + copy or name.startswith(f"{before}{copy}."):
                return before + owner + name[len(before + copy) :]
    return name


def _started(state: dict[str, Any], stored: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An optimizer's state without that of parameters which no step had reached when the checkpoint was saved."""
    prefix = f"{key}.state."
    started = {name.removeprefix(prefix).rpartition(".")[0] for name in stored if name.startswith(prefix)}
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("state.") or name.removeprefix("state.").rpartition(".")[0] in started
    }
