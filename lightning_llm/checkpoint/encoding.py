"""Plain state as JSON beside tensors: loops, schedulers, callbacks, hyperparameters, random generators.

What JSON has no word for is an object with a "$" that names its kind. Nothing is pickled, so reading can run nothing;
what cannot be written that way is refused when it is saved, where it can still be mended.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError

KIND = "$"


def encode(tree: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A tree of plain values as one that JSON can hold.

    Args:
        tree: Mappings, sequences, sets, numbers, strings, bytes, paths, times, dtypes, arrays and tensors.
        tensors: Gets the tree's tensors and arrays, by the path at which they stand.
        where: The path of `tree` itself, for errors and names, for example "callbacks".

    Raises:
        ConfigurationError: There is something else in the tree; its path is named.
    """
    if isinstance(tree, Enum) and isinstance(tree, (str, int)):
        tree = tree.value
    if tree is None or isinstance(tree, bool):
        return tree
    if isinstance(tree, np.generic):
        return {KIND: "scalar", "value": _keep(tensors, where, torch.from_numpy(np.asarray(tree)))}
    if isinstance(tree, str):
        return str(tree)
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {KIND: "float", "value": repr(tree)}
    if isinstance(tree, Mapping):
        items = {key: encode(value, tensors, f"{where}.{key}") for key, value in tree.items()}
        if all(isinstance(key, str) for key in items) and KIND not in items:
            return items
        pairs = [[encode(key, tensors, f"{where}.(key)"), value] for key, value in items.items()]
        return {KIND: "mapping", "value": pairs}
    if isinstance(tree, list):
        return [encode(value, tensors, f"{where}.{index}") for index, value in enumerate(tree)]
    if isinstance(tree, torch.Size):
        return {KIND: "size", "value": list(tree)}
    for kind in (tuple, set, frozenset):
        if isinstance(tree, kind):
            return {KIND: kind.__name__, "value": encode(list(tree), tensors, where)}
    if isinstance(tree, Tensor):
        return {KIND: "tensor", "value": _keep(tensors, where, tree.detach())}
    if isinstance(tree, np.ndarray):
        return {KIND: "array", "value": _keep(tensors, where, torch.from_numpy(tree.copy()))}
    if isinstance(tree, (bytes, bytearray)):
        return {KIND: "bytes", "value": base64.b64encode(tree).decode()}
    if isinstance(tree, complex):
        return {KIND: "complex", "value": [tree.real, tree.imag]}
    if isinstance(tree, PurePath):
        return {KIND: "path", "value": str(tree)}
    if isinstance(tree, datetime):
        return {KIND: "datetime", "value": tree.isoformat()}
    if isinstance(tree, timedelta):
        return {KIND: "timedelta", "value": [tree.days, tree.seconds, tree.microseconds]}
    if isinstance(tree, torch.dtype):
        return {KIND: "dtype", "value": str(tree).removeprefix("torch.")}
    if isinstance(tree, torch.device):
        return {KIND: "device", "value": str(tree)}
    raise ConfigurationError(
        f"The trainer's state holds a {type(tree).__module__}.{type(tree).__qualname__} at {where}, which no "
        "checkpoint can give back without executing code. Keep to plain values and tensors in hyperparameters "
        "(save_hyperparameters(ignore=[...])) and in the state_dict() of callbacks."
    )


def _keep(tensors: dict[str, Tensor], where: str, tensor: Tensor) -> str:
    name = where
    while name in tensors:  # keys such as 1 and "1" make one path
        name += "'"
    tensors[name] = tensor
    return name


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "mapping": dict,
    "size": torch.Size,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": base64.b64decode,
    "complex": lambda parts: complex(*parts),
    "path": Path,
    "datetime": datetime.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
    "dtype": lambda name: getattr(torch, name),
    "device": torch.device,
}


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` was given.

    Args:
        tree: What it returned.
        tensors: What it put there, by the same names.
    """
    if isinstance(tree, list):
        return [decode(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if KIND not in tree:
        return {key: decode(value, tensors) for key, value in tree.items()}
    kind, value = tree[KIND], tree["value"]
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "scalar":
        return tensors[value].numpy()[()]
    return _DECODERS[kind](decode(value, tensors))
