"""Folders of torch.distributed.checkpoint, read without running what may be in their pickles.

`.metadata` is a pickle: a few classes that are nothing but fields are let in, and nothing else. Tensors and values are
read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from lightning_llm._version import lightning_version
from lightning_llm.checkpoint.lazy import Box, LazyTensor, assemble
from lightning_llm.checkpoint.lightning_file import DATA_ALONE, refused
from lightning_llm.checkpoint.writing import Content
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig

METADATA = ".metadata"
OURS = "model.model."  # the state dict, and in it the attribute of an LLMModule that is the decoder
OPTIMIZERS = ("optimizer", "optim")

_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
        torch.Size,
    )
}


def read_dcp_folder(
    folder: Path, config: DecoderConfig | None = None, prefix: str | None = None
) -> tuple[Content, DecoderConfig | None, list[str]]:
    """What `dcp.save({"model": ..., "optimizer": ...})`, torchtitan and others have written.

    Args:
        folder: With `.metadata` and `.distcp` files.
        config: Of the model; then its weights must all be there.
        prefix: Of the weights' names; None looks for it.

    Returns:
        The content, `config`, and what could not be taken over.

    Raises:
        ConfigurationError: It is damaged, holds more than data, or not the model's weights.
    """
    stored = DcpFolder(folder)
    tensors = stored.tensors()
    prefix = _prefix(tensors, config) if prefix is None else prefix
    candidates = {name: tensor for name, tensor in tensors.items() if prefix or _part(name) not in OPTIMIZERS}
    weights = select_weights(folder, candidates, config, prefix)
    found, values, reason = _optimizer(stored, tensors, weights)
    remarks = [f"its optimizer states are left out, so that no run can go on from it: {reason}"] if reason else []
    if found:
        remarks.append("it does not say where in its data the run was: a run that goes on from it counts from step 0")
    step = max((int(found[name].read(Box((), ()))) for name in found if name.endswith(".step")), default=0)
    content = Content(
        step=step,
        tensors={**{OURS + name: tensor for name, tensor in weights.items()}, **found},
        values=values,
        trainer={
            "epoch": 0,
            "global_step": step,
            "pytorch-lightning_version": lightning_version(),
            **({"lr_schedulers": []} if found else {}),
        },
        weights_only=not found,
    )
    return content, config, remarks


class DcpFolder:
    """What is in such a folder.

    Args:
        folder: Of it.

    Raises:
        ConfigurationError: Its `.metadata` is damaged, or refers to more than plain data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = _load_metadata(folder / METADATA)
        self._loaded: tuple[str, dict[tuple[int, ...], Tensor]] = ("", {})

    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors by their flat names. Their blocks are read whole, those of one tensor at a time."""
        return {
            name: LazyTensor(entry.properties.dtype, tuple(entry.size), partial(self._read, name))
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def values(self) -> dict[str, Callable[[], Any]]:
        """What is no tensor, by flat names, each with what reads it."""
        return {
            name: partial(self._load, metadata.MetadataIndex(name))
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata)
        }

    def _read(self, name: str, box: Box) -> Tensor:
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        blocks = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        parts = ((block, partial(self._block, name, block, entry.properties.dtype)) for block in blocks)
        try:
            return assemble(box, entry.properties.dtype, parts)
        except ValueError as error:
            raise ConfigurationError(f"{self._folder} is damaged: of {name}, {error}.") from error

    def _block(self, name: str, block: Box, dtype: torch.dtype) -> Tensor:
        if self._loaded[0] != name:
            self._loaded = (name, {})
        blocks = self._loaded[1]
        if block.offsets not in blocks:
            tensor = self._load(metadata.MetadataIndex(name, block.offsets))
            if not isinstance(tensor, Tensor) or tensor.shape != block.shape or tensor.dtype != dtype:
                raise ConfigurationError(f"{self._folder} is damaged: {name} is not what {METADATA} says.")
            blocks[block.offsets] = tensor
        return blocks[block.offsets]

    def _load(self, index: metadata.MetadataIndex) -> Any:
        place = self._metadata.storage_data.get(index)
        if not isinstance(place, filesystem._StorageInfo) or getattr(place, "transform_descriptors", None):
            raise ConfigurationError(f"{self._folder}: {METADATA} does not say where {index.fqn} is, in plain form.")
        inside = PurePosixPath(place.relative_path)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigurationError(f"{self._folder}: {METADATA} points outside the folder ({place.relative_path!r}).")
        path = self._folder / inside
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            with torch.serialization.safe_globals(DATA_ALONE):
                return torch.load(content, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise refused(path, error) from None
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise ConfigurationError(f"{index.fqn} cannot be read in {path}: {error}") from error


class _DataUnpickler(pickle.Unpickler):
    """Builds what is nothing but data."""

    def find_class(self, module: str, name: str) -> Any:
        kind = _CLASSES.get((module, name))
        if kind is not None:
            return kind
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout  # type: ignore[attr-defined]  # a name -> torch.strided and so on
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and any(name == path.__name__ for path in DATA_ALONE):
            return PurePosixPath  # where it was saved; nobody asks
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _load_metadata(path: Path) -> metadata.Metadata:
    try:
        with path.open("rb") as file:
            found = _DataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise refused(path, error) from None
    except (EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, ImportError) as error:
        raise ConfigurationError(f"{path} is damaged: {error!r}") from error
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise ConfigurationError(f"{path} is not what torch.distributed.checkpoint writes.")
    return found


def find_prefix(tensors: Mapping[str, LazyTensor], config: DecoderConfig | None) -> str | None:
    """What comes before the own names of a model's weights; None if they are not all there under any."""
    if config is not None:
        expected = list(config.parameter_shapes())
        for name in sorted(tensors, key=len):
            if name.endswith(expected[0]):
                candidate = name.removesuffix(expected[0])
                if all(candidate + other in tensors for other in expected):
                    return candidate
    return None


