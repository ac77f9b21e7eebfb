"""A whole checkpoint written by one process, from tensors that need not fit into its memory, as any number of files.

`reshard` and `import` end here; a run's own checkpoints come from saver.py.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Buffer

from lightning_llm.checkpoint.committing import INDEX, TRAINER, TRAINER_TENSORS, digest_algorithm, versions
from lightning_llm.checkpoint.encoding import encode
from lightning_llm.checkpoint.files import make_header
from lightning_llm.checkpoint.lazy import Box, LazyTensor, consecutive_boxes, whole
from lightning_llm.checkpoint.manifest import Manifest, secret
from lightning_llm.checkpoint.planning import Block, dtype_name, make_index, rank_file
from lightning_llm.checkpoint.staging import bytes_of, layout, stream
from lightning_llm.checkpoint.store import CheckpointStore, open_store, split_url
from lightning_llm.checkpoint.worker import write_and_check
from lightning_llm.errors import CheckpointError, ConfigurationError

PIECE = 16 << 20  # bytes of a tensor that are in memory at once
NOT_WITHOUT_OPTIMIZERS = ("callbacks", "lr_schedulers", "optimizer_states")  # as `Trainer.save_checkpoint` leaves out


@dataclass
class Content:
    """What a checkpoint is to hold; see `RunState`.

    Attributes:
        step: Optimizer steps until then.
        tensors: Weights and optimizer states by global name.
        values: Plain values of optimizers by global name.
        trainer: Loops, schedulers, callbacks, hyperparameters.
        ranks: Plain state of each rank alone, as far as there are such.
        mesh: Sizes of the parallel axes of the run.
        weights_only: Whether there are no optimizers in it.
        assets: Files that make the weights usable on their own, by name.
        source: What it was made from; see `Manifest`.
    """

    step: int
    tensors: Mapping[str, LazyTensor]
    values: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[Mapping[str, Any]] = ()
    mesh: Mapping[str, int] = field(default_factory=dict)
    weights_only: bool = False
    assets: Mapping[str, bytes] = field(default_factory=dict)
    source: str | None = None

    def without_optimizers(self) -> Content:
        """The weights alone."""
        return Content(
            step=self.step,
            tensors={name: tensor for name, tensor in self.tensors.items() if name.startswith("model.")},
            values={name: value for name, value in self.values.items() if name.startswith("model.")},
            trainer={name: value for name, value in self.trainer.items() if name not in NOT_WITHOUT_OPTIMIZERS},
            ranks=self.ranks,
            mesh=self.mesh,
            weights_only=True,
            assets=self.assets,
            source=self.source,
        )


def write_checkpoint(path: str | Path, content: Content, *, ranks: int = 1) -> Manifest:
    """Writes, reads back and commits a checkpoint.

    Args:
        path: Folder or URL, of which there must be none yet.
        content: What to write.
        ranks: How many files the tensors are shared out to, equally to the byte, as if as many ranks had saved.

    Returns:
        The manifest.

    Raises:
        ConfigurationError: `path` is taken, or there is something in the content that no checkpoint can hold.
        CheckpointError: It could not be written.
    """
    if ranks < 1:
        raise ConfigurationError(f"ranks={ranks} must be at least 1: it is the number of files.")
    for tensor in content.tensors:
        dtype_name(tensor, content.tensors[tensor].dtype)
    url, name = split_url(path)
    store = open_store(url)
    if store.manifest(name) or name in store.names():
        raise ConfigurationError(f"{path} is a checkpoint already. Choose another name, or remove it first.")
    location = store.create(name, uuid.uuid4().hex[:12])
    try:
        manifest = _write(store, location, content, ranks)
        store.commit(location, name, manifest.to_bytes(secret()))
    except OSError as error:
        store.discard(location)
        raise CheckpointError(f"The checkpoint {path} could not be written: {error}") from error
    except BaseException:
        store.discard(location)
        raise
    return manifest


def _write(store: CheckpointStore, location: str, content: Content, ranks: int) -> Manifest:
    shares = share_out(content.tensors, ranks)
    index = make_index({name: (tensor.dtype, tensor.shape) for name, tensor in content.tensors.items()}, shares)
    trainer_tensors: dict[str, Tensor] = {}
    misplaced: dict[str, Tensor] = {}
    trainer = {
        "state": encode(content.trainer, trainer_tensors, "trainer"),
        "values": {name: encode(value, misplaced, name) for name, value in content.values.items()},
    }
    if misplaced:
        raise ConfigurationError(f"There are tensors among the plain values, for example {next(iter(misplaced))}.")
    files: dict[str, Iterator[Buffer]] = {}
    for rank, blocks in enumerate(shares):
        own = content.ranks[rank] if rank < len(content.ranks) else {}
        files[rank_file(rank)] = _rank_file(blocks, content.tensors, own)
    files[INDEX] = iter([json.dumps(index, separators=(",", ":")).encode()])
    files[TRAINER] = iter([json.dumps(trainer).encode()])
    if trainer_tensors:
        files[TRAINER_TENSORS] = stream(trainer_tensors, {})
    files |= {name: iter([data]) for name, data in content.assets.items()}
    algorithm = digest_algorithm()
    return Manifest(
        uuid=uuid.uuid4().hex,
        step=content.step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        world_size=ranks,
        files={
            file: write_and_check(store, location, file, buffers, algorithm, "full") for file, buffers in files.items()
        },
        mesh=dict(content.mesh),
        versions=versions(),
        weights_only=content.weights_only,
        algorithm=algorithm,
        source=content.source,
    )


def share_out(tensors: Mapping[str, LazyTensor], ranks: int) -> list[list[Block]]:
    """Which part of which tensor goes into which file: an equal number of bytes each, up to one element.

    The tensors' bytes, one tensor after the other, are cut into as many stretches as there are files.
    """
    shares: list[list[Block]] = [[] for _ in range(ranks)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    position = 0
    for name, tensor in tensors.items():
        count, itemsize = math.prod(tensor.shape), tensor.dtype.itemsize
        if not count:
            shares[0].append(Block(name, *whole(tensor.shape), whole=True))
            continue
        cuts = [-(-(total * rank // ranks - position) // itemsize) for rank in range(ranks + 1)]
        cuts = [min(max(cut, 0), count) for cut in cuts]
        for rank in range(ranks):
            for box in consecutive_boxes(tensor.shape, cuts[rank], cuts[rank + 1]):
                shares[rank].append(Block(name, *box, whole=box.shape == tensor.shape))
        position += tensor.nbytes
    return shares


def _rank_file(blocks: list[Block], tensors: Mapping[str, LazyTensor], own: Mapping[str, Any]) -> Iterator[Buffer]:
    """A rank's file as a stream, `PIECE` by `PIECE`."""
    small: dict[str, Tensor] = {}
    metadata = {"rank": json.dumps(encode(own, small, "rank"))}
    by_key = {block.key: block for block in blocks}
    outline = {k: torch.empty(b.shape, dtype=tensors[b.tensor].dtype, device="meta") for k, b in by_key.items()}
    entries = layout({**outline, **small})
    yield make_header(entries, metadata)
    for entry in entries:
        if entry.name in small:
            yield bytes_of(small[entry.name])
            continue
        block = by_key[entry.name]
        tensor = tensors[block.tensor]
        count, step = math.prod(block.shape), max(1, PIECE // tensor.dtype.itemsize)
        for start in range(0, count, step):
            for box in consecutive_boxes(block.shape, start, min(start + step, count)):
                offsets = tuple(map(int.__add__, block.offsets, box.offsets))
                yield bytes_of(tensor.read(Box(offsets, box.shape)))
