"""What the ranks of DeepSpeed's engine have left in their files, put together; deepspeed_folder.py takes it from here.

    mp_rank_00_model_states.pt                         ZeRO 0 to 2: the module's state, and what Lightning adds
    zero_pp_rank_R_mp_rank_00_model_states.pt          ZeRO 3: the same, but of the weights only R's part of frozen ones
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   R's flat ranges of float32 weights and of the optimizer's states
    zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt   Universal: these put together, beside the module's state

All are pickles, of which only plain data and tensors are let in, and of DeepSpeed's own classes empty ones in their
place. As of DeepSpeed 0.19.8; what lies where is in its utils/zero_to_fp32.py and checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_llm.checkpoint.lazy import Box, LazyTensor, assemble, whole
from lightning_llm.checkpoint.lightning_file import check_form, load_data
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.errors import ConfigurationError

UNIVERSAL = "zero"
MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<slice>\d+)_model_states\.pt")
OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_optim_states\.pt")


class _Ignored:
    """In place of an object that nobody asks: nothing of its class is run."""


_CLASSES: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
]


@dataclass
class Parameter:
    """A parameter that is trained.

    Attributes:
        weight: In float32.
        states: The optimizer's, by key.
        settings: Of its group.
    """

    weight: LazyTensor
    states: dict[str, LazyTensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def count_steps(self, steps: Any) -> None:
        """Adds how many were made, as torch.optim.AdamW keeps it; None if that is not known."""
        if self.states and steps is not None:
            count = torch.as_tensor(steps).detach().to(torch.float32).reshape(())
            self.states["step"] = LazyTensor.of(count)


class Range(NamedTuple):
    """Where consecutive elements of a parameter lie.

    Attributes:
        rank: In whose flat tensor.
        begin: The first one's place in that.
        length: How many.
        at: The first one's place in the parameter.
    """

    rank: int
    begin: int
    length: int
    at: int


# -- files --


def rank_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Those of a kind, in order of ranks; of several slices only the first one's."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    first = [(int(match["rank"] or 0), path) for match, path in found if int(match["slice"]) == 0]
    return [path for _, path in sorted(first)]


def load_states(path: Path) -> dict[str, Any]:
    """A file's content; its tensors stay there until they are read.

    Raises:
        ConfigurationError: It is damaged, or contains more than data.
    """
    stored = load_data(path, _CLASSES)
    if not isinstance(stored, dict):
        raise ConfigurationError(f"{path} is not what DeepSpeed writes.")
    return stored


def count_slices(place: Path) -> int:
    """How many slices each weight is cut into by tensor parallelism."""
    return len({int(match["slice"]) for path in place.iterdir() if (match := MODEL.fullmatch(path.name))})


def is_zero_3(place: Path) -> bool:
    """Whether weights are cut among the ranks too."""
    return any(path.name.startswith("zero_") for path in rank_files(place, MODEL))


# -- tensors --


def gathered(name: str, shape: Sequence[int], ranges: Sequence[Range], flats: Sequence[Tensor]) -> LazyTensor:
    """A tensor whose elements lie in the flat tensors of ranks."""
    cut = [flats[part.rank][part.begin : part.begin + part.length] for part in ranges]
    count, dtype = sum(len(flat) for flat in cut), flats[0].dtype
    if count != math.prod(shape) or any(flat.dtype != dtype for flat in cut):
        raise ConfigurationError(f"{count} of {math.prod(shape)} elements of {name} are there: files are damaged.")
    pieces = [Pieces.of_range(flat, part.at, shape) for flat, part in zip(cut, ranges, strict=True)]
    parts = [(Box(offsets, tuple(tensor.shape)), tensor.detach) for each in pieces for offsets, tensor in each.pieces]
    return LazyTensor(dtype, tuple(shape), lambda box: assemble(box, dtype, parts))


# -- what is trained --


def trained_parameters(place: Path, models: list[dict[str, Any]]) -> tuple[dict[str, Parameter], str]:
    """Parameters by name, none of ZeRO 0, which has no ranges; and why there are no optimizer states, if it is so."""
    shapes: list[Mapping[str, Sequence[int]]] = models[0].get("param_shapes") or []
    optim = rank_files(place, OPTIM)
    if (place / UNIVERSAL).is_dir():
        parameters = _universal(place, shapes)
    elif optim and shapes:
        parameters = _of_ranges(place, [load_states(path)["optimizer_state_dict"] for path in optim], shapes)
    else:
        return {}, ""
    for parameter in parameters.values():
        reason = _complete(parameter)
        if reason:
            return parameters, reason
    return parameters, ""


def _complete(parameter: Parameter) -> str:
    """Gives the settings of an Adam the form of torch.optim.AdamW, whose states it has; if that cannot be, says why."""
    settings = parameter.settings
    if not settings:
        return "the settings of the optimizer's groups are not in it"
    if {"exp_avg", "exp_avg_sq"} <= parameter.states.keys():
        if not settings.pop("bias_correction", True):
            return "it is an Adam without correction of the bias"
        if "step" not in parameter.states:
            return "it does not say how many steps were made"
        of_torch = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        settings |= {name: value for name, value in of_torch.items() if name not in ("params", *settings)}
        settings["betas"] = tuple(settings["betas"])
    if "lr" in settings:  # what a schedule of torch notes when it begins, and does not read afterwards
        settings.setdefault("initial_lr", settings["lr"])
    return ""


def _of_ranges(
    place: Path, ranks: list[dict[str, Any]], shapes: list[Mapping[str, Sequence[int]]]
) -> dict[str, Parameter]:
    """Parameters from the flat ranges of all ranks: of ZeRO 1 and 2 in one row, of ZeRO 3 each parameter cut evenly."""
    zero_3 = ranks[0].get("zero_stage", 1) == 3
    counts = ranks[0]["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if counts != {len(ranks)}:
        raise ConfigurationError(
            f"{place} has the optimizer states of {len(ranks)} ranks, where they were cut for {sorted(counts)}: files "
            "are missing, are left from another run, or belong to experts."
        )
    weights = [rank["fp32_flat_groups" if zero_3 else "single_partition_of_fp32_groups"] for rank in ranks]
    optimizers = [
        _Groups.of(rank["optimizer_state_dict" if zero_3 else "base_optimizer_state"], rank) for rank in ranks
    ]
    paddings = None if zero_3 else ranks[0].get("param_alignment_paddings")
    found = {}
    for group, members in enumerate(shapes):
        flats = [rank[group] for rank in weights]
        if not all(isinstance(flat, Tensor) for flat in flats):
            raise ConfigurationError(f"{place} does not hold the weights in float32: they were left on another device.")
        check_form(place, {f"group {group} of rank {rank}": flat for rank, flat in enumerate(flats)})
        states = [optimizer.states.get(group, {}) for optimizer in optimizers]
        offset = 0
        for number, (name, shape) in enumerate(members.items()):
            if zero_3:
                ranges = of_zero_3(shape, offset, len(ranks))
                offset += -(-math.prod(shape) // len(ranks))
            else:
                ranges = _in_a_row([len(flat) for flat in flats], offset, math.prod(shape))
                offset += math.prod(shape) + (paddings[group][number] if paddings else 0)
            parameter = Parameter(gathered(name, shape, ranges, flats), settings=optimizers[0].settings(group))
            for key, first in states[0].items():
                if isinstance(first, Tensor) and first.ndim:
                    parameter.states[key] = gathered(name, shape, ranges, [state[key] for state in states])
            parameter.count_steps(optimizers[0].step(group))
            found[name] = parameter
        taken, there = (offset, len(flats[0])) if zero_3 else (offset, sum(len(flat) for flat in flats))
        if not taken <= there < taken + 2 * len(ranks):  # ZeRO 1 and 2 pad the end to twice the ranks
            raise ConfigurationError(f"{place} has {there} elements in group {group}, of which parameters are {taken}.")
    return found


def of_zero_3(shape: Sequence[int], offset: int, ranks: int) -> list[Range]:
    """Each rank has as many elements, from `offset` on in its flat tensor; the last ones are padded."""
    count = math.prod(shape)
    share = -(-count // ranks)
    starts = [min(rank * share, count) for rank in range(ranks)]
    return [Range(rank, offset, min(share, count - start), start) for rank, start in enumerate(starts)]


def _in_a_row(sizes: Sequence[int], offset: int, count: int) -> list[Range]:
    """Elements from `offset` on in flat tensors of these sizes, one after the other."""
    found = []
    for rank, end in enumerate(accumulate(sizes)):
        start = end - sizes[rank]
        first, last = max(offset, start), min(offset + count, end)
        if first < last:
            found.append(Range(rank, first - start, last - first, first - offset))
    return found


@dataclass
class _Groups:
    """A torch optimizer whose parameters are flat tensors, one of each group of DeepSpeed's.

    Attributes:
        states: Of each of its parameters, by number.
        groups: Its groups: settings, and in `params` the numbers.
        steps: How many were made, where it is said once for all.
    """

    states: Mapping[int, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    steps: Any = None

    @classmethod
    def of(cls, optimizer: Any, rank: Mapping[str, Any]) -> _Groups:
        """From a state dict, or, as an elastic checkpoint has it, from a list of states without settings."""
        steps = rank.get("base_optimizer_state_step")
        if isinstance(optimizer, list):
            return cls(dict(enumerate(optimizer)), [], steps)
        return cls(optimizer["state"], optimizer["param_groups"], steps)

    def settings(self, number: int) -> dict[str, Any]:
        """Of a flat parameter's group."""
        return {name: value for name, value in self._group(number).items() if name not in ("params", "step")}

    def step(self, number: int) -> Any:
        """How many a flat parameter has made: some optimizers count by parameters, some by groups."""
        return self.states.get(number, {}).get("step", self._group(number).get("step", self.steps))

    def _group(self, number: int) -> Mapping[str, Any]:
        return next((group for group in self.groups if number in group["params"]), {})


