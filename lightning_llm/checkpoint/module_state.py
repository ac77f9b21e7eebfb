"""A module's and its optimizers' state by global names, into a checkpoint and back in any layout.

The strategies save and restore with it. A tensor that is tied to another is stored once, under its owner's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_llm._torch import parameter_names
from lightning_llm.checkpoint.reading import PLACE, TRAINER_PART, Checkpoint
from lightning_llm.checkpoint.saver import RunState
from lightning_llm.errors import ConfigurationError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def model_state(module: nn.Module, aliases: Mapping[str, str]) -> dict[str, Any]:
    """This rank's weights by global name. `aliases`: name of a tied copy -> its owner's, so that it is stored once."""
    return _renamed(get_model_state_dict(module), aliases)


def optimizer_state(module: nn.Module, optimizer: Optimizer, aliases: Mapping[str, str]) -> dict[str, Any]:
    """This rank's optimizer state, flat and by parameter name, so that another layout can load it."""
    if not optimizer.param_groups:  # where a module's configure_optimizers() returns None
        return {}
    started = bool(optimizer.state)
    state = get_optimizer_state_dict(module, optimizer, options=_FLAT)
    if not started:
        # torch has made it, by a step without gradients, which counts as one: the first real step would be the second.
        optimizer.state.clear()
        state = {name: value for name, value in state.items() if not name.startswith("state.")}
    return _renamed(state, aliases)


def collect(
    checkpoint: Mapping[str, Any],
    *,
    names: Iterable[str] = (),
    mesh: Mapping[str, int] | None = None,
    rank: Mapping[str, Any] | None = None,
    write_assets: Callable[[Path], None] | None = None,
) -> RunState:
    """What `Trainer.dump_checkpoint` collected, as it is saved.

    A tensor in the trainer's state that belongs to a weight, such as a callback's moving average of it, is stored like
    that weight: by its parts, and also where only one pipeline stage has it. It comes back whole, on every rank. It is
    known by being a DTensor, or by having a weight's name (or the end of one) as its key in a mapping.

    Args:
        checkpoint: `state_dict` and `optimizer_states` as made above; everything else is the trainer's.
        names: Of this rank's weights.
        mesh: Sizes of the parallel axes.
        rank: This rank's own state.
        write_assets: See `RunState`.
    """
    trainer = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    parts = [name.split(".") for name in names]
    ends = {".".join(part[start:]) for part in parts for start in range(len(part))}
    of_weights: dict[tuple[Any, ...], Tensor] = {}
    trainer = _without_tensors_of_weights(trainer, ends, of_weights)
    found: dict[str, Any] = {f"model.{name}": value for name, value in checkpoint["state_dict"].items()}
    for index, state in enumerate(checkpoint.get("optimizer_states", [])):
        found |= {f"optimizer_{index}.{name}": value for name, value in state.items()}
    for path, tensor in of_weights.items():
        name = TRAINER_PART + "".join(f"[{key!r}]" for key in path)
        found |= {name: tensor, f"{name}{PLACE}": list(path)}
    return RunState(
        step=checkpoint.get("global_step", 0),
        tensors={name: value for name, value in found.items() if isinstance(value, Tensor)},
        values={name: value for name, value in found.items() if not isinstance(value, Tensor)},
        trainer=trainer,
        rank=rank or {},
        mesh=mesh or {},
        weights_only="optimizer_states" not in checkpoint,
        write_assets=write_assets,
    )


def _without_tensors_of_weights(
    tree: Any, ends: Collection[str], found: dict[tuple[Any, ...], Tensor], path: tuple[Any, ...] = ()
) -> Any:
    """A tree without tensors that belong to weights; `found` gets them by the keys that lead to them."""
    if not isinstance(tree, Mapping):
        return tree
    taken = {
        key: value
        for key, value in tree.items()
        if isinstance(value, DTensor) or (isinstance(value, Tensor) and key in ends)
    }
    found |= {(*path, key): value for key, value in taken.items()}
    return {
        key: _without_tensors_of_weights(value, ends, found, (*path, key))
        for key, value in tree.items()
        if key not in taken
    }


