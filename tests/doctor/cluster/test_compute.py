"""What a rank measures alone: memory that was changed is found, wherever, and limits of control groups count."""

from __future__ import annotations

import psutil
import pytest
import torch

from lightning_llm.doctor.cluster import compute


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bit", [0, 31, 63])
def test_a_bit_that_turns_is_found(turned: bool, bit: int) -> None:
    chunks = [compute.fill(torch.empty(1000, dtype=torch.int64), number) for number in range(3)]
    if turned:
        for chunk in chunks:
            chunk.bitwise_not_()
    assert compute.wrong_words(chunks, turned=turned) == 0
    chunks[1][999] ^= torch.tensor(1, dtype=torch.int64) << bit
    assert compute.wrong_words(chunks, turned=turned) == 1
    assert compute.wrong_words(chunks, turned=not turned) == 3000


def test_no_two_words_are_equal() -> None:
    """Memory that answers from another address is found, then."""
    chunks = [compute.fill(torch.empty(1000, dtype=torch.int64), number) for number in range(3)]
    assert torch.cat(chunks).unique().numel() == 3000


def test_memory_is_taken_up_to_the_goal_and_no_longer_than_there_is_time() -> None:
    cpu = torch.device("cpu")
    goal = 8 * compute.CHUNK // 1024
    [only] = compute.write(cpu, goal, seconds=5)
    assert goal // 4 < only.nbytes <= goal // 2, "as much again to read it back"
    assert len(compute.write(cpu, 100 * compute.CHUNK, seconds=0)) == 1


def test_free_memory_is_what_the_system_says_or_less() -> None:
    free = compute.free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
