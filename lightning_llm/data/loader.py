"""Packed tokens -> batches for one data rank, resumable at any batch: `TokenLoader`, which `module.py` gives Lightning.

It is not a torch DataLoader, so that Lightning leaves its sampling alone (Lightning would put a sampler of its own
there, and litdata splits by world rank, but ranks that share a data coordinate must see the same batches); it has a
torch DataLoader inside to do the reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_llm.data._litdata import TokenBlocks
from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.data.sampler import SequenceOrder, local_part
from lightning_llm.errors import ConfigurationError

IGNORED = -100  # a label that no loss counts (the default of torch's cross_entropy)
_PADDING = -1  # in place of a sequence number: a sequence of ignored labels

Batch = dict[str, Tensor]


class Sequences(Dataset[Batch]):
    """The sequences of a split, read by number: a list of them gives one batch.

    Gives `input_ids` and `labels`, both int64 [batch, seq_len]; `labels[b, t]` is the token after `input_ids[b, t]`.
    With `document_mask` also `document_ids`, int64 [batch, seq_len], equal for tokens of one document; the token that
    ends a document belongs to it.
    """

    def __init__(self, corpus: TokenizedCorpus, split: str, seq_len: int, *, document_mask: bool = False) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.document_mask = document_mask
        self._blocks = TokenBlocks(corpus.path / split, seq_len + 1)

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these sequences; torch's DataLoader calls this with all indices of a batch."""
        tokens = np.full((len(indices), self.seq_len + 1), self.corpus.end_of_text_id, dtype=np.int64)
        padding = np.asarray(indices) == _PADDING
        try:
            for row in np.flatnonzero(~padding):
                tokens[row] = self._blocks[indices[row]]
        except Exception:
            self.corpus.check_files()  # names the file, where it was deleted or cut off since the run began
            raise
        labels = torch.from_numpy(tokens[:, 1:].copy())
        labels[torch.from_numpy(padding)] = IGNORED
        batch = {"input_ids": torch.from_numpy(tokens[:, :-1].copy()), "labels": labels}
        if self.document_mask:
            ends = (batch["input_ids"] == self.corpus.end_of_text_id).long()
            batch["document_ids"] = ends.cumsum(1) - ends
        return batch


class _Position:
    """Where a loader is: sequences of the global order consumed in an epoch. Lightning finds it as `loader.sampler`."""

    def __init__(self) -> None:
        self.epoch = 0
        self.consumed = 0
        self.resume_at = 0  # where the next pass starts; not 0 only right after a state was loaded
        self.before_epoch: Callable[[int], int] | None = None  # may correct the epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; stays where it is when that epoch is the present one."""
        if self.before_epoch is not None:
            epoch = self.before_epoch(epoch)
        if epoch != self.epoch:
            self.epoch, self.consumed, self.resume_at = epoch, 0, 0


class TokenLoader:
    """Iterates over the batches of one data rank; one pass is one epoch (or the rest of it after `load_state_dict`).

    Every global batch is the next `batch_size` sequences of the order, and this rank's batch its contiguous part.

    Args:
        sequences: what to read.
        order: in which order.
        batch_size: sequences in a batch over all data ranks.
        step_size: an epoch of training ends at the last full multiple of this many sequences (those of one optimizer
            step), so that the batches of an epoch do not depend on how a step is accumulated. None pads the last batch
            with ignored labels instead, so that nothing is dropped and all ranks have batches of one shape.
        num_replicas: number of data ranks.
        rank: which of them this is.
        num_workers: processes that read ahead; 0 reads in this process. Changes nothing but the time.
        pin_memory: put batches in pinned memory, for faster copies to a CUDA device.
        identity: what a saved position depends on (corpus, sequence length, seed): a position is only loaded where
            these are the same.
    """

    def __init__(
        self,
        sequences: Sequences,
        order: SequenceOrder,
        *,
        batch_size: int,
        step_size: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % num_replicas:
            raise ConfigurationError(
                f"a batch of {batch_size} sequences does not divide among {num_replicas} data ranks"
            )
        self.sequences = sequences
        self.order = order
        self.batch_size = batch_size
        self.step_size = step_size
        self.num_replicas = num_replicas
        self.rank = rank
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.identity = identity or {}
        self.sampler = _Position()
        self.batch_sampler = None  # Lightning asks for it where it finds a sampler

    @property
    def total(self) -> int:
        """Sequences of a whole epoch over all data ranks, padding not counted."""
        return len(self.order) if self.step_size is None else len(self.order) // self.step_size * self.step_size

    def __len__(self) -> int:
        """Batches of a whole epoch, also when a pass resumes in its middle (Lightning counts on from where it was)."""
        return math.ceil(self.total / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for. Lightning calls iter() early and more than
        # once, before it has told the epoch.
        position = self.sampler
        epoch, position.consumed, position.resume_at = position.epoch, position.resume_at, 0
        batches = DataLoader(
            self.sequences,
            batch_sampler=_Batches(self, epoch, position.consumed),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own, so that reading data does not move the global random state
        )
        for batch in batches:
            # Counted when handed out, not when read: workers are ahead.
            position.consumed = min(position.consumed + self.batch_size, self.total)
            yield batch
        position.epoch, position.consumed = epoch + 1, 0

    def indices(self, epoch: int, start: int) -> Iterator[list[int]]:
        """Sequence numbers of this rank's batches from a place in an epoch on (-1 for padding)."""
        while start < self.total:
            stop = start + self.batch_size
            if stop > self.total and self.step_size is not None:
                return
            batch = self.order.slice(epoch, start, min(stop, self.total))
            padded = np.concatenate([batch, np.full(stop - start - len(batch), _PADDING, dtype=np.int64)])
            yield local_part(padded, self.num_replicas, self.rank).tolist()
            start = stop

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank and for every layout: JSON types only."""
        position = {"epoch": self.sampler.epoch, "consumed": self.sampler.consumed}
        return position | {"step_size": self.step_size or self.batch_size} | self.identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader was, whatever its ranks, batch size and workers were.

        Raises:
            ConfigurationError: the position was taken on other data, or in another order.
        """
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise ConfigurationError(
                    f"The checkpoint's place in the data was taken with {name}={state.get(name)!r}, this run has "
                    f"{name}={value!r}: it would mean other text. Use the same, or start from the weights alone."
                )
        if not 0 <= state["consumed"] <= len(self.order):
            raise ConfigurationError(
                f"The checkpoint has consumed {state['consumed']} sequences of an epoch, the corpus "
                f"{self.sequences.corpus.path} has {len(self.order)}. Resume on the corpus that it was trained on."
            )
        self.sampler.epoch = state["epoch"]
        self.sampler.consumed = self.sampler.resume_at = state["consumed"]


class _Batches:
    """What a DataLoader wants for `batch_sampler`: an iterable with a length."""

    def __init__(self, loader: TokenLoader, epoch: int, start: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._start = start

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.indices(self._epoch, self._start)

    def __len__(self) -> int:
        batches = max(self._loader.total - self._start, 0) / self._loader.batch_size
        return math.ceil(batches) if self._loader.step_size is None else int(batches)


def _as_it_is(batch: Any) -> Any:
    return batch
