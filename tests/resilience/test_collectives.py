"""Who is waited for, by the collectives that ranks have called; and what real processes record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_llm._torch import recorded_collectives
from lightning_llm.resilience.collectives import BUFFER_VARIABLES, KEPT, Collective, read, waited_for, write
from tests.distributed import run_distributed


def calls(group: str, names: Iterable[str]) -> list[Collective]:
    return [Collective(group=group, number=number, name=name, sizes=[[4]]) for number, name in enumerate(names, 1)]


def test_the_rank_with_fewer_calls_is_waited_for() -> None:
    ranks = {0: calls("dp", "aab"), 1: calls("dp", "aa")}
    assert waited_for(ranks) == {1: "b number 3 of group dp"}
    assert waited_for({0: ranks[0], 1: ranks[0]}) == {}
    assert waited_for({0: [], 1: []}) == {}, "nothing was recorded"


def test_who_waits_for_another_is_not_to_blame_for_being_late_elsewhere() -> None:
    ranks = {
        0: calls("tp0", "abc") + calls("dp0", "r"),  # waits for rank 1, and so is not in rank 2's next collective
        1: calls("tp0", "ab") + calls("dp1", "r"),
        2: calls("tp1", "abc") + calls("dp0", "rs"),
        3: calls("tp1", "abc") + calls("dp1", "rs"),
    }
    assert list(waited_for(ranks)) == [1]


def test_another_call_than_most_have_at_the_same_place_is_told() -> None:
    ranks = {0: calls("world", "ab"), 1: calls("world", "ax"), 2: calls("world", "ab")}
    assert waited_for(ranks) == {1: "b number 2 of group world"}
    assert waited_for({0: ranks[0], 1: ranks[1]}) == {}, "of two nobody knows which is right"


def records(folder: Path) -> list[str]:
    rank = dist.get_rank()
    for _ in range(KEPT + 5):
        dist.all_reduce(torch.ones(4))
    dist.barrier()
    write(folder, rank, recorded_collectives())
    return [f"{call.group} {call.number} {call.name} {call.sizes}" for call in read(folder, rank)]


def test_what_ranks_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUFFER_VARIABLES:
        monkeypatch.setenv(name, "100")
    one, other = run_distributed(records, 2, tmp_path)
    assert one == other and len(one) == KEPT
    assert one[-1].split()[2] == "gloo:barrier" and one[-2].endswith("gloo:all_reduce [[4]]")
    assert waited_for({rank: read(tmp_path, rank) for rank in range(2)}) == {}