def select_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], config: DecoderConfig | None, prefix: str
) -> dict[str, LazyTensor]:
    """The weights by their own names.

    Args:
        folder: For errors.
        tensors: All that there are.
        config: Of the model; then its weights must all be there.
        prefix: Of their names.

    Raises:
        ConfigurationError: There are none, or not all.
    """
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not weights:
        raise ConfigurationError(
            f"{folder} has no tensor whose name begins with {prefix!r}. It has, for example, {sorted(tensors)[:3]}: "
            "say by --prefix what comes before the weights' own names."
        )
    if config is not None:
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        expected = config.parameter_shapes()
        wrong = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
        if wrong:
            raise ConfigurationError(
                f"{folder} does not hold this model under {prefix!r}: {len(wrong)} of {len(expected)} tensors are "
                f"missing or of another shape, for example {wrong[:3]}. It has, for example, {sorted(tensors)[:3]}."
            )
    return weights


def _prefix(tensors: Mapping[str, LazyTensor], config: DecoderConfig | None) -> str:
    found = find_prefix(tensors, config)
    if found is not None:
        return found
    return "model." if any(_part(name) == "model" for name in tensors) else ""


def _part(name: str) -> str:
    return name.partition(".")[0]


def _optimizer(
    stored: DcpFolder, tensors: Mapping[str, LazyTensor], weights: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, Any], str]:
    """States and settings by the names of `module_state.py`; if they cannot be had, none and why.

    `torch.distributed.checkpoint.state_dict` gives them in two forms, both of which are known: settings by the number
    of their group (`param_groups.0.lr`, with the names in `param_groups.0.params`), and by parameter.
    """
    readers = stored.values()
    key = next((key for key in OPTIMIZERS if any(name.startswith(f"{key}.") for name in (*tensors, *readers))), None)
    if key is None:
        return {}, {}, ""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{key}."):
            found[name.removeprefix(f"{key}.")] = tensor
    values = {name.removeprefix(f"{key}."): read() for name, read in readers.items() if name.startswith(f"{key}.")}
    for number in [name.removesuffix(".params") for name in values if re.fullmatch(r"param_groups\.\d+\.params", name)]:
        members = values.pop(f"{number}.params")
        settings = {name: values.pop(name) for name in list(values) if name.startswith(f"{number}.")}
        for name, value in settings.items():
            values |= {f"param_groups.{member}{name.removeprefix(number)}": value for member in members}
    owners = {*found, *values}
    known = {f"{part}.{name}" for part in ("state", "param_groups") for name in weights}
    strange = sorted(name for name in owners if name.rpartition(".")[0] not in known)
    if strange:
        return {}, {}, f"{strange[0]} belongs to no weight by name"

    def ours(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"optimizer_0.{part}.{OURS.removeprefix('model.')}{rest}"

    return {ours(n): t for n, t in found.items()}, {ours(n): v for n, v in values.items()}, ""
