"""Weights in and out: safetensors, one file or sharded, read and written tensor by tensor. Nothing is ever unpickled.

Called by `Decoder.from_pretrained` / `save_pretrained`, by strategies (each rank reads what it holds) and by export.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError

Box = tuple[slice, ...]
"""The part of a global tensor that is wanted: one slice (without step) per dim."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "5GB"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def box_bounds(box: Box, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) per dim of a box in a tensor of this shape; open ends are filled in."""
    if len(box) != len(shape):
        raise ValueError(f"A box of {len(box)} slices does not fit a tensor of shape {tuple(shape)}.")
    bounds = []
    for part, size in zip(box, shape, strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"A box is contiguous, but a slice has step {step}.")
        bounds.append((start, max(start, stop)))
    return tuple(bounds)


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16" (or itself); raises `ConfigurationError` for a name that is no float type."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigurationError(f"dtype {dtype!r} is not a float type: use float32, bfloat16, float16 or float64.")
    return found


class WeightSource(Protocol):
    """Where weights come from: a folder, a random initialisation, a checkpoint."""

    def read(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        """The part `box` of the tensor `name`, whose global shape is `shape`.

        The answer has the box's shape. It may be a view of a mapped file: copy it before the source is closed.
        """
        ...


class SafetensorsSource:
    """A folder with `model.safetensors`, or with `model.safetensors.index.json` and the shards that it lists.

    Only headers are read on opening; `read` touches the bytes of its box alone. A context manager: leaving it unmaps
    the files.

    Raises:
        ConfigurationError: the folder, the index or a shard is missing, truncated or damaged; the file is named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigurationError(f"There is no folder {self.folder}: give a Hugging Face model folder.")
        self._files: dict[str, Any] = {}
        self._file_of = self._single() if (self.folder / SINGLE_FILE).is_file() else self._sharded()

    def _single(self) -> dict[str, str]:
        return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)

    def _sharded(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f" It has {pickled[0]}, but pickled weights are never loaded: convert them." if pickled else ""
            raise ConfigurationError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}")
        try:
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            file_of = {str(name): str(file) for name, file in file_of.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{index} is damaged ({error!r}): fetch or export the model again.") from None
        listed: dict[str, set[str]] = {}
        for name, file in file_of.items():
            if Path(file).name != file:
                raise ConfigurationError(f"{index} points outside its folder ({file!r}): it is not to be trusted.")
            listed.setdefault(file, set()).add(name)
        for file, names in listed.items():
            if not (self.folder / file).is_file():
                raise ConfigurationError(f"{index} lists {file}, which is missing from {self.folder}: fetch it.")
            absent = sorted(names - set(self._open(file).keys()))
            if absent:
                raise ConfigurationError(f"{self.folder / file} lacks {_some(absent)}, which {INDEX_FILE} says it has.")
        return file_of

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(
                    f"{path} cannot be read ({error}; {path.stat().st_size} bytes): it is truncated or damaged, fetch "
                    "or export it again."
                ) from None
        return self._files[file]

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ConfigurationError(f"{self.folder} has no tensor {name}.")
        return self._open(self._file_of[name]).get_slice(name)

    def read(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`. Raises `ConfigurationError` if the tensor is absent or of another shape."""
        part = self._slice(name)
        found = tuple(part.get_shape())
        if found != tuple(shape):
            raise ConfigurationError(
                f"{self.folder / self._file_of[name]}: {name} has shape {list(found)}, not {list(shape)}."
            )
        if not shape:
            return self._open(self._file_of[name]).get_tensor(name)
        return part[tuple(slice(start, stop) for start, stop in box_bounds(box, shape))]

    def close(self) -> None:
        """Forgets the mapped files."""
        self._files.clear()

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def whole(parameter: Tensor) -> tuple[Tensor, Box, tuple[int, ...]]:
    """The `local` of `load_weights` for a tensor that is held whole."""
    shape = tuple(parameter.shape)
    return parameter.detach(), tuple(slice(0, size) for size in shape), shape


@torch.no_grad()
def load_weights(
    model: nn.Module,
    source: WeightSource,
    *,
    local: Callable[[Tensor], tuple[Tensor, Box, tuple[int, ...]]] = whole,
    names: Iterable[str] | None = None,
) -> None:
    """Copies weights into the model's parameters and persistent buffers, one at a time, converting type and device on
    the way.

    Args:
        local: tensor -> (the tensor that this rank holds, its box in the global tensor, the global shape).
        names: only these tensors; None: all.

    Raises:
        ConfigurationError: the source lacks a tensor or has it in another shape.
    """
    wanted = None if names is None else set(names)
    for name, tensor in _stored_tensors(model):
        if wanted is not None and name not in wanted:
            continue
        target, box, shape = local(tensor)
        if target.numel() == 0:  # a rank's share can be empty when a dim does not divide
            continue
        part = source.read(name, box, shape)
        if target.is_floating_point() and not part.is_floating_point():
            raise ConfigurationError(
                f"{name} holds {part.dtype} values: quantised weights cannot be loaded as they are."
            )
        target.copy_(part)


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What makes up the model's `state_dict()`, each tensor once."""
    yield from model.named_parameters()
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    yield from ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) in stored)


