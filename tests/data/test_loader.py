"""Batches: the tokens they should be, the same run for every layout, and exact resuming from any place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.data.loader import IGNORED, Sequences, TokenLoader
from lightning_llm.data.sampler import SequenceOrder
from lightning_llm.errors import ConfigurationError
from tests.data.corpora import tokens_of

SEQ_LEN = 16
STEP = 8  # sequences per optimizer step


def make(corpus: TokenizedCorpus, split: str = "train", *, accumulate: int = 1, **options: Any) -> TokenLoader:
    order = SequenceOrder(corpus.split(split).sequences_per_chunk(SEQ_LEN), seed=3, shuffle=split == "train")
    step_size = STEP if split == "train" else None
    options = {"identity": {"seed": 3}} | options
    return TokenLoader(
        Sequences(corpus, split, SEQ_LEN), order, batch_size=STEP // accumulate, step_size=step_size, **options
    )


def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The sequences of all batches, one after the other."""
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_batches_are_tokens_and_the_tokens_after_them(corpus: TokenizedCorpus) -> None:
    tokens = tokens_of(corpus, "train")
    starts, begin = [], 0
    for chunk in corpus.train.chunks:
        starts += [begin + block * (SEQ_LEN + 1) for block in range(chunk.tokens // (SEQ_LEN + 1))]
        begin += chunk.tokens
    loader = make(corpus)
    for number, batch in enumerate(loader):
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["labels"].shape == (STEP, SEQ_LEN)
        for row, sequence in enumerate(loader.order.slice(0, number * STEP, (number + 1) * STEP)):
            expected = tokens[starts[sequence] : starts[sequence] + SEQ_LEN + 1]
            np.testing.assert_array_equal(batch["input_ids"][row], expected[:-1])
            np.testing.assert_array_equal(batch["labels"][row], expected[1:])
    assert number + 1 == len(loader) == len(starts) // STEP > 20


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_layout_sees_the_same_sequences_in_each_step(
    corpus: TokenizedCorpus, num_workers: int, replicas: int, accumulate: int
) -> None:
    steps = rows(list(make(corpus)))
    ranks = [
        list(make(corpus, accumulate=accumulate, num_replicas=replicas, rank=rank, num_workers=num_workers))
        for rank in range(replicas)
    ]
    assert rows([batch for together in zip(*ranks, strict=True) for batch in together]) == steps


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [((1, 1), (2, 1)), ((4, 1), (1, 2)), ((2, 2), (4, 1))])
def test_resumes_at_any_batch_on_any_layout(
    corpus: TokenizedCorpus, saved_by: tuple[int, int], loaded_by: tuple[int, int], num_workers: int
) -> None:
    uninterrupted = rows(list(make(corpus)))
    replicas, accumulate = saved_by
    for step in (1, 2, len(uninterrupted) // STEP - 1):
        saver = make(corpus, accumulate=accumulate, num_replicas=replicas, num_workers=num_workers)
        batches = iter(saver)
        for _ in range(step * accumulate):
            next(batches)
        state = saver.state_dict()
        assert state == {"epoch": 0, "consumed": step * STEP, "step_size": STEP, "seed": 3}
        batches.close()

        others, per_step = loaded_by
        ranks = []
        for rank in range(others):
            loader = make(corpus, accumulate=per_step, num_replicas=others, rank=rank, num_workers=num_workers)
            loader.load_state_dict(state)
            ranks.append(list(loader))
        rest = rows([batch for together in zip(*ranks, strict=True) for batch in together])
        assert uninterrupted[: step * STEP] + rest == uninterrupted


def test_resumes_at_every_single_batch_of_the_second_epoch(corpus: TokenizedCorpus) -> None:
    whole = make(corpus)
    whole.sampler.set_epoch(1)
    expected = rows(list(whole))
    runner = make(corpus)
    runner.sampler.set_epoch(1)
    for done, _ in enumerate(runner, start=1):
        resumed = make(corpus)
        resumed.load_state_dict(runner.state_dict())
        assert resumed.state_dict() == runner.state_dict()  # also before its first batch
        assert rows(list(resumed)) == expected[done * STEP :]
    assert done == len(whole)


def test_a_pass_after_the_resumed_one_is_a_whole_new_epoch(corpus: TokenizedCorpus) -> None:
    loader = make(corpus)
    loader.load_state_dict({"epoch": 4, "consumed": 2 * STEP, "seed": 3})
    assert len(list(loader)) == len(loader) - 2
    assert loader.state_dict() == {"epoch": 5, "consumed": 0, "step_size": STEP, "seed": 3}
    fifth = rows(list(loader))
    other = make(corpus)
    other.sampler.set_epoch(5)
    assert fifth == rows(list(other)) and len(fifth) == len(loader) * STEP


def test_set_epoch_keeps_the_place_in_the_present_epoch_and_leaves_it_for_another(corpus: TokenizedCorpus) -> None:
    loader = make(corpus)
    loader.load_state_dict({"epoch": 2, "consumed": 3 * STEP, "seed": 3})
    loader.sampler.set_epoch(2)
    assert loader.state_dict()["consumed"] == 3 * STEP
    loader.sampler.set_epoch(3)
    assert loader.state_dict() == {"epoch": 3, "consumed": 0, "step_size": STEP, "seed": 3}
    assert len(list(loader)) == len(loader)


def test_a_broken_off_pass_starts_again(corpus: TokenizedCorpus) -> None:
    loader = make(corpus)
    first = next(iter(loader))
    assert torch.equal(next(iter(loader))["input_ids"], first["input_ids"])


def test_calling_iter_early_changes_nothing(corpus: TokenizedCorpus) -> None:
    loader = make(corpus)
    early = iter(loader)  # Lightning does, before it loads the state and tells the epoch
    iter(loader)
    loader.load_state_dict({"epoch": 1, "consumed": STEP, "seed": 3})
    other = make(corpus)
    other.sampler.set_epoch(1)
    assert rows(list(early)) == rows(list(other))[STEP:]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_validation_drops_nothing_and_pads_with_ignored_labels(corpus: TokenizedCorpus, replicas: int) -> None:
    sequences = sum(corpus.val.sequences_per_chunk(SEQ_LEN))
    assert sequences % STEP, "this test needs a last batch that is not full"
    ranks = [list(make(corpus, "val", num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    shapes = {tuple(batch["labels"].shape) for batches in ranks for batch in batches}
    assert shapes == {(STEP // replicas, SEQ_LEN)}
    together = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    labels = torch.cat([batch["labels"] for batch in together])
    assert len(labels) == -(-sequences // STEP) * STEP
    assert (labels[:sequences] != IGNORED).all() and (labels[sequences:] == IGNORED).all()
    whole = Sequences(corpus, "val", SEQ_LEN)
    assert rows(together)[:sequences] == [whole[place]["input_ids"].tolist() for place in range(sequences)]


def test_reading_does_not_move_the_global_random_state(corpus: TokenizedCorpus) -> None:
    for num_workers in (0, 2):
        before = torch.get_rng_state()
        next(iter(make(corpus, num_workers=num_workers)))
        assert torch.equal(torch.get_rng_state(), before)


def test_state_of_other_data_is_refused(corpus: TokenizedCorpus) -> None:
    loader = make(corpus, identity={"corpus": "abc", "seed": 3})
    with pytest.raises(ConfigurationError, match=r"taken with corpus='xyz', this run has corpus='abc'"):
        loader.load_state_dict({"epoch": 0, "consumed": 8, "corpus": "xyz", "seed": 3})
    with pytest.raises(ConfigurationError, match=r"taken with seed=None"):
        loader.load_state_dict({"epoch": 0, "consumed": 8, "corpus": "abc"})
    with pytest.raises(ConfigurationError, match=r"consumed 1000000 sequences"):
        loader.load_state_dict({"epoch": 0, "consumed": 1_000_000, "corpus": "abc", "seed": 3})


def test_batch_that_does_not_divide_is_refused(corpus: TokenizedCorpus) -> None:
    with pytest.raises(ConfigurationError, match=r"batch of 8 sequences does not divide among 3 data ranks"):
        make(corpus, num_replicas=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_chunk_deleted_or_cut_off_during_the_run_is_named(
    copied_corpus: Callable[[], TokenizedCorpus], num_workers: int
) -> None:
    copy = copied_corpus()
    for number, chunk in enumerate(copy.train.chunks):
        file = copy.path / "train" / chunk.filename
        file.unlink() if number % 2 else file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ConfigurationError, match=r"train/chunk-0-0.bin has 40 bytes.*train/chunk-0-1.bin is missing"):
        next(iter(make(copy, num_workers=num_workers)))


def test_document_ids_change_after_each_end_of_text(corpus: TokenizedCorpus) -> None:
    plain, masked = (Sequences(corpus, "train", SEQ_LEN, document_mask=mask) for mask in (False, True))
    assert "document_ids" not in plain[0]
    ended = 0
    for index in range(sum(corpus.train.sequences_per_chunk(SEQ_LEN))):
        tokens, documents = masked[index]["input_ids"], masked[index]["document_ids"]
        assert torch.equal(tokens, plain[index]["input_ids"]) and documents[0] == 0
        ends = tokens[:-1] == corpus.end_of_text_id
        assert torch.equal(documents.diff(), ends.long())
        ended += int(ends.sum())
    assert ended > 0, "the corpus must have documents that end within sequences"