def _universal(place: Path, shapes: list[Mapping[str, Sequence[int]]]) -> dict[str, Parameter]:
    """Parameters from a file for each of their states."""
    common = place / UNIVERSAL / "optimizer_state.pt"
    optimizer = load_states(common) if common.is_file() else {}
    inner = optimizer.get("optimizer_state_dict", {})  # of ZeRO 3
    groups = _Groups.of({"state": inner.get("state", {}), "param_groups": optimizer.get("param_groups", [])}, optimizer)
    found = {}
    for group, members in enumerate(shapes):
        for name, shape in members.items():
            folder = place / UNIVERSAL / name
            if Path(name).name != name or not (folder / "fp32.pt").is_file():
                raise ConfigurationError(f"{place} is incomplete: there is no {UNIVERSAL}/{name}/fp32.pt in it.")
            files = {path.stem: path for path in folder.glob("*.pt")}
            parameter = Parameter(_in_file(files.pop("fp32"), shape), settings=groups.settings(group))
            step = files.pop("step", None)
            parameter.states = {key: _in_file(path, shape) for key, path in files.items()}
            parameter.count_steps(groups.step(group) if step is None else load_data(step, _CLASSES))
            found[name] = parameter
    return found


def _in_file(path: Path, shape: Sequence[int]) -> LazyTensor:
    """A parameter's state, which of ZeRO 3 is stored flat; with tensor parallelism `shape` is that of a slice only."""

    def load() -> Tensor:
        stored = load_data(path, _CLASSES)
        tensor = stored["param"] if isinstance(stored, dict) else stored
        if not isinstance(tensor, Tensor):
            raise ConfigurationError(f"{path} holds no tensor.")
        check_form(path, {path.stem: tensor})
        return tensor.view(tuple(shape)) if tensor.ndim == 1 and tensor.numel() == math.prod(shape) else tensor

    first = load()
    every = whole(first.shape)
    return LazyTensor(first.dtype, tuple(first.shape), lambda box: load()[box.within(every)])
