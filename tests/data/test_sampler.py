"""The order of samples: a permutation in each epoch, another one in the next, and the same for every layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.data.sampler import WINDOW_CHUNKS, SequenceOrder, local_part

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=40)
EPOCHS = st.integers(0, 5)
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, epoch=EPOCHS, window_chunks=st.integers(1, 10), shuffle=st.booleans())
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, epoch: int, window_chunks: int, shuffle: bool) -> None:
    order = SequenceOrder(sizes, seed=seed, shuffle=shuffle, window_chunks=window_chunks)
    epoch_order = order.slice(epoch, 0, len(order))
    assert len(order) == sum(sizes)
    assert sorted(epoch_order.tolist()) == list(range(sum(sizes)))
    assert shuffle or epoch_order.tolist() == list(range(sum(sizes)))


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, data=st.data())
def test_slices_are_parts_of_the_whole_in_any_order_of_asking(sizes: list[int], seed: int, data: st.DataObject) -> None:
    whole = {epoch: SequenceOrder(sizes, seed=seed).slice(epoch, 0, sum(sizes)) for epoch in (0, 1)}
    order = SequenceOrder(sizes, seed=seed)  # asked for parts only: what it remembers must not show
    for _ in range(5):
        epoch = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, sum(sizes)))
        stop = data.draw(st.integers(start, sum(sizes)))
        np.testing.assert_array_equal(order.slice(epoch, start, stop), whole[epoch][start:stop])


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, epoch=EPOCHS, share=st.integers(1, 4), replicas=st.sampled_from([1, 2, 4]))
def test_parts_of_all_ranks_put_together_are_the_global_batch(
    sizes: list[int], seed: int, epoch: int, share: int, replicas: int
) -> None:
    size = share * replicas
    order = SequenceOrder(sizes, seed=seed)
    for start in range(0, len(order) - size + 1, size):
        batch = order.slice(epoch, start, start + size)
        parts = [local_part(batch, replicas, rank) for rank in range(replicas)]
        assert {len(part) for part in parts} == {share}
        np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_epochs_seeds_and_windows_differ_and_repeat() -> None:
    sizes = [20] * 30
    orders = {
        (seed, epoch): tuple(SequenceOrder(sizes, seed=seed).slice(epoch, 0, 600))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(SequenceOrder(sizes, seed=1).slice(1, 0, 600)) == orders[1, 1]
    # Two windows of the same size are not shuffled alike.
    window = WINDOW_CHUNKS * 20
    first, second = (np.argsort(np.argsort(orders[0, 0][k * window : (k + 1) * window])) for k in (0, 1))
    assert first.tolist() != second.tolist()


def test_reads_stay_within_a_few_chunks_and_still_mix_distant_ones() -> None:
    sizes = [100] * 64
    chunks = SequenceOrder(sizes).slice(0, 0, 6400) // 100
    for start in range(0, 6400, WINDOW_CHUNKS * 100):
        assert len(set(chunks[start : start + WINDOW_CHUNKS * 100])) == WINDOW_CHUNKS
    neighbours = sorted(set(chunks[: WINDOW_CHUNKS * 100]))
    assert neighbours[-1] - neighbours[0] > 2 * WINDOW_CHUNKS
    assert len(set(chunks[:16])) >= 4  # a batch of 16 sees several chunks


def test_order_of_a_large_corpus_is_cheap_to_enter_anywhere() -> None:
    order = SequenceOrder([10_000] * 20_000)  # 200 million sequences: the whole order would take 1.6 GB
    part = order.slice(3, 123_456_789, 123_456_799)
    assert len(set(part.tolist())) == 10
    assert order._window[2].nbytes == WINDOW_CHUNKS * 10_000 * 8


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (5, 4)])
def test_places_outside_of_the_epoch_are_an_error(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="10 sequences"):
        SequenceOrder([10]).slice(0, start, stop)
