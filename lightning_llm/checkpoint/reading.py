"""A verified checkpoint's content: tensors in any layout, and the plain state beside them."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from lightning_llm.checkpoint.committing import INDEX, TRAINER, TRAINER_TENSORS
from lightning_llm.checkpoint.encoding import decode
from lightning_llm.checkpoint.files import TensorEntry, map_file, read_header
from lightning_llm.checkpoint.lazy import Box, LazyTensor, assemble
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest, secret
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.planning import DTYPES, Block, local_box, rank_file
from lightning_llm.checkpoint.selection import Selected, select

TRAINER_PART = "trainer"  # what names of tensors begin with that are parts of the trainer's state
PLACE = ".place"  # and what the names of values end with that tell where such a tensor stands in it


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._content: mmap.mmap | bytes = map_file(path)
        self._entries, self.metadata, self._start = read_header(self._content)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that shares the file's memory; it is read when it is used, and must not outlive a need for it."""
        entry: TensorEntry = self._entries[name]
        dtype = DTYPES[entry.dtype]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        count, offset = entry.size // dtype.itemsize, self._start + entry.start
        return torch.frombuffer(self._content, dtype=dtype, count=count, offset=offset).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Copies(Mapping[str, Tensor]):
    """Tensors of a file that may outlive it: each is copied when it is asked for."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return self._file[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


class Checkpoint:
    """What can be read of a checkpoint.

    Args:
        selected: Where it is, verified.

    Attributes:
        path: Folder or URL.
        manifest: Of it.
    """

    def __init__(self, selected: Selected) -> None:
        self.path = selected.path
        self.manifest: Manifest = selected.manifest
        self._selected = selected
        self._files: dict[str, TensorFile] = {}

    @classmethod
    def open(cls, path: str | Path, *, alone: bool = False) -> Checkpoint:
        """The one at `path`, or the newest good one in the folder `path`, verified; see `select`. Collective."""
        return cls(select(path, alone=alone))

    def local(self, *files: str) -> Path:
        """A local folder with these files."""
        return self._selected.store.fetch(self._selected.name, self.manifest, files)

    def link_into(self, folder: Path) -> None:
        """Makes a folder the checkpoint, without what else may lie there: links to its files, and its manifest."""
        source = self.local(*self.manifest.files)
        for file in self.manifest.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to((source / file).absolute())
        (folder / MANIFEST).write_bytes(self.manifest.to_bytes(secret()))

    def _json(self, file: str) -> Any:
        return json.loads((self.local(file) / file).read_bytes())

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.local(name) / name)
        return self._files[name]

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self._json(INDEX)

    @cached_property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Shape, dtype and blocks of each tensor by its global name."""
        return {
            name: TensorStorageMetadata(
                TensorProperties(DTYPES[entry["dtype"]]),
                torch.Size(entry["shape"]),
                [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for _, o, s in entry["blocks"]],
            )
            for name, entry in self._index.items()
        }

    @cached_property
    def values(self) -> dict[str, Any]:
        """Plain values of optimizers by their global name."""
        return decode(self._json(TRAINER)["values"], {})

    def trainer_state(self) -> dict[str, Any]:
        """Loops, schedulers, callbacks, hyperparameters."""
        kept = TRAINER_TENSORS in self.manifest.files
        tensors = _Copies(TensorFile(self.local(TRAINER_TENSORS) / TRAINER_TENSORS)) if kept else {}
        state = decode(self._json(TRAINER)["state"], tensors)
        for name, place in self.values.items():
            if name.startswith(f"{TRAINER_PART}[") and name.endswith(PLACE):
                mapping = state
                for key in place[:-1]:
                    mapping = mapping.setdefault(key, {})
                mapping[place[-1]] = self.read(name.removesuffix(PLACE))
        return state

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What one of the ranks that saved had for itself alone."""
        file = self._file(rank_file(rank))
        return decode(json.loads(file.metadata["rank"]), _Copies(file))

    def _block(self, name: str, offsets: tuple[int, ...], number: int) -> Tensor:
        entry = self._index[name]
        rank, _, shape = entry["blocks"][number]
        block = Block(name, offsets, tuple(shape), shape == entry["shape"])
        return self._file(rank_file(rank))[block.key]

    def read_into(self, tensors: Mapping[str, Tensor | Pieces]) -> None:
        """Fills tensors, or this rank's parts of them (of a DTensor, or Pieces), wherever the checkpoint has them.

        Args:
            tensors: By global name, in the shapes of the checkpoint's `tensors`.
        """
        wanted = {name: tensor for name, tensor in tensors.items() if _has_part(tensor)}
        plan = create_default_local_load_plan(wanted, Metadata({name: self.tensors[name] for name in wanted}))
        with torch.no_grad():
            for item in plan.items:
                source = self._block(item.storage_index.fqn, *_place(item.storage_index))
                target = local_box(wanted[item.dest_index.fqn], _place(item.dest_index)[0])
                for dim, length in enumerate(item.lengths):
                    source = source.narrow(dim, item.storage_offsets[dim], length)
                    target = target.narrow(dim, item.dest_offsets[dim], length)
                target.copy_(source)

    def read(self, name: str) -> Tensor:
        """One tensor, whole, in host memory."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        self.read_into({name: tensor})
        return tensor

    def lazy(self) -> dict[str, LazyTensor]:
        """All tensors by global name, to be read piece by piece."""
        return {
            name: LazyTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), partial(self._read_box, name))
            for name, entry in self._index.items()
        }

    def _read_box(self, name: str, box: Box) -> Tensor:
        entry = self._index[name]
        places = [(tuple(offsets), tuple(shape)) for _, offsets, shape in entry["blocks"]]
        parts = ((Box(*place), partial(self._block, name, place[0], number)) for number, place in enumerate(places))
        return assemble(box, DTYPES[entry["dtype"]], parts)

    def weights(self, prefix: str = "model.") -> Mapping[str, TensorStorageMetadata]:
        """Shapes and types of the weights by name, without the module's `prefix`; reads no tensor."""
        key = f"model.{prefix}"
        return {name.removeprefix(key): stored for name, stored in self.tensors.items() if name.startswith(key)}

    def iterate_weights(self, prefix: str = "model.") -> Iterator[tuple[str, Tensor]]:
        """The weights one by one, whole, in sorted order of their names."""
        for name in sorted(self.weights(prefix)):
            yield name, self.read(f"model.{prefix}{name}")


def _has_part(tensor: Tensor | Pieces) -> bool:
    if isinstance(tensor, Pieces):
        return bool(tensor.pieces)
    return not isinstance(tensor, DTensor) or tensor.to_local().numel() > 0


def _place(index: Any) -> tuple[tuple[int, ...], int]:
    return tuple(index.offset), index.index
