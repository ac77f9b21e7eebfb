"""Weights and optimizer states as DeepSpeed's engine holds them, into a checkpoint and back, in `checkpoint.Pieces`.

ZeRO keeps, on each rank, ranges of float32 masters and of their states, many parameters in one flat tensor. Names and
values are those of checkpoint/module_state.py, so that either engine goes on with what the other one saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_llm.checkpoint.module_state import OptimizerPart, restore_tensors
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.strategies.deepspeed.cutting import Shard

WEIGHT = "weight"
STEP = "step"
OF_THE_ENGINE = ("params", "name", "moe", "bias_correction")  # of a group's settings; they are not saved


@dataclass(frozen=True, eq=False)
class Fragment:
    """What a rank has of a parameter.

    Attributes:
        flat: The tensor in which it lies, which an optimizer has states for.
        offset: Its first element in `flat`.
        start: The same element in the parameter, in row-major order.
        length: Elements.
        subgroup: Of ZeRO-3, whose memory may be on a disk; None of others.
    """

    flat: Tensor
    offset: int
    start: int
    length: int
    subgroup: int | None = None


@dataclass
class EngineState:
    """The state of a run on this rank.

    Args:
        module: The LightningModule.
        shards: Parameters that are parts of global tensors, by their name in `module`.
        copies: Names of parameters that another rank's stage owns: they are loaded, not saved.
        engine: DeepSpeed's; None before it is made, when parameters are whole.
        optimizer: What the engine steps; None without one.
        groups: The optimizer's settings of each parameter, by name.
    """

    module: nn.Module
    shards: Mapping[str, Shard]
    copies: Collection[str] = ()
    engine: Any = None
    optimizer: Optimizer | None = None
    groups: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    # -- what is saved --

    def weights(self) -> dict[str, Tensor | Pieces]:
        """This rank's parts of weights and buffers, by name."""
        memory = _Memory(self)
        return {
            **{
                name: self._pieces(name, parameter, fragment, memory.of(fragment)[WEIGHT])
                for name, parameter, fragment in self._fragments()
                if name not in self.copies
            },
            **self._buffers(),
        }

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's parts of the optimizer's state, as torch would name and describe them."""
        memory = _Memory(self)
        found: dict[str, Any] = {}
        for name, parameter, fragment in self._trained():
            if name in self.copies:
                continue
            for key, value in memory.of(fragment).items():
                if key == STEP:
                    found[f"state.{name}.{key}"] = torch.tensor(float(value))
                elif key != WEIGHT:
                    found[f"state.{name}.{key}"] = self._pieces(name, parameter, fragment, value)
            found |= {f"param_groups.{name}.{key}": value for key, value in self._settings(name).items()}
        return found

    # -- what is loaded --

    def restore(self, checkpoint: Checkpoint, aliases: Mapping[str, str], *, with_optimizer: bool) -> None:
        """Fills weights and, where a run goes on, the optimizer's states. Collective.

        Args:
            checkpoint: Of either engine, saved in any layout.
            aliases: Name of a tied copy -> its owner's, under which both are stored.
            with_optimizer: Whether states are loaded.

        Raises:
            ConfigurationError: See `restore_tensors`.
        """
        memory = _Memory(self)
        part = OptimizerPart({})
        if with_optimizer:
            for name, parameter, fragment in self._trained():
                stored = aliases.get(name, name)
                memory.prepare(fragment, _keys(checkpoint, stored))
                for key, value in memory.of(fragment).items():
                    if key == STEP:
                        part.tensors[f"state.{name}.{key}"] = torch.tensor(float(value))
                    elif key != WEIGHT:
                        part.tensors[f"state.{name}.{key}"] = self._pieces(name, parameter, fragment, value)
                part.values |= {f"param_groups.{name}.{key}": value for key, value in self._settings(name).items()}
        weights = {
            name: self._pieces(name, parameter, fragment, memory.of(fragment)[WEIGHT])
            for name, parameter, fragment in self._fragments()
        }
        parts = [part] if with_optimizer and self.optimizer is not None and self.optimizer.param_groups else []
        restore_tensors(checkpoint, {**weights, **self._buffers()}, parts, aliases)
        for name, _, fragment in self._trained() if parts else ():
            step = part.tensors.get(f"state.{name}.{STEP}")
            if isinstance(step, Tensor):
                memory.set_step(fragment, float(step))
            for key in self._settings(name):
                self.groups[name][key] = part.values[f"param_groups.{name}.{key}"]
        memory.write_back()
        self._take_over()

    def _take_over(self) -> None:
        """Makes the weights that are computed with those of the masters."""
        optimizer: Any = getattr(self.engine, "optimizer", None)
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        if hasattr(optimizer, "_reassign_or_swap_out_partitioned_parameters"):
            for subgroup in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(subgroup)
        persistent = getattr(optimizer, "persistent_parameters", None)
        if persistent:  # small ones, which ZeRO-3 keeps gathered
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    # -- where it lies --

    def _fragments(self) -> list[tuple[str, nn.Parameter, Fragment]]:
        found = ((name, p, self._fragment(p)) for name, p in self.module.named_parameters())
        return [(name, parameter, fragment) for name, parameter, fragment in found if fragment is not None]

    def _trained(self) -> list[tuple[str, nn.Parameter, Fragment]]:
        return [entry for entry in self._fragments() if entry[0] in self.groups]

    def _fragment(self, parameter: Any) -> Fragment | None:
        optimizer: Any = getattr(self.engine, "optimizer", None)
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            flat, offset, subgroup = parameter.ds_tensor, 0, None
            length = start = parameter.ds_tensor.ds_numel
            if parameter.requires_grad and hasattr(optimizer, "grad_position"):
                subgroup, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat = optimizer.fp32_partitioned_groups_flat[subgroup]
            start = length * parameter.ds_zero_partition_rank
            own = min(length, max(0, parameter.ds_numel - start))  # the last ranks' may be padded
            return Fragment(flat, offset, min(start, parameter.ds_numel), own, subgroup)
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)  # ZeRO-1 and 2
        if masters is None:  # ZeRO-1 in bfloat16, where gradients are accumulated in float32
            masters = getattr(optimizer, "fp32_groups_flat_partition", None)
        if parameter.requires_grad and masters is not None:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            place, address = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = masters[mapping.param_group_index]
            return Fragment(flat, address.start, place.start, place.numel)
        return Fragment(parameter, 0, 0, parameter.numel())

    def _pieces(self, name: str, parameter: Any, fragment: Fragment, flat: Tensor) -> Pieces:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        mine = flat.reshape(-1).narrow(0, fragment.offset, fragment.length)
        shard = self.shards.get(name)
        if shard is None:
            return Pieces.of_range(mine, fragment.start, shape)
        offsets, whole = shard.offsets(shape), shard.global_shape(shape)
        return Pieces.of_range(mine, fragment.start, shape, offsets=offsets, global_shape=whole)

    def _buffers(self) -> dict[str, Tensor]:
        names = dict(self.module.named_buffers())
        stored = self.module.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in names.items() if name in stored}

    def _settings(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self.groups[name].items() if key not in OF_THE_ENGINE}


class _Memory:
    """Flat tensors and their states, those of a disk in memory for as long as this is."""

    def __init__(self, state: EngineState) -> None:
        self._zero: Any = getattr(state.engine, "optimizer", None)
        self._optimizer = state.optimizer
        self._loaded: dict[int, dict[str, Any]] = {}

    def of(self, fragment: Fragment) -> dict[str, Any]:
        """The flat tensor as `weight`, and its states by the optimizer's names; `step` is a number."""
        if not self._swapped(fragment):
            return {WEIGHT: fragment.flat.detach(), **self._states(fragment.flat)}
        assert fragment.subgroup is not None
        if fragment.subgroup not in self._loaded:
            self._zero._optimizer_states_and_gradient_swap_in(fragment.subgroup)
            found = {WEIGHT: fragment.flat.detach(), **self._states(fragment.flat)}
            self._loaded[fragment.subgroup] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()
            }
            self._zero._release_swap_buffers(fragment.subgroup)
        return self._loaded[fragment.subgroup]

    def prepare(self, fragment: Fragment, keys: Mapping[str, bool]) -> None:
        """Makes states that are to be loaded; optimizers make theirs in the first step.

        Args:
            fragment: Of a parameter.
            keys: Its states in the checkpoint, and whether each has the parameter's shape.
        """
        assert self._optimizer is not None
        if self._swapped(fragment):
            states: dict[str, Any] = self.of(fragment)
        elif not keys:
            return
        else:
            states = self._optimizer.state[fragment.flat]
        for key, shaped in keys.items():
            if key not in states:
                like = states.get(WEIGHT, fragment.flat)
                states[key] = torch.zeros_like(like, requires_grad=False) if shaped else self._number(0.0)

    def set_step(self, fragment: Fragment, step: float) -> None:
        """Sets how many steps a fragment's flat tensor has seen."""
        assert self._optimizer is not None
        swapped = self._swapped(fragment)
        states = self.of(fragment) if swapped else self._optimizer.state[fragment.flat]
        states[STEP] = step if swapped else self._number(step)

    def write_back(self) -> None:
        """Puts what was on a disk there again."""
        for subgroup, values in self._loaded.items():
            self._zero._optimizer_states_and_gradient_swap_in(subgroup)
            flat = self._zero.fp32_partitioned_groups_flat[subgroup]
            states = self._optimizer.state[flat] if self._optimizer is not None else {}
            flat.data.copy_(values[WEIGHT])
            for key, value in values.items():
                if key == STEP:
                    states[key] = self._number(value)
                elif key != WEIGHT and isinstance(states.get(key), Tensor):
                    states[key].copy_(value)
                elif key != WEIGHT:
                    states[key] = value
            self._zero._optimizer_states_and_gradient_swap_out(subgroup)

    def _states(self, flat: Tensor) -> dict[str, Any]:
        states = self._optimizer.state.get(flat, {}) if self._optimizer is not None else {}
        return {key: float(value) if key == STEP else value for key, value in states.items() if value is not None}

    def _number(self, value: float) -> Any:
        """As the optimizer counts its steps: DeepSpeed's in an int, torch's in a tensor."""
        counts_in_int = type(self._optimizer).__module__.startswith("deepspeed")
        return int(value) if counts_in_int else torch.tensor(float(value))

    def _swapped(self, fragment: Fragment) -> bool:
        swappable: Callable[[int], bool] | None = getattr(self._zero, "_swappable_optimizer_subgroup", None)
        return fragment.subgroup is not None and swappable is not None and swappable(fragment.subgroup)


def _keys(checkpoint: Checkpoint, name: str) -> dict[str, bool]:
    """A parameter's optimizer states in a checkpoint, and whether each has the parameter's shape."""
    prefix = f"optimizer_0.state.{name}."
    shapes = {key: len(stored.size) > 0 for key, stored in checkpoint.tensors.items() if key.startswith(prefix)}
    numbers = dict.fromkeys((key for key in checkpoint.values if key.startswith(prefix)), False)
    return {key.removeprefix(prefix): shaped for key, shaped in {**numbers, **shapes}.items()}