def check_names(expected: dict[str, tuple[int, ...]], source: SafetensorsSource) -> None:
    """Compares names and shapes of a whole model (`expert_weights.file_shapes`) with what a source has.

    Rotary `inv_freq` buffers are ignored, and so is an lm_head that the model ties to its embedding.

    Raises:
        ConfigurationError: one error that names what is missing, extra or of another shape.
    """
    found = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        found.discard("lm_head.weight")
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    extra = sorted(found - expected.keys())
    if extra:
        problems.append(f"{len(extra)} that this model does not have: {_some(extra)}")
    shapes = {name: (source.shape(name), tuple(shape)) for name, shape in expected.items() if name in found}
    wrong = [f"{name} is {list(has)}, not {list(needs)}" for name, (has, needs) in shapes.items() if has != needs]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if problems:
        raise ConfigurationError(
            f"The weights in {source.folder} do not fit its config.json: {'; '.join(problems)}. Are both from the same "
            "model?"
        )


def _some(items: list[str], limit: int = 8) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def parse_size(size: int | str) -> int:
    """Bytes of 5000000000 or "5GB" (decimal) or "5GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigurationError(f"max_shard_size {size!r} is not a size: write bytes, or like 500MB or 5GB.")
    return math.ceil(float(match[1]) * _UNITS[match[2].upper()])


def save_weights(
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> list[Path]:
    """Writes named tensors as `model.safetensors`, or as shards of at most `max_shard_size` bytes with an index.

    A tensor above that size gets its own shard. At most one shard is in memory at a time. Everything is written and
    synced beside its place and renamed at the end, the index last: an interrupted save leaves either what was there
    before or something that does not open, never a mixture that does.

    Returns:
        The files, in order.
    """
    limit = parse_size(max_shard_size)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging = Path(tempfile.mkdtemp(prefix=f".saving-{os.getpid()}-", dir=target))
    try:
        shards, total = _write_shards(tensors, staging, limit)
        return _publish(shards, total, staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves left, but not what another process (a rank of the same script) is writing."""
    for leftover in folder.glob(".saving-*-*"):
        try:
            os.kill(int(leftover.name.split("-")[1]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:  # alive, and somebody else's
            continue


def _write_shards(tensors: Iterable[tuple[str, Tensor]], staging: Path, limit: int) -> tuple[list[list[str]], int]:
    """Writes staging/0, staging/1, ... and returns the names in each, and the bytes in all."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = staging / str(len(shards))
        save_file(shard, path, metadata={"format": "pt"})
        sync(path)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        data = tensor.detach().to("cpu").contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()  # views may overlap, which safetensors refuses as shared memory
        if shard and size + data.nbytes > limit:
            flush()
            size = 0
        shard[name] = data
        size += data.nbytes
        total += data.nbytes
    flush()
    return shards, total


def _publish(shards: list[list[str]], total: int, staging: Path, target: Path) -> list[Path]:
    count = len(shards)
    files = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    (target / INDEX_FILE).unlink(missing_ok=True)
    for i, file in enumerate(files):
        os.replace(staging / str(i), target / file)
    for old in [target / SINGLE_FILE, *target.glob("model-?????-of-?????.safetensors")]:
        if old.name not in files:
            old.unlink(missing_ok=True)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = staging / INDEX_FILE
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        index.write_text(text + "\n", encoding="utf-8")
        sync(index)
        os.replace(index, target / INDEX_FILE)
    return [target / file for file in files]
