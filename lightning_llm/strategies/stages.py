"""Cutting a model into pipeline stages: which units each stage gets, and a rank's model with the others' parts gone.

The model stays the container in which parameters have their global names; a rank with several stages gets a view of it
for each. llm3d.py calls `split_units` and `keep_stages`; pipeline.py runs what they leave.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

from torch import nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.dividing import balanced_counts, even_counts
from lightning_llm.strategies.plan import ParallelPlan

Split = Literal["balanced", "even"] | Sequence[int] | Sequence[Sequence[str]]

# What torch keeps of hooks and children in dicts; a view has its own of each. Parameters and buffers stay shared.
_OWN_DICTS = {k for k, v in vars(nn.Module()).items() if isinstance(v, dict)} - {"_parameters", "_buffers"}
_ORIGIN = "_lightning_llm_view_of"


def split_units(plan: ParallelPlan, model: nn.Module, num_stages: int, split: Split = "balanced") -> list[range]:
    """Which of the model's units each stage gets, contiguous and in order.

    Args:
        plan: Names the units, and what else the first and the last stage have.
        model: Whole; it may be on the meta device.
        num_stages: Of the pipeline, over all ranks.
        split: "balanced" makes the largest stage as small as can be, by numbers of parameters, those of embedding and
            output layer included; "even" deals out units by their number; or a list with one entry for each stage: how
            many units it has, or the names of all its modules, as `named_modules()` gives them.

    Raises:
        ConfigurationError: More stages than units, or a list that does not describe the model.
    """
    _check_parameters(plan, model)
    num_units = len(plan.units(model))
    if not isinstance(split, str):
        counts = _counts_of_list(plan, model, num_stages, split)
    elif split not in ("balanced", "even"):
        raise ConfigurationError(f"split={split!r} must be 'balanced', 'even', or a list with an entry for each stage.")
    elif num_stages > num_units:
        raise ConfigurationError(
            f"{num_stages} pipeline stages are more than the {num_units} layers of the model. Use at most {num_units}: "
            "fewer pipeline ranks, or fewer stages on each."
        )
    else:
        counts = (
            even_counts(num_units, num_stages)
            if split == "even"
            else balanced_counts(unit_costs(plan, model), num_stages)
        )
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def unit_costs(plan: ParallelPlan, model: nn.Module) -> list[int]:
    """Parameters of each unit; the first and the last one have those of the modules before and after them too."""
    costs = [_size(unit) for unit in plan.units(model)]
    costs[0] += sum(_size(model.get_submodule(name)) for name in plan.pipeline_first)
    costs[-1] += sum(_size(model.get_submodule(name)) for name in plan.pipeline_last)
    return costs


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _counts_of_list(plan: ParallelPlan, model: nn.Module, num_stages: int, split: Sequence[Any]) -> list[int]:
    if len(split) != num_stages:
        raise ConfigurationError(
            f"The split has {len(split)} entries, but the pipeline has {num_stages} stages. Give one entry for each."
        )
    numbers = all(isinstance(entry, int) for entry in split)
    counts = list(split) if numbers else _counts_of_names(plan, model, split)
    if sum(counts) != len(plan.units(model)):
        raise ConfigurationError(
            f"The split {counts} gives out {sum(counts)} layers, but the model has {len(plan.units(model))}."
        )
    # The outer stages may consist of the embedding or the output layer alone.
    least = [int(not plan.pipeline_first), *[1] * (num_stages - 2), int(not plan.pipeline_last)]
    for stage, (count, needed) in enumerate(zip(counts, least, strict=True)):
        if count < needed:
            raise ConfigurationError(f"The split {counts} leaves stage {stage} without a layer. Give it at least one.")
    return counts


def _counts_of_names(plan: ParallelPlan, model: nn.Module, split: Sequence[Any]) -> list[int]:
    units = [f"{plan.pipeline_units}.{key}" for key, _ in model.get_submodule(plan.pipeline_units).named_children()]
    for entry in split:
        if isinstance(entry, (str, int)) or not all(isinstance(name, str) for name in entry):
            raise ConfigurationError(
                f"The split's entry {entry!r} must be a list of module names, for example {units[:2]}; or give a "
                "number of layers for every stage."
            )
    given = [name for entry in split for name in entry]
    wanted = [*plan.pipeline_first, *units, *plan.pipeline_last]
    for problem, names in {
        "names what no stage can be given": [name for name in given if name not in wanted],
        "leaves out": [name for name in wanted if name not in given],
        "names more than once": sorted({name for name in given if given.count(name) > 1}),
        "puts elsewhere than on the first stage": [n for n in plan.pipeline_first if n not in split[0]],
        "puts elsewhere than on the last stage": [n for n in plan.pipeline_last if n not in split[-1]],
    }.items():
        if names:
            raise ConfigurationError(
                f"The split {problem} {names}. Its {len(wanted)} modules are, in order: {wanted[0]} ... {wanted[-1]}."
            )
    order = [name for name in given if name in units]
    for before, after in zip(units, order, strict=True):
        if before != after:
            raise ConfigurationError(f"The split has {after} where {before} must come: layers stay in their order.")
    return [sum(name in units for name in entry) for entry in split]


def _check_parameters(plan: ParallelPlan, model: nn.Module) -> None:
    """Refuses parameters that several stages would each train their own copy of."""
    units = [f"{plan.pipeline_units}.{key}" for key, _ in model.get_submodule(plan.pipeline_units).named_children()]
    parts = (*plan.pipeline_first, *units, *plan.pipeline_last)
    outside: list[str] = []
    users: dict[int, dict[str, str]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        if part is None:
            outside.append(name)
        else:
            users[id(parameter)][part] = name
    if outside:
        raise ConfigurationError(
            f"The plan of {type(model).__name__} gives {len(outside)} parameters to no pipeline stage, for example "
            f"{outside[:3]}: each stage would train its own copy. Name their modules in pipeline_first or _last."
        )
    for names in (tuple(names.values()) for names in users.values() if len(names) > 1):
        if not {names, names[::-1]} & set(plan.tied):
            raise ConfigurationError(
                f"{list(names)} of {type(model).__name__} are one parameter, and stages cannot share it. Name the pair "
                "in the plan's `tied` if one is in the first stage and the other in the last, or make them separate."
            )


def keep_stages(
    model: nn.Module, plan: ParallelPlan, stage_ids: Sequence[int], cut: Sequence[range]
) -> dict[int, nn.Module]:
    """Removes from `model` what none of this rank's stages needs, and gives each stage the module that runs it.

    For one stage that is `model` itself. For several it is a view each: a copy of the modules above the units that
    shares everything below them, so that what is done to a unit (tensor parallelism, sharding, new weights) shows in
    `model` too, under the global names. What replaces a unit by another module, or concerns the root (`fully_shard`),
    must be done to the views. Tied copies become parameters of their own wherever they are.

    Args:
        model: Whole; cut in place.
        plan: Its plan.
        stage_ids: Of this rank, ascending.
        cut: Units of every stage, as `split_units` gives them.

    Returns:
        `{stage: module}`: token ids or hidden states in, hidden states or logits out.
    """
    last = len(cut) - 1
    keys = [key for key, _ in model.get_submodule(plan.pipeline_units).named_children()]
    kept = {stage: {keys[unit] for unit in cut[stage]} for stage in stage_ids}
    _remove(model, plan, set().union(*kept.values()), first=0 in kept, last=last in kept)
    if len(stage_ids) == 1:
        return {stage_ids[0]: model}
    _untie(model, plan)
    above = {
        name[:end]
        for name in (f"{plan.pipeline_units}.", *plan.pipeline_first, *plan.pipeline_last)
        for end in (index for index, letter in enumerate(name) if letter == ".")
    }
    stages = {stage: _view(model, "", above) for stage in stage_ids}
    for stage, view in stages.items():
        _remove(view, plan, kept[stage], first=stage == 0, last=stage == last)
    return stages


def follow_modes(stages: Iterable[nn.Module]) -> None:
    """Puts views into training or evaluation mode as the model that they were cut from."""
    for stage in stages:
        for module in stage.modules():
            module.training = vars(module).get(_ORIGIN, module).training


def _remove(model: nn.Module, plan: ParallelPlan, kept: set[str], *, first: bool, last: bool) -> None:
    units = model.get_submodule(plan.pipeline_units)
    for key in [key for key, _ in units.named_children() if key not in kept]:
        delattr(units, key)
    for name in (() if first else plan.pipeline_first) + (() if last else plan.pipeline_last):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, None)


def _untie(model: nn.Module, plan: ParallelPlan) -> None:
    """A copy on the owner's rank is another stage's all the same: a pipeline sums the gradients of both."""
    modules = dict(model.named_modules())
    for owner, tied_copy in plan.tied:
        (parent, _, attribute), owner_parent = tied_copy.rpartition("."), owner.rpartition(".")[0]
        if parent in modules and owner_parent in modules:
            tensor = getattr(modules[parent], attribute)
            own = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            modules[parent].register_parameter(attribute, own)


def _view(module: nn.Module, name: str, above: set[str]) -> nn.Module:
    view = copy.copy(module)
    for attribute in _OWN_DICTS:
        vars(view)[attribute] = vars(module)[attribute].copy()
    vars(view)[_ORIGIN] = module  # around nn.Module's bookkeeping: a view does not contain its origin
    for key, child in module._modules.items():
        path = f"{name}.{key}" if name else key
        if child is not None and path in above:
            view._modules[key] = _view(child, path, above)
    return view
