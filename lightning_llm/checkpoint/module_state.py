"""A module's and its optimizers' state by global names, into a checkpoint and back in any layout.

The strategies save and restore with it. A tensor that is tied to another is stored once, under its owner's name. An
engine that keeps state in a form of its own makes the same names and values, and takes part in `collect` and
`restore_tensors`:

    model.<name>                             a weight or a buffer, by its name in the LightningModule
    optimizer_<i>.state.<name>.<key>         a parameter's `exp_avg` and `exp_avg_sq` in its shape, `step` without a dim
    optimizer_<i>.param_groups.<name>.<key>  a setting of its group, once per parameter: `lr`, `betas`, `weight_decay`

That is what `get_optimizer_state_dict(..., flatten_optimizer_state_dict=True)` of torch 2.13 makes. Which keys there
are is the optimizer's matter: whoever is to load what torch.optim.AdamW saved, and to be loaded by it, has all of its
keys: the three states as tensors, `step` in float32, and every setting of its groups but `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from lightning_llm.checkpoint.pieces import Pieces
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
    known by being a DTensor or Pieces, or by having a weight's name (or the end of one) as its key in a mapping.

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
    of_weights: dict[tuple[Any, ...], Tensor | Pieces] = {}
    trainer = _without_tensors_of_weights(trainer, ends, of_weights)
    found: dict[str, Any] = {f"model.{name}": value for name, value in checkpoint["state_dict"].items()}
    for index, state in enumerate(checkpoint.get("optimizer_states", [])):
        found |= {f"optimizer_{index}.{name}": value for name, value in state.items()}
    for path, tensor in of_weights.items():
        name = TRAINER_PART + "".join(f"[{key!r}]" for key in path)
        found |= {name: tensor, f"{name}{PLACE}": list(path)}
    return RunState(
        step=checkpoint.get("global_step", 0),
        tensors={name: value for name, value in found.items() if isinstance(value, Tensor | Pieces)},
        values={name: value for name, value in found.items() if not isinstance(value, Tensor | Pieces)},
        trainer=trainer,
        rank=rank or {},
        mesh=mesh or {},
        weights_only="optimizer_states" not in checkpoint,
        write_assets=write_assets,
    )


def _without_tensors_of_weights(
    tree: Any, ends: Collection[str], found: dict[tuple[Any, ...], Tensor | Pieces], path: tuple[Any, ...] = ()
) -> Any:
    """A tree without tensors that belong to weights; `found` gets them by the keys that lead to them."""
    if not isinstance(tree, Mapping):
        return tree
    taken = {
        key: value
        for key, value in tree.items()
        if isinstance(value, DTensor | Pieces) or (isinstance(value, Tensor) and key in ends)
    }
    found |= {(*path, key): value for key, value in taken.items()}
    return {
        key: _without_tensors_of_weights(value, ends, found, (*path, key))
        for key, value in tree.items()
        if key not in taken
    }


@dataclass
class OptimizerPart:
    """What a rank holds of one optimizer's state, to be filled by `restore_tensors`.

    Attributes:
        tensors: By name (`state.<parameter>.exp_avg`), filled in place. A number that was saved, where a tensor without
            a dim is to be filled, goes into it.
        values: Plain values by name (`param_groups.<parameter>.lr`); those of the checkpoint take their place.
        started: The parameters that have a state in the checkpoint, because some step had a gradient for them: entries
            of all others stay what they were.
    """

    tensors: dict[str, Tensor | Pieces]
    values: dict[str, Any] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> OptimizerPart:
        """A state as `optimizer_state` returns it."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor | Pieces)}
        return cls(tensors, {name: value for name, value in state.items() if name not in tensors})


def restore(checkpoint: Checkpoint, module: nn.Module, optimizers: list[Optimizer], aliases: Mapping[str, str]) -> None:
    """Loads weights and optimizer states into the parts that this rank holds. Collective.

    Raises:
        ConfigurationError: See `restore_tensors`.
    """
    optimizers = [optimizer for optimizer in optimizers if optimizer.param_groups]
    for optimizer in optimizers:
        optimizer.zero_grad()  # torch makes the states that are to be loaded only where there are no gradients
    model = {name: value for name, value in get_model_state_dict(module).items() if isinstance(value, Tensor)}
    parts = [OptimizerPart.of(get_optimizer_state_dict(module, optimizer, options=_FLAT)) for optimizer in optimizers]
    restore_tensors(checkpoint, model, parts, aliases)
    names = {parameter: _rename(name, aliases) for parameter, name in parameter_names(module).items()}
    for optimizer, part in zip(optimizers, parts, strict=True):
        filled: dict[str, Any] = {**part.tensors, **part.values}
        set_optimizer_state_dict(module, optimizer, filled, options=_FLAT)
        for parameter in [p for p in optimizer.state if names.get(p, "") not in part.started]:
            del optimizer.state[parameter]  # torch has made it, and counted a step


