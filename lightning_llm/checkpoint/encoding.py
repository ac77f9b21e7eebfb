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

from lightning_llm.checkpoint.planning import DTYPE_NAMES
from lightning_llm.errors import ConfigurationError

KIND = "$"


def encode(tree: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A tree of plain values as one that JSON can hold.

    Types are kept, but for these: an enum of strings or numbers becomes its value, other kinds of mapping, list and
    string become a dict, list or str, a parameter a tensor, a time zone its offset, and tensors come back on the host.

    Args:
        tree: Mappings, sequences, sets, numbers, strings, bytes, paths, times, dtypes, devices, arrays and tensors.
        tensors: Gets the tree's tensors and arrays, by the path at which they stand.
        where: The path of `tree` itself, for errors and names, for example "callbacks".

    Raises:
        ConfigurationError: There is something else in the tree; its path is named.
    """
    if isinstance(tree, Enum) and isinstance(tree, (str, int)):
        tree = tree.value
    if tree is None or isinstance(tree, bool):
        return tree
    if isinstance(tree, (np.generic, np.ndarray)) and not isinstance(tree, str):
        kind = "array" if type(tree) is np.ndarray else "scalar"
        return {KIND: kind, "value": _keep(tensors, where, _as_tensor(tree, where))}
    if isinstance(tree, Tensor):
        return {KIND: "tensor", "value": _keep(tensors, where, _plain(tree, where))}
    if isinstance(tree, str):
        return str(tree)
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else {KIND: "float", "value": repr(float(tree))}
    if isinstance(tree, complex):
        return {KIND: "complex", "value": [encode(part, tensors, where) for part in (tree.real, tree.imag)]}
    if isinstance(tree, Mapping):
        items = [(key, encode(value, tensors, f"{where}.{key}")) for key, value in tree.items()]
        if all(isinstance(key, str) for key in tree) and KIND not in tree:
            return {str(encode(key, tensors, where)): value for key, value in items}
        pairs = [[encode(key, tensors, f"{where}.(key)"), value] for key, value in items]
        return {KIND: "mapping", "value": pairs}
    if isinstance(tree, list):
        return [encode(value, tensors, f"{where}.{index}") for index, value in enumerate(tree)]
    for name, (kept, _) in _COLLECTIONS.items():
        if type(tree) is kept:
            return {KIND: name, "value": encode(list(tree), tensors, where)}
    for name, (kept, to_json, _) in _SCALARS.items():
        if type(tree) is kept:
            return {KIND: name, "value": to_json(tree)}
    raise _refusal(tree, where)


def _refusal(value: Any, where: str, more: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"The trainer's state holds a {type(value).__module__}.{type(value).__qualname__} at {where}{more}, which no "
        "checkpoint can give back without executing code. Keep to plain values and tensors in hyperparameters "
        "(save_hyperparameters(ignore=[...])) and in the state_dict() of callbacks."
    )


def _as_tensor(array: np.ndarray | np.generic, where: str) -> Tensor:
    """An array's or scalar's copy."""
    try:
        if isinstance(array, np.generic) or type(array) is np.ndarray:
            return _plain(torch.from_numpy(np.array(array)), where)
    except (TypeError, ValueError):
        pass  # objects, strings, times, another byte order
    raise _refusal(array, where, f" of type {array.dtype}")


def _plain(tensor: Tensor, where: str) -> Tensor:
    """A tensor whose bytes say all that there is to it."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise _refusal(tensor, where)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
        raise _refusal(tensor, where, f" of type {tensor.dtype} ({tensor.layout}, on {tensor.device})")
    return tensor.detach().resolve_conj().resolve_neg()


def _keep(tensors: dict[str, Tensor], where: str, tensor: Tensor) -> str:
    name = where
    while name in tensors:  # keys such as 1 and "1" make one path
        name += "'"
    tensors[name] = tensor
    return name


# Kind -> type, and how its value comes back.
_COLLECTIONS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, tuple),
    "size": (torch.Size, torch.Size),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
}

# Kind -> type, its value for JSON, and how it comes back.
_SCALARS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "bytearray": (bytearray, lambda value: base64.b64encode(value).decode(), lambda v: bytearray(base64.b64decode(v))),
    "path": (type(Path()), str, Path),
    "pure_path": (type(PurePath()), str, PurePath),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "timedelta": (timedelta, lambda v: [v.days, v.seconds, v.microseconds], lambda parts: timedelta(*parts)),
    "dtype": (torch.dtype, lambda value: str(value).removeprefix("torch."), lambda name: _dtype(name)),
    "device": (torch.device, str, torch.device),
}

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": lambda parts: complex(*parts),
    "mapping": dict,
    **{kind: back for kind, (_, back) in _COLLECTIONS.items()},
    **{kind: back for kind, (_, _, back) in _SCALARS.items()},
}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"The checkpoint names a type of tensor that this torch has not: {name!r}.")
    return found


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` was given.

    Args:
        tree: What it returned.
        tensors: What it put there, by the same names.

    Raises:
        ConfigurationError: It was written by a later version.
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
    if kind not in _DECODERS:
        raise ConfigurationError(
            f"The checkpoint holds a value of kind {kind!r}, which this lightning_llm cannot read."
        )
    return _DECODERS[kind](decode(value, tensors))