def restore(checkpoint: Checkpoint, module: nn.Module, optimizers: list[Optimizer], aliases: Mapping[str, str]) -> None:
    """Loads weights and optimizer states into the parts that this rank holds. Collective.

    Raises:
        ConfigurationError: The checkpoint lacks tensors that the model has or has them in other shapes, or holds
            weights alone, or another optimizer's state, where optimizers are to be restored.
    """
    path, stored, values = checkpoint.path, checkpoint.tensors, checkpoint.values
    optimizers = [optimizer for optimizer in optimizers if optimizer.param_groups]
    model = model_state(module, aliases)
    tensors = {f"model.{name}": tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
    for optimizer in optimizers:
        optimizer.zero_grad()  # torch makes the states that are to be loaded only where there are no gradients
    states = [get_optimizer_state_dict(module, optimizer, options=_FLAT) for optimizer in optimizers]
    known = {*stored, *values}
    reached = [_reached(known, f"optimizer_{index}.state.") for index in range(len(optimizers))]
    started = [_started(_renamed(state, aliases), names) for state, names in zip(states, reached, strict=True)]
    _check_model(path, tensors, stored)
    if optimizers and checkpoint.manifest.weights_only:
        raise ConfigurationError(
            f"{path} holds weights alone (it was saved with save_weights_only=True), so a run cannot go on from it. "
            "Use a whole checkpoint, or export this one and start anew from the exported folder."
        )
    absent = [f"optimizer_{index}.{name}" for index, state in enumerate(started) for name in state]
    absent = [name for name in absent if name not in known]
    if absent:
        raise ConfigurationError(
            f"{path} lacks {len(absent)} entries of this optimizer's state, for example {absent[0]}: it was saved with "
            "another optimizer. Go on with that one, or export the checkpoint and start anew from the exported folder."
        )
    for index, state in enumerate(started):
        for name, value in state.items():
            if isinstance(value, Tensor) and f"optimizer_{index}.{name}" in stored:
                tensors[f"optimizer_{index}.{name}"] = value
            else:
                state[name] = values[f"optimizer_{index}.{name}"]
    checkpoint.read_into(tensors)
    for name, tensor in get_model_state_dict(module).items():
        # A rank that has both a tied tensor and its copy has loaded one of them.
        loaded = model[_rename(name, aliases)]
        if isinstance(tensor, Tensor) and tensor is not loaded:
            tensor.copy_(loaded)
    names = {parameter: _rename(name, aliases) for parameter, name in parameter_names(module).items()}
    for optimizer, state, loaded, with_state in zip(optimizers, states, started, reached, strict=True):
        back = {
            name: _own(loaded.get(_rename(name, aliases), fresh), _rename(name, aliases) != name)
            for name, fresh in state.items()
        }
        set_optimizer_state_dict(module, optimizer, back, options=_FLAT)
        for parameter in [p for p in optimizer.state if names.get(p, "") not in with_state]:
            del optimizer.state[parameter]  # torch has made it, and counted a step


def _check_model(path: str, tensors: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]) -> None:
    missing = [name.removeprefix("model.") for name in tensors if name not in stored]
    if missing:
        raise ConfigurationError(
            f"{path} lacks {len(missing)} tensors of this model, for example {missing[:3]}: it was "
            "saved by another one."
        )
    wrong = [
        f"{name.removeprefix('model.')} {tuple(stored[name].size)} for {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if stored[name].size != tensor.shape
    ]
    if wrong:
        raise ConfigurationError(
            f"{path} holds {len(wrong)} tensors of other shapes than this model, for example {wrong[:3]}: it was saved "
            "by another one."
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


def _reached(stored: Collection[str], prefix: str) -> set[str]:
    """Parameters that have an optimizer's state, because some step had a gradient for them."""
    return {name.removeprefix(prefix).rpartition(".")[0] for name in stored if name.startswith(prefix)}


def _started(state: dict[str, Any], reached: Collection[str]) -> dict[str, Any]:
    """An optimizer's state without that of parameters which no step had reached when the checkpoint was saved."""
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("state.") or name.removeprefix("state.").rpartition(".")[0] in reached
    }
