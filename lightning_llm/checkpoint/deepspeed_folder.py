"""Checkpoints of DeepSpeed's engine, its Universal ones among them, and of Lightning's DeepSpeedStrategy: read without
running what may be in their pickles, and without DeepSpeed. What lies in which file is told in deepspeed_parts.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_llm._version import lightning_version
from lightning_llm.checkpoint.dcp_folder import OURS, find_prefix, select_weights
from lightning_llm.checkpoint.deepspeed_parts import (
    MODEL,
    UNIVERSAL,
    Parameter,
    Range,
    count_slices,
    gathered,
    is_zero_3,
    load_states,
    of_zero_3,
    rank_files,
    trained_parameters,
)
from lightning_llm.checkpoint.lazy import LazyTensor
from lightning_llm.checkpoint.lightning_file import (
    HYPER_PARAMETERS,
    NamesUnknownError,
    check_form,
    module_of,
    name_states,
)
from lightning_llm.checkpoint.writing import Content
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig

LIGHTNING = "pytorch-lightning_version"
_OWN_KEYS = frozenset(
    "module buffer_names optimizer param_shapes shared_params frozen_param_shapes frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size ds_config "
    "ds_version checkpoint_parallel_dimensions universal_checkpoint_info sparse_tensor_module_names "
    "csr_tensor_module_names num_experts ds_autoep_layers autoep_layers folding".split()
)


def step_folder(folder: Path) -> Path | None:
    """The folder of one step's files: the one that was named, or the last one in it; None if it is not DeepSpeed's."""
    if rank_files(folder, MODEL):
        return folder
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file():
            tag = (folder / name).read_text(errors="replace").strip()
            if tag and Path(tag).name == tag and rank_files(folder / tag, MODEL):
                return folder / tag
    return None


def read_deepspeed_folder(
    folder: Path, config: DecoderConfig | None = None, prefix: str | None = None
) -> tuple[Content, DecoderConfig | None, list[str]]:
    """What DeepSpeed's `engine.save_checkpoint`, its `ds_to_universal` or Lightning's DeepSpeedStrategy has written.

    Weights are the float32 ones of the optimizer, if it keeps such, else the module's.

    Args:
        folder: Which `step_folder` knows.
        config: Of the model, if it is not an LLMModule of Lightning; then its weights must all be there.
        prefix: Of the weights' names; None looks for it.

    Returns:
        The content, the model's configuration if it is a decoder's, and what could not be taken over.

    Raises:
        ConfigurationError: It is damaged, holds more than data, not the model's weights, or was saved by a pipeline,
            by experts or in slices, whose files are others.
    """
    place = step_folder(folder)
    assert place is not None
    _refuse_other_kinds(place)
    try:
        return _read(place, config, prefix)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{place} is damaged, or not what DeepSpeed writes: {error!r}.") from error


def _read(
    place: Path, config: DecoderConfig | None, prefix: str | None
) -> tuple[Content, DecoderConfig | None, list[str]]:
    models = [load_states(path) for path in rank_files(place, MODEL)]
    state = models[0]
    by_lightning = LIGHTNING in state
    module = module_of(state.get(HYPER_PARAMETERS)) if by_lightning else None
    config = config if module is None else module.config
    parameters, reason = trained_parameters(place, models)
    tensors = _weights(place, models, parameters)
    if by_lightning:
        # Before Lightning 2.1 all names began with that of a wrapper.
        base, prefix = "model.", "_forward_module."
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if config is not None and config.tie_word_embeddings:  # stored once, under its owner's name
            weights.pop("model.lm_head.weight", None)
        trainer = {name: value for name, value in state.items() if name not in _OWN_KEYS}
        step, remarks = int(state["global_step"]), []
        if "loops" not in state:
            reason = reason or "it was saved with save_weights_only=True"
    else:
        base, prefix = OURS, (find_prefix(tensors, config) or "") if prefix is None else prefix
        weights = select_weights(place, tensors, config, prefix)
        step = int(state["global_steps"])
        trainer = {"epoch": 0, "global_step": step, LIGHTNING: lightning_version(), "lr_schedulers": []}
        remarks = ["it does not say where in its data the run was: a run that goes on from it begins with the first"]
    found: dict[str, LazyTensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        own = name.removeprefix(prefix)
        if own not in weights:
            reason = reason or f"it has that of {name}, which is none of the weights"
        own = base.removeprefix("model.") + own
        found |= {f"optimizer_0.state.{own}.{key}": tensor for key, tensor in parameter.states.items()}
        values |= {f"optimizer_0.param_groups.{own}.{key}": value for key, value in parameter.settings.items()}
    if not parameters:
        try:
            found, values = _of_zero_0(state, module, weights)
        except NamesUnknownError as error:
            reason = str(error)
    content = Content(
        step=step,
        tensors={**{base + name: tensor for name, tensor in weights.items()}, **found},
        values=values,
        trainer=trainer,
    )
    if reason:
        remarks = [f"its optimizer states are left out, so that no run can go on from it: {reason}"]
        content = content.without_optimizers()
    return content, config, remarks


def _refuse_other_kinds(place: Path) -> None:
    names = [path.name for path in place.iterdir()]
    instead = "Load it where it was made, and save the whole module's state_dict."
    if any(re.match(r"layer_\d+-model", name) for name in names):
        raise ConfigurationError(f"{place} was saved by a PipelineModule, layer by layer, without names. {instead}")
    if any("expert_" in name or name.startswith("expp_rank_") for name in names):
        raise ConfigurationError(f"{place} holds experts of DeepSpeed's own kind in files of their own. {instead}")
    if count_slices(place) > 1 and not (place / UNIVERSAL).is_dir():
        raise ConfigurationError(
            f"{place} holds {count_slices(place)} slices of each weight (tensor parallelism). Put them together by "
            "DeepSpeed's ds_to_universal, and import what it makes."
        )


def _weights(place: Path, models: list[dict[str, Any]], parameters: Mapping[str, Parameter]) -> dict[str, LazyTensor]:
    """All weights and buffers by the module's names."""
    state = models[0]
    kept: dict[str, Tensor] = {n: v for n, v in state["module"].items() if isinstance(v, Tensor)}
    if is_zero_3(place):  # the others have left empty tensors there
        kept = {name: kept[name] for name in state["buffer_names"] if name in kept}
    check_form(place, kept)
    weights = {name: LazyTensor.of(tensor) for name, tensor in kept.items()}
    for name, shape in (state.get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
        ranges = of_zero_3(shape, 0, len(models)) if is_zero_3(place) else [Range(0, 0, math.prod(shape), 0)]
        weights[name] = gathered(name, shape, ranges, fragments)
    shared = state.get("shared_params") or {}
    cut = weights.keys() - parameters.keys() - shared.keys() - set(state["buffer_names"])
    if cut and count_slices(place) > 1:
        raise ConfigurationError(
            f"Of {min(cut)}, which was not trained, {place} holds slices alone: ds_to_universal puts together what was."
        )
    weights |= {name: parameter.weight for name, parameter in parameters.items()}
    return weights | {copy: weights[owner] for copy, owner in shared.items() if owner in weights}


def _of_zero_0(
    state: Mapping[str, Any], module: Any, weights: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """States and settings, which are numbered as in a Lightning file.

    Raises:
        NamesUnknownError: Whose they are cannot be told.
    """
    optimizer = state.get("optimizer")
    if not optimizer:
        raise NamesUnknownError("there are none in it")
    named = name_states([optimizer.get("optimizer_state_dict", optimizer)], module, weights)
    tensors = {name: LazyTensor.of(value) for name, value in named.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in named.items() if name not in tensors}
