"""Checkpoint files of Lightning (`.ckpt`, made by torch.save): read without running what may be in them.

They hold optimizer states by the parameters' numbers. Whose number it is only the module knows, so an LLMModule is
built anew, without memory, to ask it.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any

import torch
from torch import Tensor

from lightning_llm.checkpoint.lazy import LazyTensor
from lightning_llm.checkpoint.writing import Content
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.module import LLMModule

HYPER_PARAMETERS = "hyper_parameters"
DATA_ALONE: list[Any] = [Path, PurePath, PosixPath, PurePosixPath, WindowsPath, PureWindowsPath]


def read_lightning_file(
    path: Path, config: DecoderConfig | None = None
) -> tuple[Content, DecoderConfig | None, list[str]]:
    """What a Lightning checkpoint holds.

    Args:
        path: The file; tensors stay in it until they are read.
        config: Of the model, if the file does not tell.

    Returns:
        The content, the model's configuration if it is a decoder's, and what could not be taken over.

    Raises:
        ConfigurationError: It is not one, or holds more than data.
    """
    stored = load_data(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("state_dict"), dict):
        raise ConfigurationError(f"{path} has no state_dict: it is not a checkpoint of Lightning.")
    module = module_of(stored.get(HYPER_PARAMETERS))
    if module is not None:
        config = module.config
    weights: dict[str, Tensor] = {n: v for n, v in stored["state_dict"].items() if isinstance(v, Tensor)}
    if config is not None and config.tie_word_embeddings:  # stored once, under its owner's name
        weights.pop("model.lm_head.weight", None)
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    values = {f"model.{n}": v for n, v in stored["state_dict"].items() if not isinstance(v, Tensor)}
    remarks = []
    states = stored.get("optimizer_states")
    if states is not None:
        try:
            named = name_states(states, module, weights)
            tensors |= {name: value for name, value in named.items() if isinstance(value, Tensor)}
            values |= {name: value for name, value in named.items() if not isinstance(value, Tensor)}
        except NamesUnknownError as error:
            states = None
            remarks.append(f"its optimizer states are left out, so that no run can go on from it: {error}")
    check_form(path, tensors)
    content = Content(
        step=int(stored.get("global_step", 0)),
        tensors={name: LazyTensor.of(tensor) for name, tensor in tensors.items()},
        values=values,
        trainer={name: value for name, value in stored.items() if name not in ("state_dict", "optimizer_states")},
    )
    return content if states is not None else content.without_optimizers(), config, remarks


def load_data(path: Path, also: Sequence[tuple[Any, str]] = ()) -> Any:
    """What `torch.save` wrote, if it is plain data and tensors; these stay in the file until they are read.

    Args:
        path: The file.
        also: What takes the place of a class or function, with the full name of that.

    Raises:
        ConfigurationError: It is no such file, or names something else, which is not run.
    """
    try:
        with torch.serialization.safe_globals([*DATA_ALONE, *also]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise refused(path, error) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise ConfigurationError(f"{path} cannot be read as what torch.save writes: {error}") from error


def refused(path: Path, error: pickle.UnpicklingError) -> ConfigurationError:
    """That a file holds more than data, with its name."""
    found = re.search(r"GLOBAL ([\w.]+)|(?:function|class|callable) ([\w.]+)", str(error))
    if found is None:
        return ConfigurationError(f"{path} cannot be read as plain data and tensors: {str(error).splitlines()[0]}")
    return ConfigurationError(
        f"{path} refers to {found[1] or found[2]}, which is not plain data, so it is not loaded: reading it could run "
        "code. Nothing of it was run. If you trust its origin, load it where it was made and save its state_dict alone."
    )


class NamesUnknownError(Exception):
    """It cannot be told which state is which parameter's; the message says why."""


def module_of(hyper_parameters: Any) -> LLMModule | None:
    """The LLMModule that was saved, on the meta device; None if it was another one."""
    known = hyper_parameters if isinstance(hyper_parameters, dict) else {}
    model, optimizer = known.get("model"), known.get("optimizer", "adamw")
    if not isinstance(model, dict) or optimizer not in ("adamw", "muon"):
        return None
    try:
        module = LLMModule(DecoderConfig.from_dict(model), optimizer=optimizer)
    except ConfigurationError:
        return None
    with torch.device("meta"):
        module.model = module.build_model()
    return module


def name_states(
    states: list[Any], module: LLMModule | None, weights: Mapping[str, Tensor | LazyTensor]
) -> dict[str, Any]:
    """Optimizer states by number -> by parameter, as `module_state.py` names them.

    Args:
        states: Of each optimizer.
        module: Whose they are; None if that is not known.
        weights: Of it, by name.

    Raises:
        NamesUnknownError: Whose they are cannot be told.
    """
    if module is None:
        raise NamesUnknownError("it was not saved by an LLMModule, so whose they are cannot be told")
    if len(states) != 1:
        raise NamesUnknownError(f"there are {len(states)} optimizers, and an LLMModule has one")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    expected = [
        [names[id(parameter)] for parameter in group["params"]]
        for group in module.optimizer_settings.parameter_groups(module)
    ]
    (state,) = states
    groups = state["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group) for group in expected]:
        raise NamesUnknownError(
            f"its groups have {sizes} parameters, where those of an LLMModule have {[len(group) for group in expected]}"
        )
    named: dict[str, Any] = {}
    for group, members in zip(groups, expected, strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        for number, name in zip(group["params"], members, strict=True):
            own = state["state"].get(number, {})
            if name not in weights or any(_is_another_shape(value, weights[name]) for value in own.values()):
                raise NamesUnknownError(f"the state of parameter {number} does not have the shape of {name}")
            named |= {f"optimizer_0.state.{name}.{key}": value for key, value in own.items()}
            named |= {f"optimizer_0.param_groups.{name}.{key}": value for key, value in settings.items()}
    return named


def _is_another_shape(value: Any, weight: Tensor | LazyTensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape


def check_form(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses what is no array of numbers, and what would be more in a checkpoint than it is in the file."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConfigurationError(f"{path} holds {name} as a {tensor.layout} {tensor.dtype} tensor, not as numbers.")
        if tensor.untyped_storage().nbytes() < math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise ConfigurationError(f"{path} holds {name}, an expanded tensor, of which not every element is stored.")
