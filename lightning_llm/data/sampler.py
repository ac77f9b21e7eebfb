"""Which sequence comes when: `SequenceOrder`, the global order of an epoch; `local_part`, a rank's share of a batch.

`loader.py` calls this. The order is a pure function of (chunks, seed, epoch): no rank, number of ranks, worker or batch
size enters it, so every layout trains on the same batches and a position in the order means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Chunks whose sequences are shuffled together: enough to mix distant parts of the corpus, few enough that reads stay
# within files that are still mapped (or, from a remote store, downloaded).
WINDOW_CHUNKS = 8


class SequenceOrder:
    """The order in which the sequences of a split are seen, for any epoch.

    Chunks are shuffled; then, within each window of `window_chunks` neighbours of that order, sequences are. Every
    epoch is a permutation of all sequences. Only the windows asked for are worked out: memory is that of one window,
    and starting in the middle of an epoch costs nothing.

    Args:
        sequences_per_chunk: number of sequences in each chunk, in the order of the files.
        seed: one seed is one order.
        shuffle: False gives 0, 1, 2, ... in every epoch.
        same_every_epoch: keep the order of epoch 0.
        window_chunks: chunks in a window.
    """

    def __init__(
        self,
        sequences_per_chunk: Sequence[int],
        *,
        seed: int = 0,
        shuffle: bool = True,
        same_every_epoch: bool = False,
        window_chunks: int = WINDOW_CHUNKS,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self.same_every_epoch = same_every_epoch
        self._sizes = np.asarray(sequences_per_chunk, dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes  # the first sequence of each chunk
        self._window_chunks = window_chunks
        self._epoch = -1
        self._chunks = np.empty(0, dtype=np.int64)  # of self._epoch: the chunks in their order ...
        self._bounds = np.zeros(1, dtype=np.int64)  # ... and where each window begins and the last one ends
        self._window: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0, dtype=np.int64))  # epoch, number, sequences

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sequence numbers at the places [start, stop) of an epoch: int64 [stop - start]."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"places {start}:{stop} are not within the {len(self)} sequences of an epoch")
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        epoch = 0 if self.same_every_epoch else epoch
        self._plan(epoch)
        parts = []
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop:
            first, last = int(self._bounds[number]), int(self._bounds[number + 1])
            parts.append(self._shuffled_window(epoch, number)[start - first : stop - first])
            start = min(stop, last)
            number += 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _plan(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._chunks = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[self._chunks])
        window_ends = ends[self._window_chunks - 1 :: self._window_chunks]
        self._bounds = np.unique(np.concatenate([[0], window_ends, ends[-1:]]))  # unique: no empty windows
        self._epoch = epoch

    def _shuffled_window(self, epoch: int, number: int) -> np.ndarray:
        if self._window[:2] != (epoch, number):
            low, high = self._bounds[number : number + 2]
            ends = np.cumsum(self._sizes[self._chunks])
            inside = self._chunks[(ends > low) & (ends <= high)]
            sequences = np.concatenate([np.arange(self._firsts[c], self._firsts[c] + self._sizes[c]) for c in inside])
            # + 1, because numpy seeds [a, b, 0] as it seeds [a, b], which the chunks have.
            shuffled = np.random.default_rng([self.seed, epoch, number + 1]).permutation(sequences)
            self._window = (epoch, number, shuffled)
        return self._window[2]


def local_part(batch: np.ndarray, num_replicas: int, rank: int) -> np.ndarray:
    """The contiguous part of a global batch that belongs to a data rank; all parts together are the batch, in order."""
    share = len(batch) // num_replicas
    return batch[rank * share : (rank + 1) * share]