def restore_tensors(
    checkpoint: Checkpoint,
    model: Mapping[str, Tensor | Pieces],
    optimizers: Sequence[OptimizerPart],
    aliases: Mapping[str, str],
) -> None:
    """Fills what a rank holds of a model and its optimizers from a checkpoint, whatever layout that was saved in.

    Args:
        checkpoint: With all that is asked for.
        model: Weights and buffers by name, filled in place.
        optimizers: In their order in the run.
        aliases: Name of a tied copy -> its owner's, under which both are stored. A rank may have both.

    Raises:
        ConfigurationError: The checkpoint lacks tensors that the model has or has them in other shapes, or holds
            weights alone, or another optimizer's state, where optimizers are to be restored.
    """
    path, stored, values = checkpoint.path, checkpoint.tensors, checkpoint.values
    weights = [(f"model.{_rename(name, aliases)}", tensor) for name, tensor in model.items()]
    _check_model(path, weights, stored)
    if optimizers and checkpoint.manifest.weights_only:
        raise ConfigurationError(
            f"{path} holds weights alone (it was saved with save_weights_only=True), so a run cannot go on from it. "
            "Use a whole checkpoint, or export this one and start anew from the exported folder."
        )
    known = {*stored, *values}
    wanted: list[list[tuple[str, str]]] = []  # of each optimizer: name, and the name under which it is stored
    for index, part in enumerate(optimizers):
        part.started = _reached(known, f"optimizer_{index}.state.")
        names = [(name, _rename(name, aliases)) for name in (*part.tensors, *part.values)]
        wanted.append([(name, f"optimizer_{index}.{own}") for name, own in names if _has_state(own, part.started)])
    absent = [own for names in wanted for _, own in names if own not in known]
    if absent:
        raise ConfigurationError(
            f"{path} lacks {len(absent)} entries of this optimizer's state, for example {absent[0]}: it was saved with "
            "another optimizer. Go on with that one, or export the checkpoint and start anew from the exported folder."
        )
    states: list[tuple[str, Tensor | Pieces]] = []
    for part, names in zip(optimizers, wanted, strict=True):
        for name, own in names:
            if name in part.tensors and own in stored:
                states.append((own, part.tensors[name]))
            elif name in part.tensors:
                _fill(own, part.tensors[name], values[own], path)
            else:
                part.values[name] = _plain(checkpoint.read(own)) if own in stored else values[own]
    _read(checkpoint, [*weights, *states])


def _check_model(
    path: str, tensors: Sequence[tuple[str, Tensor | Pieces]], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    missing = [name.removeprefix("model.") for name, _ in tensors if name not in stored]
    if missing:
        raise ConfigurationError(
            f"{path} lacks {len(missing)} tensors of this model, for example {missing[:3]}: it was "
            "saved by another one."
        )
    wrong = [
        f"{name.removeprefix('model.')} {tuple(stored[name].size)} for {tuple(tensor.shape)}"
        for name, tensor in tensors
        if stored[name].size != tensor.shape
    ]
    if wrong:
        raise ConfigurationError(
            f"{path} holds {len(wrong)} tensors of other shapes than this model, for example {wrong[:3]}: it was saved "
            "by another one."
        )


def _read(checkpoint: Checkpoint, wanted: Iterable[tuple[str, Tensor | Pieces]]) -> None:
    """Fills tensors by stored names, of which a rank that has a tied tensor and its copy has one twice."""
    first: dict[str, Tensor | Pieces] = {}
    again = []
    for name, tensor in wanted:
        if first.setdefault(name, tensor) is not tensor:
            again.append((name, tensor))
    checkpoint.read_into(first)
    for name, tensor in again:
        checkpoint.read_into({name: tensor})


def _fill(name: str, tensor: Tensor | Pieces, value: Any, path: str) -> None:
    """Writes a number into a tensor, where one optimizer counts its steps in the one, and another in the other."""
    if isinstance(tensor, Pieces) or tensor.ndim or not isinstance(value, int | float):
        raise ConfigurationError(
            f"{path} holds {name} as {value!r}, where this run's optimizer has a tensor of {tuple(tensor.shape)}: it "
            "was saved with another optimizer."
        )
    with torch.no_grad():
        tensor.fill_(value)


def _plain(tensor: Tensor) -> Any:
    return tensor if tensor.ndim else tensor.item()


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


def _has_state(name: str, reached: Collection[str]) -> bool:
    """Whether an entry is a setting, or the state of a parameter that some step had reached when it was saved."""
    return not name.startswith("state.") or name.removeprefix("state.").rpartition(".")[0] in reached
